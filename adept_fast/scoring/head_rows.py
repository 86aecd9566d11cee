"""Modules of the last layer that need to run only on the rows that the head reads: queries, output projection, norm and MLP, mostly.

A module may be cut to some rows where what it gives there depends on its input there alone, and where the layer's output there depends
on what it gives there alone. Both are proven with NaN in all other rows, before the module and behind it, whatever the family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adept_fast.models import hidden_of, replaced_forward


def _scattered(forward: Callable[..., Any], rows: Tensor) -> Callable[..., Any]:
    """forward on `rows` of dimension 1 alone, with 0 in all others."""

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
    """A module that is not called with one tensor of [variants, tokens, ...] and answered with one."""


def _with_nan(x: Tensor, rows: Tensor) -> Tensor:
    kept = torch.full_like(x, torch.nan)
    kept[:, rows] = x[:, rows]
    return kept


def cut_modules(layer: nn.Module, forward: Callable[[], Any], rows: Tensor) -> tuple[str, ...]:
    """Names, within `layer`, of the outermost modules with weights that may be cut. forward: the layer's, of some short input."""

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
def cut_to(layer: nn.Module, names: Sequence[str], rows: Tensor) -> Iterator[None]:
    """For the time being, run these modules of a layer on `rows` of their input alone."""
    with ExitStack() as stack:
        for name in names:
            module = layer.get_submodule(name)
            stack.enter_context(replaced_forward(module, _scattered(module.forward, rows)))
        yield
