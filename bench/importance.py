"""Evidence on layer scores: how cheap ones rank against exact masking, how the choice moves with the probe, whether importances add up.

    python -m bench importance --model SMOLLM2 --probe PROBE --exact scores.json --into FILE

scores.json, with scores.items.safetensors beside it, is what `adept-fast score` made of the same probe by masking. Spearman correlations
over the layers, with 95 % bootstrap intervals over items, on every n-th item (--every); the share of random draws of some items that choose
the same layers as all; and for all pairs of the lowest layers, on --pair-items of these items, the importance of leaving out both against
the sum of the two. FILE stores the measurements, so that the same command resumes after --seconds or a kill.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adept_fast.checkpoints import checkpoint
from adept_fast.data.items import Item, load_items
from adept_fast.models.lm_head import token_losses
from adept_fast.scoring.cheap_scores import cheap_scores
from adept_fast.scoring.packs import pack, swept_length
from adept_fast.scoring.scores import STATISTICS, LayerScores
from adept_fast.scoring.settings import CHEAP
from adept_fast.scoring.sweep import bypassed, pack_hidden, plan
from bench import parser
from bench.stored_results import StoredResults

RESAMPLES = 1000


def main(argv: list[str]) -> dict[str, Any]:
    options = parser("importance", __doc__)
    options.add_argument("--model", required=True, help="a checkpoint folder or hub name")
    options.add_argument("--probe", required=True, help="a probe file")
    options.add_argument("--exact", type=Path, required=True, metavar="SCORES", help="scores.json of the same model and probe")
    options.add_argument("--longest", type=int, default=320, help="take the items that fit so many tokens, as the exact scores did")
    options.add_argument("--every", type=int, default=4, help="score every n-th item by the cheap methods")
    options.add_argument("--pairs", type=int, default=8, help="of so many of the lowest layers")
    options.add_argument("--pair-items", type=int, default=64, help="of these items, for the pairs")
    StoredResults.add_to(options)
    given = options.parse_args(argv)
    folder = checkpoint.resolve(given.model)
    model = checkpoint.load_model(folder).eval()
    items = [item for item in load_items(given.probe, checkpoint.load_tokenizer(folder)) if item.supervised]
    items = [item for item in items if len(item.input_ids) <= given.longest]
    exact = LayerScores.load(given.exact)
    weights = exact.per_item["answer"].weights
    if [float(item.supervised) for item in items] != weights.tolist():
        raise RuntimeError(f"{given.exact} is not of these {len(items)} items")
    store = StoredResults(given)
    some = list(range(0, len(items), given.every))
    lowest = sorted(range(len(exact.values)), key=lambda layer: exact.values[layer])[: given.pairs]
    return {
        "device": "cpu",
        "items": len(items),
        "cheap_items": len(some),
        "spearman": {name: of for method in CHEAP for name, of in _correlations(model, items, some, method, exact, store).items()},
        "same_choice": {name: _choices(exact, name) for name in exact.per_item},
        "pairs": _pairs(model, [items[index] for index in some][: given.pair_items], lowest, exact, store),
    }


def _ranks(values: Tensor) -> Tensor:
    return values.argsort(-1).argsort(-1).double()


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's correlation of each row, without ties."""
    x, y = (ranks - ranks.mean(-1, keepdim=True) for ranks in (_ranks(a), _ranks(b)))
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def _correlations(model: Any, items: list[Item], some: list[int], method: str, exact: LayerScores, store: StoredResults) -> dict[str, Any]:
    """Correlate a cheap method's scores (by answer loss, or none) with exact masking by each loss: value, low, high."""

    def measured(index: int) -> list:
        return cheap_scores(model, [items[index]], method, "answer").sums[0].tolist()

    rows = [store.get(f"{method} of item {index}", lambda index=index: measured(index)) for index in some]
    sums = torch.tensor(rows, dtype=torch.float64)
    weights = torch.tensor([[1.0, items[index].supervised, len(items[index].input_ids)] for index in some], dtype=torch.float64)
    own = weights[:, {"gate": 1, "block_influence": 2}.get(method, 0)]
    counts = torch.randint(len(some), (RESAMPLES, len(some)), generator=torch.Generator().manual_seed(0))
    draws = torch.zeros(RESAMPLES + 1, len(some), dtype=torch.float64)
    draws[1:].scatter_add_(1, counts, torch.ones_like(counts, dtype=torch.float64))
    draws[0] = 1

    def means(sums: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("ni,i...->n...", draws, sums) / (draws @ weights).view(-1, *[1] * (sums.ndim - 1))

    cheap = STATISTICS.get(method, lambda values: values)(means(sums, own))
    found = {}
    for name, scores in exact.per_item.items():
        rho = _spearman(cheap, means(scores.sums[some], scores.weights[some]))
        low, high = rho[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        found[f"{method}, {name}"] = [round(float(rho[0]), 3), round(low, 3), round(high, 3)]
    return {**found, f"{method}, lowest four": sorted(cheap[0].argsort()[:4].tolist())}


def _choices(exact: LayerScores, name: str) -> dict[str, Any]:
    """Draw items at random 400 times: return the share that chooses the lowest four of all items, and the mean regret in nats."""
    scores = exact.per_item[name]
    values = scores.sums.sum(0) / scores.weights.sum()
    best = values.argsort()[:4]
    generator, found = torch.Generator().manual_seed(0), {"lowest": sorted(best.tolist())}
    for size in (16, 64, 256):
        draws = [torch.randperm(len(scores.sums), generator=generator)[:size] for _ in range(400)]
        chosen = [(scores.sums[draw].sum(0) / scores.weights[draw].sum()).argsort()[:4] for draw in draws]
        regrets = torch.stack([values[four].sum() - values[best].sum() for four in chosen])
        same = sum(set(four.tolist()) == set(best.tolist()) for four in chosen) / len(chosen)
        found[str(size)] = {"same": same, "mean_regret": round(float(regrets.mean()), 4)}
    return found


@torch.no_grad()
def _pairs(model: Any, items: list[Item], layers: list[int], exact: LayerScores, store: StoredResults) -> dict[str, Any]:
    """Measure the nats per supervised token lost without each of `layers`, and without each two of them, on the same items."""
    packs = pack(items, range(len(items)), plan(model, items).pack)

    def loss(without: tuple[int, ...]) -> float:
        total = 0.0
        for each in packs:
            with bypassed(model, without):
                hidden = pack_hidden(model, each)[:, each.rows]
            total += float(token_losses(model, hidden, each.targets[None]).double().sum())
        return total / sum(item.supervised for item in items)

    tried = [(), *((layer,) for layer in layers), *itertools.combinations(layers, 2)]
    losses = {without: store.get(f"{len(items)} items without {list(without)}", lambda without=without: loss(without)) for without in tried}
    single = {layer: losses[(layer,)] - losses[()] for layer in layers}
    pairs = [[*pair, losses[pair] - losses[()], single[pair[0]] + single[pair[1]]] for pair in tried[1 + len(layers) :]]
    joint, sums = (torch.tensor([pair[at] for pair in pairs], dtype=torch.float64) for at in (2, 3))
    return {
        "items": len(items),
        "tokens": sum(swept_length(item, False) for item in items),
        "single": {str(layer): round(value, 4) for layer, value in single.items()},
        "pairs": [[i, j, round(both, 4), round(added, 4)] for i, j, both, added in pairs],
        "mean_excess": round(float((joint - sums).mean()), 4),
        "largest_excess": round(float((joint - sums).max()), 4),
        "spearman_of_pairs": round(float(_spearman(joint, sums)), 3),
    }
