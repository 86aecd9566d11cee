"""config.json of a model with copies: the source's own file with the fields changed that say something about layers, the rest untouched."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from adept_fast.checkpoints.adept_config import KEY
from adept_fast.models import expanded_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def with_copies(config: PretrainedConfig, copied_from: Iterable[int]) -> PretrainedConfig:
    """`config` for a model with a copy right after its layer i for each i in `copied_from`; an i that is there twice gets two."""
    left, places = Counter(copied_from), {}
    while left:
        round = sorted(left)
        before = {layer: places.get(layer, 0) for layer in round}
        # where each stands by now: its own index, the copies of layers before it, and its own earlier copies
        positions = [layer + sum(count for other, count in places.items() if other < layer) + before[layer] for layer in round]
        config = expanded_config(config, positions)
        for layer in round:
            places[layer] = places.get(layer, 0) + 1
        left -= Counter(round)
    return config


def config_file(held: Mapping[str, Any], config: PretrainedConfig, copied_from: Iterable[int]) -> dict[str, Any]:
    """The content of config.json: `held`, the source's, which `config` was read from, with what the copies change."""
    content = copy.deepcopy({key: value for key, value in held.items() if key != KEY})
    _change(content, config, with_copies(config, copied_from))
    return content


def _change(content: dict[str, Any], before: PretrainedConfig, after: PretrainedConfig) -> None:
    plain = after.to_dict()
    for key in dict.fromkeys([*content, *plain]):
        old, new = getattr(before, key, None), getattr(after, key, None)
        if hasattr(old, "to_dict") and hasattr(new, "to_dict"):
            nested = content.get(key)
            inner = dict(nested) if isinstance(nested, Mapping) else {}
            _change(inner, old, new)
            if inner or nested is not None:
                content[key] = inner
        elif old != new:
            content[key] = plain.get(key, new)
