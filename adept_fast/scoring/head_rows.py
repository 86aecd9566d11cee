"""Run modules of the last layer only on the token rows that the head reads: mostly queries, output projection, norm and MLP.

A module may run on selected token rows only if each output row depends on that input row alone, and if the layer's output at those rows
depends on the module's output at those rows alone. Both are proven, for any family, by NaN in all other rows before and behind the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adept_fast.models.decoder_layers import hidden_of, replaced_forward


def _scattered(forward: Callable[..., Any], rows: Tensor) -> Callable[..., Any]:
    """Run forward on `rows` of dimension 1 only; all other rows are 0."""

    def run(hidden: Tensor) -> Tensor:
        output = forward(hidden[:, rows])
        whole = output.new_zeros(*hidden.shape[:2], *output.shape[2:])
        whole[:, rows] = output
        return whole

    return run


def _poisoned(forward: Callable[..., Any], rows: Tensor) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or args[0].ndim != 3 or args[0].shape[1] <= int(rows.max()):
            raise _Uncut
        output = forward(_with_nan(args[0], rows))
        if not isinstance(output, Tensor) or output.shape[:2] != args[0].shape[:2]:
            raise _Uncut
        return _with_nan(output, rows)

    return run


class _Uncut(Exception):
    """Raised for a module whose input or output is not a single tensor [variants, tokens, ...]."""


def _with_nan(x: Tensor, rows: Tensor) -> Tensor:
    poisoned = torch.full_like(x, torch.nan)
    poisoned[:, rows] = x[:, rows]
    return poisoned


def rowwise_modules(layer: nn.Module, forward: Callable[[], Any], rows: Tensor) -> tuple[str, ...]:
    """Find the outermost modules with weights that may run on `rows` only: names within `layer`. forward: the layer's, on a short input."""

    def proven(module: nn.Module) -> bool:
        try:
            with replaced_forward(module, _poisoned(module.forward, rows)):
                return bool(hidden_of(forward())[:, rows].isfinite().all())
        except _Uncut:
            return False

    def search(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            if any(True for _ in child.parameters()) and proven(child):
                yield prefix + name
            else:
                yield from search(child, f"{prefix}{name}.")

    return tuple(search(layer, ""))


@contextmanager
def run_on_rows(layer: nn.Module, names: Sequence[str], rows: Tensor) -> Iterator[None]:
    """Within the context, run these modules of a layer on `rows` of their input only."""
    with ExitStack() as stack:
        for name in names:
            module = layer.get_submodule(name)
            stack.enter_context(replaced_forward(module, _scattered(module.forward, rows)))
        yield
