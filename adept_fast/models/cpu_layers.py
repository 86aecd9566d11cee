"""Decoder layers of the plain kind, run on the CPU by torch's products with adept_fast._C between them, in fp32 and without gradients.

    h = h + o(attention(turned q(n), turned k(n), v(n)))     n = RMS norm of h; causal within segments; turned by rotary positions
    h = h + down(silu(gate(n)) up(n))                        n = RMS norm of h

q, k, v may have a bias, q and k a norm of each head. A layer is taken for one by its modules alone, which is no proof: who uses this
compares it with the layer's own forward on the texts at hand. Two residual additions, two norms, the rotation, the scores and the gated
activation each pass over memory once at most, where modules pass about thirty times.
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
        """Of rows of x, which has as many elements in one piece as `into`."""
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

    def __call__(self, hidden: Tensor, turns: Sequence[Tensor], ends: Sequence[int], rows: Tensor | None) -> None:
        """Update hidden [sequences, tokens, width] in place, at `rows` of the tokens alone where they are given.

        turns: cosines and sines [1, tokens, head width]; ends: of segments.
        """
        from adept_fast import _C

        attention, mlp, threads = self.module.self_attn, self.module.mlp, torch.get_num_threads()
        sequences, tokens, _ = hidden.shape
        normed = self.before_attention(hidden, torch.empty_like(hidden))
        keys, values = _product(normed, attention.k_proj), _product(normed, attention.v_proj)
        askers = torch.arange(tokens, device="cpu") if rows is None else rows
        kept, normed = (hidden, normed) if rows is None else (hidden[:, rows], normed[:, rows])
        queries = _product(normed, attention.q_proj)
        for norm, heads in zip(self.head_norms, (queries, keys), strict=False):
            norm(heads, heads)
        attended = torch.empty_like(queries)
        addresses = (x.data_ptr() for x in (queries, keys, values, *turns, attended))
        counts = (x.shape[2] // self.width for x in (queries, keys))
        asking = askers.data_ptr(), len(askers)
        _C.attention(*addresses, sequences, tokens, *counts, self.width, ends, *asking, self.scale, threads)
        _add_product(kept, attended, attention.o_proj)
        self.before_mlp(kept, normed)
        gate, up = _product(normed, mlp.gate_proj), _product(normed, mlp.up_proj)
        _C.gated_activation(gate.data_ptr(), up.data_ptr(), gate.numel(), threads)
        _add_product(kept, gate, mlp.down_proj)
        if rows is not None:
            hidden[:, rows] = kept


def _product(inputs: Tensor, linear: nn.Linear) -> Tensor:
    return functional.linear(inputs, linear.weight, linear.bias)


def _add_product(hidden: Tensor, inputs: Tensor, linear: nn.Linear) -> None:
    hidden.view(-1, hidden.shape[-1]).addmm_(inputs.view(-1, inputs.shape[-1]), linear.weight.T)
    if linear.bias is not None:
        hidden.add_(linear.bias)


def _plain(layer: Any) -> _PlainLayer | None:
    """None for a layer of other modules, weights that are not at hand in fp32 (quantised or sharded ones are no plain parameters), or hooks
    and forwards in the way of its modules' own."""
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
        or any(map(_touched, (attention, mlp, mlp.act_fn, *modules, *linears)))
        or any(type(x) is not nn.Parameter or not _at_hand(x) or not x.is_contiguous() for x in weights)
        or any(True for _ in mlp.act_fn.parameters())
        or not torch.equal(mlp.act_fn(_PROBE), functional.silu(_PROBE))
    ):
        return None
    return _PlainLayer(layer, norms[0], norms[1], tuple(norms[2:]), width, scale)


def _norm(module: nn.Module) -> _Norm | None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    return None if epsilon is None or weight is None else _Norm(weight, epsilon)


def _at_hand(x: Tensor) -> bool:
    """Whether it is fp32 and in memory: of weights that are gathered when they are needed the storage is empty meanwhile."""
    held = x.device.type == "cpu" and x.untyped_storage().nbytes() >= 4 * (x.storage_offset() + x.numel())
    return held and x.dtype == torch.float32


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _touched(module: nn.Module) -> bool:
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def native_layers(model: PreTrainedModel, lengths: Sequence[int], rows: Tensor | None = None) -> Iterator[None]:
    """For the time being, layers of the plain kind run so, on sequences of segments of `lengths` tokens, and update their input in place:
    for one who gives them a buffer of his own. The last layer need give what it gives at `rows` alone, int64 [rows], ascending. Raises
    InputError for rows that C++ would read otherwise."""
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
        turns: Any = kwargs.get("position_embeddings")
        plain = _plain(layer)
        if plain is None or not _fit(turns, hidden, plain):
            return own(hidden, *args, **kwargs)
        plain(hidden, [each.contiguous() for each in turns], ends, rows)
        return hidden

    return run


def _fit(turns: Any, hidden: Tensor, layer: _PlainLayer) -> bool:
    """Whether hidden states are fp32 in one piece, of which no gradient is wanted, and positions are turns of whole heads, the same for all
    sequences."""
    if hidden.ndim != 3 or hidden.shape[2:] != layer.before_attention.weight.shape:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not (_at_hand(hidden) and hidden.is_contiguous()):
        return False
    shape = (1, hidden.shape[1], layer.width)
    return isinstance(turns, tuple) and all(isinstance(x, Tensor) and _at_hand(x) and x.shape == shape for x in turns)


def has_native_layers(model: PreTrainedModel) -> bool:
    """Whether any layer may run so."""
    return dispatch.has_native_layers() and any(_own_forward(layer) and _plain(layer) is not None for layer in decoder_layers(model))
