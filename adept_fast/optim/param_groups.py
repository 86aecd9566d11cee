"""Parameter groups as trainers of language and vision models have them: weight decay for matrices alone, layer-wise learning rates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from adept_fast.errors import InputError
from adept_fast.optim.state import RATES
from adept_fast.settings.validation import Range, require, shown

NUMBERED = re.compile(r"\.(\d+)\.")


def param_groups(
    model: nn.Module, weight_decay: float = 0.01, no_decay: Sequence[str] = (), layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Make groups of a model's trainable parameters, with their names, for AdamW.

    Args:
        model: any module.
        weight_decay: of parameters with two dimensions or more. Biases and gains of norms have 0.
        no_decay: patterns of further names without weight decay, such as "*.embed_tokens.*"; each must match a name.
        layer_decay: multiply the learning rate by layer_decay ** (layers above), in (0, 1]. The last layer and what follows it keep their
            rate, what precedes the first one has the lowest. A layer is the first number in a name. The multipliers are unit rates,
            not groups: two groups remain, whatever the number of layers, and schedulers act as usual.

    Returns:
        One or two groups, of (name, parameter): `set_unit_lr` finds them by name.

    Raises:
        InputError: an argument out of range, a pattern that matches nothing, or layer_decay for a model without numbered layers.

    Source: groups of timm (`param_groups_layer_decay`); layer-wise rates: Clark et al., arXiv 2003.10555.

    >>> groups = param_groups(model, weight_decay=0.1, no_decay=["*embed_tokens*"], layer_decay=0.9)
    >>> [group["weight_decay"] for group in groups]
    [0.1, 0.0]
    >>> optimizer = AdamW(groups, lr=2e-4)
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, found {shown(model)}", "model")
    require("weight_decay", weight_decay, float, Range(0))
    require("no_decay", no_decay, tuple[str, ...])
    if layer_decay is not None:
        require("layer_decay", layer_decay, float, Range(0, 1, above=True))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for pattern in no_decay:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise InputError(f"no_decay: no trainable parameter's name matches {shown(pattern)}")
    depths = {} if layer_decay is None else _layers_above(model)
    groups = []
    for decays in (True, False):
        params = [
            (name, parameter)
            for name, parameter in named
            if decays == (parameter.ndim > 1 and not any(fnmatchcase(name, pattern) for pattern in no_decay))
        ]
        group: dict[str, Any] = {"params": params, "weight_decay": weight_decay if decays else 0.0}
        if layer_decay is not None:
            rates = [layer_decay ** depths[name] for name, _ in params]
            group[RATES] = {position: (torch.tensor(rate), 0) for position, rate in enumerate(rates) if rate != 1}
        if params:
            groups.append(group)
    return groups


def _layers_above(model: nn.Module) -> dict[str, int]:
    """Return by name how many numbered layers follow a parameter's: all of them and one more before the first."""
    names = [name for name, _ in model.named_parameters()]
    numbers = [NUMBERED.search(name) for name in names]
    layers = [int(number[1]) for number in numbers if number is not None]
    if not layers:
        raise InputError("layer_decay: no parameter's name has the number of a layer: leave it out")
    count, found, above = max(layers) + 1, {}, max(layers) + 1
    for name, number in zip(names, numbers, strict=True):
        if number is not None:
            above = count - 1 - int(number[1])
        elif above != count:
            above = 0
        found[name] = above
    return found
