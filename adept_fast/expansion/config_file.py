"""Write config.json of a model with copies: only the fields that describe layers differ from the source's file."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from adept_fast.checkpoints.adept_config import KEY
from adept_fast.models.layer_config import expanded_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def with_copies(config: PretrainedConfig, copied_from: Iterable[int]) -> PretrainedConfig:
    """Return `config` with a copy right after layer i for each i in `copied_from`. An index that occurs twice gets two copies."""
    counts = Counter(copied_from)
    for done in range(max(counts.values(), default=0)):  # every layer at most once a call: the second copies come in the second one
        present = {layer: min(count, done) for layer, count in counts.items()}
        positions = [layer + sum(present[other] for other in counts if other <= layer) for layer in sorted(counts) if counts[layer] > done]
        config = expanded_config(config, positions)
    return config


def config_file(source: Mapping[str, Any], config: PretrainedConfig, copied_from: Iterable[int]) -> dict[str, Any]:
    """Return the content of config.json with copies. source: the source's config.json; config: the config read from it."""
    content = copy.deepcopy({key: value for key, value in source.items() if key != KEY})
    _change(content, config, with_copies(config, copied_from))
    return content


def _change(content: dict[str, Any], before: Any, after: Any) -> None:
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
