"""config.json held against the tensors beside it: a model of sizes that no tensor has is refused before it takes hours or all memory."""

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
SPARE = 1 << 26  # elements: of a tied head that has no tensor, of buffers that are computed
LARGEST_BUFFERS = 1 << 33  # elements of what a model computes from its config: positions, masks


def check_counts(config: Mapping[str, Any], shards: Shards) -> None:
    """Refuse no layers, more layers than there are tensors, or more experts than any tensor has rows: each takes time to build."""
    tensors = shards.tensors
    largest = max((max(stored.shape, default=1) for stored in tensors.values()), default=1)
    for key, value in _numbers(config):
        if key in LAYER_COUNTS and not 0 < value <= len(tensors):
            raise InputError(f"{shards.folder / 'config.json'}: has {key} {_shown(value)}, its files {len(tensors)} tensors: correct it")
        if EXPERT_COUNTS.fullmatch(key) and value > largest:
            raise InputError(f"{shards.folder / 'config.json'}: has {key} {_shown(value)}, but no tensor has that many rows: correct it")


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and key != KEY:
            yield from _numbers(value)
        elif isinstance(value, int):
            yield key, value


def _shown(value: int) -> str:
    return f"{value}" if abs(value) < 10**20 else "of more than 20 digits"


def check_sizes(skeleton: PreTrainedModel, shards: Shards) -> None:
    """Refuse a model, built without memory, that is larger than its tensors: transformers would make the rest up before it is asked."""
    described = sum(parameter.numel() for parameter in skeleton.parameters())
    held = sum(stored.numel for stored in shards.tensors.values())
    if described > 2 * held + SPARE:
        raise InputError(
            f"{shards.folder / 'config.json'}: describes {described:,} parameters, but there are {held:,} beside it: correct it"
        )
    if sum(buffer.numel() for buffer in skeleton.buffers()) > LARGEST_BUFFERS:
        raise InputError(f"{shards.folder / 'config.json'}: describes masks or positions that no memory holds: correct it")
