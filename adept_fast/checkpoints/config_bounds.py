"""Check config.json against the tensors beside it, before building a model of wrong sizes takes hours or all memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adept_fast.checkpoints.adept_config import KEY
from adept_fast.checkpoints.safetensors_index import Shards
from adept_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
EXPERT_COUNTS = re.compile(r"(num|n)_\w*experts")
SPARE = 1 << 26  # elements without a tensor: a tied head, computed buffers
LARGEST_BUFFERS = 1 << 33  # elements that a model computes from its config: positions, masks


def check_counts(config: Mapping[str, Any], shards: Shards) -> None:
    """Raise InputError for no layers, more layers than tensors, or more experts than any tensor has rows."""
    tensors = shards.tensors
    largest = max((max(stored.shape, default=1) for stored in tensors.values()), default=1)
    for key, value in _numbers(config):
        if key in LAYER_COUNTS and not 0 < value <= len(tensors):
            raise InputError(f"{shards.folder / 'config.json'}: has {key} {_digits(value)}, its files {len(tensors)} tensors: correct it")
        if EXPERT_COUNTS.fullmatch(key) and value > largest:
            raise InputError(f"{shards.folder / 'config.json'}: has {key} {_digits(value)}, but no tensor has that many rows: correct it")


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and key != KEY:
            yield from _numbers(value)
        elif isinstance(value, int):
            yield key, value


def _digits(value: int) -> str:
    return f"{value}" if abs(value) < 10**20 else "of more than 20 digits"


def check_sizes(skeleton: PreTrainedModel, shards: Shards) -> None:
    """Raise InputError for a model larger than its tensors: transformers would allocate and initialise the rest before it reports it."""
    described = sum(parameter.numel() for parameter in skeleton.parameters())
    held = sum(stored.numel for stored in shards.tensors.values())
    if described > 2 * held + SPARE:
        raise InputError(
            f"{shards.folder / 'config.json'}: describes {described:,} parameters, but there are {held:,} beside it: correct it"
        )
    if sum(buffer.numel() for buffer in skeleton.buffers()) > LARGEST_BUFFERS:
        raise InputError(f"{shards.folder / 'config.json'}: describes masks or positions that no memory holds: correct it")
