"""Settings of scoring and of the choice of layers."""

from __future__ import annotations

from dataclasses import dataclass

from adept_fast.data.items import STYLES
from adept_fast.settings.validation import COUNT, SEEDS, Range, declare

CHEAP = ("gate", "cumulative", "rank", "fisher", "block_influence")
METHODS = ("masking", *CHEAP)
LOSSES = ("answer", "kl", "all")
MASKED = ("tensor", "head")
GRANULARITIES = ("tensor", "head", "neuron")
PLACEMENTS = ("lowest", "uniform", "lowest_per_band")


@dataclass(frozen=True)
class Score:
    method: str = declare("masking", METHODS, "masking is exact, the others are cheap and no substitute")
    loss: str | None = declare(None, LOSSES, "null measures all three and selects by answer, by kl for a chat model")
    max_items: int | None = declare(None, COUNT, "probe items scored, drawn by hash and seed")
    seed: int = declare(0, SEEDS, "of that draw, of intervals and of a race's order")
    probe_format: str = declare("plain", STYLES, "how instructions are written: end to end, or in Alpaca's or the tokenizer's template")
    regret: float | None = declare(
        None,
        Range(0),
        "0.04: stop when the chosen expand.k layers are at most so many nats per token worse than the best k; "
        "copies are no candidates",
    )
    confidence: float = declare(0.95, Range(0.5, 1, below=True), "of the race's bound")
    sweep_tokens: int | None = declare(
        None, COUNT, "bound on the tokens of one layer call, that is on memory; null: 2048 on a CPU, 16384 on a GPU"
    )
    domain_items: int | None = declare(
        None, COUNT, "documents of the domain (256 tokens of each) to score too, to see where probe and domain disagree"
    )
    compare: tuple[str, ...] = declare((), CHEAP, "to score by too, for their rank correlation: [gate, block_influence]")
    units: str | None = declare(None, MASKED, "mask the parts of layers too: each projection, or groups of heads and of FFN neurons")
    unit_layers: tuple[int, ...] | None = declare(
        None, meaning="mask these layers only: [3, 7]; all layers cost one sweep per part of a layer, printed before it starts"
    )


@dataclass(frozen=True)
class Budget:
    """Shares of full training that copies may take, of its parameters and of its time."""

    parameters: float | None = declare(None, Range(0, 1, above=True))
    time: float | None = declare(None, Range(0, 1, above=True))

    @property
    def shares(self) -> dict[str, float]:
        return {name: share for name, share in vars(self).items() if share is not None}


@dataclass(frozen=True)
class Selection:
    """Which layers are chosen by their scores."""

    k: int = declare(4, COUNT, "how many layers are copied")
    placement: str = declare("lowest", PLACEMENTS, "the lowest scores, evenly spaced, or the lowest of each of k bands of depth")
    budget: Budget | None = declare(
        None, meaning="or as many copies as {parameters: 0.15} or {time: 0.5} of full training allow; time is estimated"
    )
