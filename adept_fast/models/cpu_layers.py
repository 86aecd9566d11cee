"""Run llama-like decoder layers on the CPU by torch's matrix products with adept_fast._C between them, in fp32, without gradients.

    h = h + o(attention(rotated q(n), rotated k(n), v(n)))     n = RMS norm of h; causal within segments; rotary positions
    h = h + down(silu(gate(n)) up(n))                          n = RMS norm of h

q, k and v may have a bias; q and k may have a norm per head. A layer is recognised by its modules, which proves nothing, so callers compare
the result with the layer's own forward on their texts. Residual additions, norms, rotation, attention scores and gated activation pass over
memory at most once each; the modules pass about thirty times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adept_fast.errors import InputError
from adept_fast.models.decoder_layers import decoder_layers, replaced_forward
from adept_fast.ops import dispatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LANES = 16  # csrc/cpu_lanes.h
_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION, _HEAD_NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_PROBE = torch.linspace(-8, 8, LANES, device="cpu")


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    epsilon: float

    def __call__(self, x: Tensor, into: Tensor) -> Tensor:
        """Normalise rows of x into `into`, both contiguous and of one size."""
        from adept_fast import _C

        width, threads = len(self.weight), torch.get_num_threads()
        _C.rms_norm(x.data_ptr(), self.weight.data_ptr(), into.data_ptr(), x.numel() // width, width, self.epsilon, threads)
        return into


@dataclass(frozen=True)
class _PlainLayer:
    module: Any
    before_attention: _Norm
    before_mlp: _Norm
    head_norms: tuple[_Norm, ...]
    width: int
    scale: float

    def __call__(self, hidden: Tensor, rotary: Sequence[Tensor], ends: Sequence[int], rows: Tensor | None) -> None:
        """Update hidden [sequences, tokens, width] in place, at `rows` of the tokens only if given.

        rotary: cosines and sines, [1, tokens, head width] each
        ends: index behind the last token of each segment
        """
        from adept_fast import _C

        attention, mlp, threads = self.module.self_attn, self.module.mlp, torch.get_num_threads()
        sequences, tokens, _ = hidden.shape
        normed = self.before_attention(hidden, torch.empty_like(hidden))
        keys, values = _product(normed, attention.k_proj), _product(normed, attention.v_proj)
        query_rows = torch.arange(tokens, device="cpu") if rows is None else rows
        states, normed = (hidden, normed) if rows is None else (hidden[:, rows], normed[:, rows])
        queries = _product(normed, attention.q_proj)
        for norm, heads in zip(self.head_norms, (queries, keys), strict=False):
            norm(heads, heads)
        attended = torch.empty_like(queries)
        addresses = (x.data_ptr() for x in (queries, keys, values, *rotary, attended))
        counts = (x.shape[2] // self.width for x in (queries, keys))
        _C.attention(*addresses, sequences, tokens, *counts, self.width, ends, query_rows.data_ptr(), len(query_rows), self.scale, threads)
        _add_product(states, attended, attention.o_proj)
        self.before_mlp(states, normed)
        gate, up = _product(normed, mlp.gate_proj), _product(normed, mlp.up_proj)
        _C.gated_activation(gate.data_ptr(), up.data_ptr(), gate.numel(), threads)
        _add_product(states, gate, mlp.down_proj)
        if rows is not None:
            hidden[:, rows] = states


def _product(inputs: Tensor, linear: nn.Linear) -> Tensor:
    return functional.linear(inputs, linear.weight, linear.bias)


def _add_product(hidden: Tensor, inputs: Tensor, linear: nn.Linear) -> None:
    hidden.view(-1, hidden.shape[-1]).addmm_(inputs.view(-1, inputs.shape[-1]), linear.weight.T)
    if linear.bias is not None:
        hidden.add_(linear.bias)


def _plain(layer: Any) -> _PlainLayer | None:
    """Recognise a llama-like layer. Returns None for

    - other modules
    - weights that are not plain fp32 parameters in CPU memory (quantised, sharded or offloaded)
    - modules with hooks or a replaced forward
    """
    if _children(layer) != _LAYER or _children(layer.mlp) != _MLP or _children(layer.self_attn) - _HEAD_NORMS != _ATTENTION:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    heads = [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    modules = [layer.input_layernorm, layer.post_attention_layernorm, *heads]
    norms = [norm for norm in map(_norm, modules) if norm is not None]
    linears = [getattr(branch, name) for branch, names in ((attention, _ATTENTION), (mlp, _MLP - {"act_fn"})) for name in names]
    weights = [norm.weight for norm in norms]
    weights += [x for linear in linears for x in linear.parameters(recurse=False)]
    width, scale = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    if (
        len(norms) < len(modules)
        or not isinstance(width, int)
        or not isinstance(scale, (int, float))
        or width < 1
        or width % (2 * LANES)
        or len(heads) == 1
        or any(norm.weight.shape != (width,) for norm in norms[2:])
        or any(type(linear) is not nn.Linear for linear in linears)
        or any(norm.weight.shape != attention.q_proj.weight.shape[1:] for norm in norms[:2])
        or any(len(linear.weight) % width for linear in (attention.q_proj, attention.k_proj))
        or attention.k_proj.weight.shape != attention.v_proj.weight.shape
        or mlp.gate_proj.weight.shape != mlp.up_proj.weight.shape
        or any(map(_has_hooks, (attention, mlp, mlp.act_fn, *modules, *linears)))
        or any(type(x) is not nn.Parameter or not _is_fp32_in_memory(x) or not x.is_contiguous() for x in weights)
        or any(True for _ in mlp.act_fn.parameters())
        or not torch.equal(mlp.act_fn(_PROBE), functional.silu(_PROBE))
    ):
        return None
    return _PlainLayer(layer, norms[0], norms[1], tuple(norms[2:]), width, scale)


def _norm(module: nn.Module) -> _Norm | None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    return None if epsilon is None or weight is None else _Norm(weight, epsilon)


def _is_fp32_in_memory(x: Tensor) -> bool:
    """Whether a tensor is fp32 on the CPU with its storage. The storage of weights that are gathered on demand is empty in between."""
    held = x.device.type == "cpu" and x.untyped_storage().nbytes() >= 4 * (x.storage_offset() + x.numel())
    return held and x.dtype == torch.float32


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _has_hooks(module: nn.Module) -> bool:
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def native_layers(model: PreTrainedModel, lengths: Sequence[int], rows: Tensor | None = None) -> Iterator[None]:
    """Within the context, run llama-like layers natively. They update their input in place, so the caller owns that buffer.

    lengths: tokens of each segment, end to end in every sequence
    rows: token rows that the last layer computes, int64 [rows], ascending; None: all

    Raises InputError for rows of another type, shape or device.
    """
    if rows is not None and not (rows.dtype == torch.int64 and rows.ndim == 1 and rows.is_contiguous() and rows.device.type == "cpu"):
        found = f"{rows.dtype} of shape {tuple(rows.shape)} on {rows.device}"
        raise InputError(f"rows must be int64 [rows] in one piece on the CPU, found {found}")
    ends, layers = list(accumulate(lengths)), decoder_layers(model)
    with ExitStack() as stack:
        for layer in filter(_own_forward, layers):
            stack.enter_context(replaced_forward(layer, _native(layer, ends, rows if layer is layers[-1] else None)))
        yield


def _own_forward(layer: nn.Module) -> bool:
    return "forward" not in vars(layer)


def _native(layer: nn.Module, ends: Sequence[int], rows: Tensor | None) -> Any:
    own = layer.forward

    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        rotary: Any = kwargs.get("position_embeddings")
        plain = _plain(layer)
        if plain is None or not _accepts(plain, hidden, rotary):
            return own(hidden, *args, **kwargs)
        plain(hidden, [each.contiguous() for each in rotary], ends, rows)
        return hidden

    return run


def _accepts(layer: _PlainLayer, hidden: Tensor, rotary: Any) -> bool:
    """Whether hidden states are contiguous fp32 without gradients, and rotary positions span whole heads, the same for all sequences."""
    if hidden.ndim != 3 or hidden.shape[2:] != layer.before_attention.weight.shape:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not (_is_fp32_in_memory(hidden) and hidden.is_contiguous()):
        return False
    shape = (1, hidden.shape[1], layer.width)
    return isinstance(rotary, tuple) and all(isinstance(x, Tensor) and _is_fp32_in_memory(x) and x.shape == shape for x in rotary)


def has_native_layers(model: PreTrainedModel) -> bool:
    """Whether any layer can run natively."""
    return dispatch.has_native_layers() and any(_own_forward(layer) and _plain(layer) is not None for layer in decoder_layers(model))
