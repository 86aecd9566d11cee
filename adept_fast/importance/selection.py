"""Which layers to copy: the k of lowest importance under a rule of placement."""

from __future__ import annotations

from adept_fast.errors import InputError
from adept_fast.importance.scores import LayerScores

PLACEMENTS = ("lowest", "uniform", "lowest_per_band")


def check_choice(layers: int, k: int, placement: str, given: tuple[int, ...] | None = None) -> None:
    """Raise InputError for a k, placement or list of layers that a model of `layers` layers cannot have."""
    if placement not in PLACEMENTS:
        raise InputError(f"expand.placement must be one of {', '.join(PLACEMENTS)}, found {placement!r}")
    if given is not None:
        if not given or len(set(given)) != len(given) or not all(0 <= layer < layers for layer in given):
            raise InputError(f"expand.layers must be indices from 0 to {layers - 1}, each once, found {list(given)}")
    elif isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= layers:
        raise InputError(f"expand.k must be a whole number from 1 to {layers}, the number of layers, found {k!r}")


def select_layers(scores: LayerScores, k: int = 4, placement: str = "lowest") -> list[int]:
    """k layers, ascending. "lowest": the lowest scores; "uniform": the last of each of k equal depth bands (LLaMA Pro);
    "lowest_per_band": the lowest of each of k equal depth bands. Scores of a race give the layers that it is the proof of.
    Raises InputError for a k below 1 or above the number of layers, or for another choice than was raced for."""
    layers = len(scores.values)
    check_choice(layers, k, placement)
    if scores.certificate and placement != "uniform":
        if (k, placement) != (scores.certificate["k"], "lowest"):
            raced = scores.certificate["k"]
            raise InputError(f"the scores are those of a race for the {raced} lowest layers: score without a race for another choice")
        return list(scores.certificate["layers"])
    if placement == "lowest":
        return sorted(_lowest(scores, range(layers), k))
    bands = [range(band * layers // k, (band + 1) * layers // k) for band in range(k)]
    if placement == "uniform":
        return [band[-1] for band in bands]
    return [_lowest(scores, band, 1)[0] for band in bands]


def _lowest(scores: LayerScores, among: range, k: int) -> list[int]:
    return sorted(among, key=lambda layer: scores.values[layer])[:k]


def undecided(scores: LayerScores, chosen: list[int], placement: str = "lowest") -> list[int]:
    """Layers that were not chosen although their interval reaches below the highest chosen value: the intervals do not part them."""
    if placement != "lowest":
        return []
    if scores.certificate:
        return [layer for layer in scores.certificate["undecided"] if layer not in chosen]
    limit = max(scores.high[layer] for layer in chosen)
    return [layer for layer in range(len(scores.values)) if layer not in chosen and scores.low[layer] < limit]
