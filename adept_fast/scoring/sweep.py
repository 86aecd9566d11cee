"""Compute the hidden states of a model without each of some layers in one sweep, each shared prefix once.

At layer l the baseline and all variants that bypass an earlier layer run as one batch. The baseline's input then joins them as the variant
that bypasses l. The sweep runs inside the model's own forward, so masks, positions, scaling and soft-capping are the family's.

Cost in layer calls per token, for candidates C of L layers: L + sum over l in C of (L - 1 - l); for all layers L + L (L - 1) / 2. In the
last layer only keys and values run on all tokens; the rest runs on the rows that the head reads (head_rows.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adept_fast.models.causality import require_causal
from adept_fast.models.cpu_layers import has_native_layers, native_layers
from adept_fast.models.decoder_layers import (
    decoder_layers,
    device_of,
    hidden_of,
    last_hidden,
    layer_configs,
    replaced_forward,
    text_config,
    with_hidden,
)
from adept_fast.scoring.head_rows import rowwise_modules, run_on_rows
from adept_fast.scoring.packs import Pack, packed, swept_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from adept_fast.data.items import Item

CPU_TOKENS, GPU_TOKENS = 2048, 16384  # of one layer call
PACK_SHARE = 16  # a pack has 1/16 of a layer call's tokens: some layers on, the call holds as many variants of it
NATIVE_SHARE = 8  # the same for native layers, which need no mask between the items of a pack


@dataclass(frozen=True)
class SweepPlan:
    """How to sweep a model.

    tokens: bound on variants times tokens of one layer call; a single longer item still runs alone
    pack: bound on the tokens of a pack; 0: one item per pack
    swept: False if layers cannot run on a batch of variants; then each layer costs a forward
    rowwise: modules of the last layer that run on the head's rows only; None if the model needs all tokens from its last layer
    native: run the layers by models/cpu_layers.py
    """

    tokens: int
    pack: int
    swept: bool = True
    rowwise: tuple[str, ...] | None = ()
    native: bool = False


def _wrapped(module: nn.Module, wrapper: Any) -> AbstractContextManager[None]:
    """Within the context, replace module.forward by wrapper(original forward, hidden, args, kwargs)."""
    forward = module.forward

    def replaced(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return wrapper(forward, hidden, args, kwargs)

    return replaced_forward(module, replaced)


class _Wavefront:
    """Hidden states of all variants so far, the baseline first, in one buffer that each layer updates in place."""

    def __init__(self, layers: Sequence[int], last: int | None, rows: Tensor, most: int) -> None:
        self.layers, self.last, self.rows, self.most = set(layers), last, rows, most
        self.live = 1
        self.buffer: Tensor | None = None

    def wrapper(self, layer: int) -> Any:
        def run(forward: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._run(layer, forward, hidden, args, kwargs)

        return run

    def _run(self, layer: int, forward: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.buffer is None:
            self.buffer = hidden.new_empty(1 + len(self.layers), *hidden.shape[1:])
        if hidden.data_ptr() != self.buffer.data_ptr():  # the first layer, or a model that changes hidden states between layers
            self.buffer[: self.live] = hidden
        joins = layer in self.layers
        if joins:
            self.buffer[self.live] = self.buffer[0]
        for part in _even_parts(self.live, self.most):
            output = forward(self.buffer[part], *args, **kwargs)
            found = hidden_of(output)
            if found.device != self.buffer.device:  # a model spread over devices
                self.buffer = self.buffer.to(found.device)
            if found.data_ptr() != self.buffer[part].data_ptr():
                self.buffer[part] = found
        self.live += joins
        states = self.buffer[: self.live]
        return with_hidden(output, states[:, self.rows.to(states.device)] if layer == self.last else states)


def _even_parts(count: int, most: int) -> Iterator[slice]:
    """Split range(count) into as few slices of at most `most` as possible, with sizes that differ by at most one."""
    parts = -(-count // most)
    for part in range(parts):
        yield slice(part * count // parts, (part + 1) * count // parts)


def pack_hidden(model: PreTrainedModel, pack: Pack) -> Tensor:
    """Compute the last hidden states of a pack, [1, tokens, hidden].

    Positions are passed only for several items: without them the model may take the faster causal path.
    """
    positions = {"position_ids": pack.positions[None]} if len(pack.items) > 1 else {}
    return last_hidden(model, pack.ids[None], **positions)


def row_hidden(model: PreTrainedModel, pack: Pack) -> Tensor:
    """Compute the last hidden states at pack.rows, [1, rows, hidden]."""
    hidden = pack_hidden(model, pack)
    return hidden[:, pack.rows.to(hidden.device)]  # a model spread over devices


def sweep(model: PreTrainedModel, pack: Pack, layers: Sequence[int], plan: SweepPlan) -> Tensor:
    """Compute the last hidden states at pack.rows, [1 + layers, rows, hidden]: the baseline, then the model without each of `layers`.

    layers: ascending
    """
    modules, rowwise = decoder_layers(model), plan.rowwise
    front = _Wavefront(layers, None if rowwise is None else len(modules) - 1, pack.rows, max(1, plan.tokens // pack.tokens))

    def last(forward: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with run_on_rows(modules[-1], rowwise or (), pack.rows.to(hidden.device)):  # only during this call: layers may share modules
            return forward(hidden, *args, **kwargs)

    with ExitStack() as stack:
        if plan.native:
            stack.enter_context(native_layers(model, pack.lengths, None if rowwise is None else pack.rows))
        elif rowwise and len(pack.rows) < pack.tokens:
            stack.enter_context(_wrapped(modules[-1], last))
        for layer, module in enumerate(modules):
            stack.enter_context(_wrapped(module, front.wrapper(layer)))
        return row_hidden(model, pack) if rowwise is None else pack_hidden(model, pack)


@contextmanager
def bypassed(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """Within the context, pass the residual stream through these layers unchanged."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(
                _wrapped(decoder_layers(model)[layer], lambda forward, x, args, kwargs: with_hidden(forward(x, *args, **kwargs), x))
            )
        yield


def one_by_one(model: PreTrainedModel, pack: Pack, layers: Sequence[int]) -> Tensor:
    """Do the same as `sweep` with one forward per layer, for models whose layers cannot run on a batch of variants."""
    rows = [row_hidden(model, pack)]
    for layer in layers:
        with bypassed(model, [layer]):
            rows.append(row_hidden(model, pack))
    return torch.cat(rows)


def flops(model: PreTrainedModel, pack: Pack, without: Sequence[int], plan: SweepPlan) -> float:
    """Return the FLOPs of measuring a pack without each of some layers."""
    layers, variants = decoder_layers(model), 1 + len(without)
    if not plan.swept:
        return call_flops(model, pack, variants * len(layers), variants)
    through = 1 + sum(layer < len(layers) - 1 for layer in without)
    saved = sum(_matrices(layers[-1].get_submodule(name)) for name in plan.rowwise or ())
    calls = len(layers) + sum(len(layers) - 1 - layer for layer in without)
    return call_flops(model, pack, calls, variants) - 2.0 * saved * through * (pack.tokens - len(pack.rows))


def call_flops(model: PreTrainedModel, pack: Pack, calls: float, variants: int) -> float:
    """Return the FLOPs of `calls` layers per token, and of the head on the pack's rows for each variant.

    A layer counts 2 per weight, and causal attention within items.
    """
    config, layers = text_config(model), decoder_layers(model)
    weights, width = _matrices(layers) / len(layers), sum(map(_attention_width, layer_configs(model))) / len(layers)
    body = calls * sum(length * (2 * weights + 2 * width * (length + 1)) for length in pack.lengths)
    return body + 2.0 * variants * len(pack.rows) * config.hidden_size * config.vocab_size


def _attention_width(config: PretrainedConfig) -> int:
    """Return heads times their dimension; 0 for a model without heads, such as a state-space model."""
    heads = getattr(config, "num_attention_heads", 0)
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0


def _matrices(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


@torch.no_grad()
def plan(model: PreTrainedModel, items: Sequence[Item], tokens: int | None = None) -> SweepPlan:
    """Choose the fastest plan that agrees with one forward per layer, on the first tokens of two items, alone and packed.

    items: all that will be swept

    Raises UnsupportedFamilyError for a model that is not causal.
    """
    require_causal(model)
    device = device_of(model)
    tokens = tokens or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS)
    count = len(decoder_layers(model))
    layers = sorted({0, count // 3, 2 * count // 3, count - 1})
    short = [_first_tokens(item, length) for item, length in zip(items[:2], (16, 11), strict=False)]
    alone = [packed(short, [index], True).to(device) for index in range(len(short))]
    expected = [one_by_one(model, pack, layers) for pack in alone]

    def agrees(indices: Sequence[int], plan: SweepPlan) -> bool:
        """Whether the sweep of these items in one pack agrees, on all tokens, or on the supervised ones if the last layer selects them."""
        pack = packed(short, indices, plan.rowwise is None).to(device)
        wanted = torch.cat([expected[index] for index in indices], 1)[:, pack.rows]
        try:
            found = sweep(model, pack, layers, replace(plan, tokens=2 * pack.tokens))  # small enough to run in several parts
        except (RuntimeError, ValueError):  # shapes that do not broadcast over variants
            return False
        return _close(found, wanted)

    every = range(len(short))
    plain = SweepPlan(tokens, 0, rowwise=None)
    if not all(agrees([index], plain) for index in every):
        return SweepPlan(tokens, 0, swept=False)
    together = len(short) > 1 and agrees(every, plain)
    groups = [every] if together else [[index] for index in every]
    plain = replace(plain, pack=tokens // PACK_SHARE if together else 0)
    rowwise = _rowwise(model, packed(short, [0], False).to(device))
    ways = (replace(plain, rowwise=way) for way in (rowwise, ()))
    found = next((way for way in ways if all(agrees(indices, way) for indices in groups)), plain)
    native = replace(found, native=True, pack=tokens // NATIVE_SHARE if together else 0)
    if has_native_layers(model) and all(agrees(indices, native) for indices in groups) and _agree_at_length(model, items, found, native):
        return native
    return found


def _close(found: Tensor, wanted: Tensor) -> bool:
    tolerance = 1e-4 if wanted.dtype == torch.float32 else 0.05
    if found.shape != wanted.shape:
        return False
    there = wanted.isfinite()
    if not bool(there.all()):  # float16 may overflow without a layer: then both must
        if not torch.equal(there, found.isfinite()) or not bool(there.any()):
            return False
        found, wanted = found[there], wanted[there]
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def _agree_at_length(model: PreTrainedModel, items: Sequence[Item], *plans: SweepPlan) -> bool:
    """Compare plans on all tokens of the longest item, which reaches past attention windows and into scaled positions, if any item does."""
    pack = packed(items, [max(range(len(items)), key=lambda index: swept_length(items[index], True))], True).to(device_of(model))
    return _close(*(sweep(model, pack, (), plan) for plan in plans))


def _rowwise(model: PreTrainedModel, pack: Pack) -> tuple[str, ...]:
    """Find the modules of the last layer that may run on the pack's rows only (head_rows.py)."""
    last = decoder_layers(model)[-1]
    found: list[str] = []

    def trying(forward: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found.extend(rowwise_modules(last, lambda: forward(hidden, *args, **kwargs), pack.rows.to(hidden.device)))
        return forward(hidden, *args, **kwargs)

    with _wrapped(last, trying):
        pack_hidden(model, pack)
    return tuple(found)


def _first_tokens(item: Item, count: int) -> Item:
    """Return the first tokens of an item, supervised on their second half."""
    from adept_fast.data.items import IGNORE, Item

    ids = (item.input_ids * 2)[:count]  # the shortest item has two tokens
    return Item(ids, (*[IGNORE] * (len(ids) // 2), *ids[len(ids) // 2 :]))
