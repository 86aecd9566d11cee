"""Compare scoring methods by the rank correlation of their layer scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.runtime.bootstrap import TAILS
from adept_fast.scoring.scores import LayerScores, require_scores
from adept_fast.scoring.settings import Score
from adept_fast.scoring.stability import DRAWS, complete, ranks, resampled_values
from adept_fast.settings.validation import check, require_made


def compare_scores(several: Sequence[LayerScores], seed: int = 0) -> dict[str, Any]:
    """Compute Spearman's rank correlation over layers for each pair of scores, by their primary profiles.

    All scores are resampled together, item by item. If one is from a race, only items on which it measured all layers count.

    Args:
        several: two or more results of `score_layers` for one model and one probe
        seed: of the bootstrap

    Returns:
        dict with
            names: method and loss of each of the n scores
            values: [n, layers]
            spearman, low, high: [n, n], with 95 % bootstrap intervals over items

    Raises:
        InputError: fewer than two scores, or different numbers of layers or items

    >>> table = compare_scores([score_layers(model, probe, method) for method in ("masking", "gate")])
    >>> table["names"]
    ['masking, answer', 'gate, answer']

    Source: Spearman, "The proof and measurement of association between two things", 1904; bootstrap over items as in runtime/bootstrap.py.
    """
    require_made("several", several, Sequence, "give a list of what score_layers returns")
    require_scores(*several, name="several")
    check(Score, seed=seed)
    if len(several) < 2:
        raise InputError(f"a comparison needs two or more scores, found {len(several)}")
    shapes = {(len(scores.values), scores.items) for scores in several}
    if len(shapes) > 1:
        raise InputError(f"scores to compare must be of one model and one probe, found (layers, items) of {sorted(shapes)}")
    shared = torch.stack([complete(scores, scores.loss) for scores in several]).all(0)
    drawn = torch.stack([ranks(resampled_values(scores, scores.loss, draws=DRAWS, seed=seed, among=shared)) for scores in several])
    values = [scores.per_item[scores.loss].among(shared).profile(scores.method).values for scores in several]
    measured = torch.stack([ranks(torch.tensor([each], dtype=torch.float64)) for each in values])
    low, high = torch.quantile(_correlations(drawn), TAILS, dim=0)
    return {
        "names": [scores.method if scores.loss in ("hidden", "own") else f"{scores.method}, {scores.loss}" for scores in several],
        "values": [list(each) for each in values],
        "spearman": _correlations(measured)[0].tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
    }


def _correlations(ranked: Tensor) -> Tensor:
    """Correlate ranks [n, draws, layers] -> [draws, n, n]."""
    centred = ranked - ranked.mean(-1, keepdim=True)
    unit = (centred / centred.norm(dim=-1, keepdim=True)).transpose(0, 1)
    return unit @ unit.mT
