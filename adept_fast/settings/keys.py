"""The keys of a recipe's tables, declared once: for recipes, for what takes the same values from Python, and for docs/recipe.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adept_fast.data.items import STYLES
from adept_fast.data.sources import Source
from adept_fast.settings.training_arguments import DEFAULTS, checked, known
from adept_fast.settings.validation import COUNT, Range, declare

DTYPES = ("bfloat16", "float16", "float32", "float64")
SEEDS = Range(0, 2**32 - 1)
CHEAP = ("gate", "cumulative", "rank", "fisher", "block_influence")
METHODS = ("masking", *CHEAP)
LOSSES = ("answer", "kl", "all")
MASKED = ("tensor", "head")
PLACEMENTS = ("lowest", "uniform", "lowest_per_band")
PRESERVING = {"zero_output": True, "zero_gate_up": True, "small_random": False, "scaled_source": False}
"""The ways to initialise a copy, and whether the model then computes what it did."""
GRANULARITIES = ("tensor", "head", "neuron")
RATE_MAPS = ("rank", "mean_preserving", "paper")
ACTIONS = ("stop", "cut")


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
        "0.04: race for the expand.k lowest layers, until they lose at most so many nats per token more than the best; "
        "copies are no candidates",
    )
    confidence: float = declare(0.95, Range(0.5, 1, below=True), "of the race's bound")
    sweep_tokens: int | None = declare(
        None, COUNT, "bound on the tokens of one layer call, that is on memory; null: 2048 on a CPU, 16384 on a GPU"
    )
    domain_items: int | None = declare(
        None, COUNT, "documents of the domain (256 tokens of each) scored beside the probe: where do the two conflict?"
    )
    compare: tuple[str, ...] = declare((), CHEAP, "to score by too, for their rank correlation: [gate, block_influence]")
    units: str | None = declare(None, MASKED, "mask the parts of layers too: each projection, or groups of heads and of FFN neurons")
    unit_layers: tuple[int, ...] | None = declare(
        None, meaning="of these layers only: [3, 7]; all take as many layer sweeps as a layer has parts; said before it starts"
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
class Expand:
    k: int = declare(4, COUNT, "how many layers are copied")
    placement: str = declare("lowest", PLACEMENTS, "the lowest scores, evenly spaced, or the lowest of each of k bands of depth")
    layers: tuple[int, ...] | None = declare(None, meaning="or exactly these: [3, 7]")
    budget: Budget | None = declare(
        None, meaning="or as many as {parameters: 0.15} or {time: 0.5} allow, shares of full training of this model; time is modelled"
    )
    initialisation: str = declare("zero_output", PRESERVING, "the last two, for research, change what the model computes")


@dataclass(frozen=True)
class Tuning:
    """Keys of `tune` that steer a run, whatever it reads."""

    units: str = declare("tensor", GRANULARITIES, "what has a learning rate of its own")
    rate_map: str = declare("rank", RATE_MAPS, "from importances to rates")
    rate_floor: float = declare(0.0, Range(0, 1), "the lowest multiplier; the gate of a post-norm copy has 1 at least")
    rate_average: float = declare(
        0.0, Range(0, 1, below=True), "share of the earlier refreshes in a moving average of the normalised importances"
    )
    rate_conflict: bool = declare(False, meaning="slow units whose momentum opposes the probe's gradient, by 1 - max(0, -cos)")
    refresh_steps: int = declare(500, COUNT, "unit rates are measured again, held-out losses logged, a checkpoint written")
    block_size: int = declare(1024, Range(2), "tokens of a packed block")
    skip_nonfinite: int = declare(0, Range(0), "so many steps of a loss or gradient that is not finite are skipped; one more stops the run")
    anchor_weight: float | None = declare(
        None, Range(0, 1000), "0.5: hold the model to its base without replay data, by that weight of KL(base || model), ..."
    )
    anchor_every: int = declare(4, COUNT, "... in the loss of every fourth step, ...")
    anchor_tokens: int = declare(256, COUNT, "... on so many tokens of the probe items that steer unit rates")
    general_limit: float | None = declare(
        None, Range(0), "0.05: once general loss on probe items held back for it has risen by so many nats per token, ..."
    )
    general_action: str = declare("stop", ACTIONS, "... stop there, or halve all rates at each refresh that finds it above")
    extend: bool = declare(
        False, meaning="go on with another number of steps where the schedule would have given the steps that are done other rates"
    )
    training: Mapping[str, Any] = field(
        default_factory=DEFAULTS.copy,
        metadata={"known": known, "checked": checked, "meaning": "these five and any other name of transformers' TrainingArguments"},
    )


@dataclass(frozen=True)
class Tune(Tuning):
    max_items: int = declare(64, COUNT, "probe items and held-out documents measured at each refresh")
    replay: Source | None = declare(
        None, meaning="a general corpus mixed into training: file, dataset name or {path, ..., weight or share}"
    )
    streaming: bool | None = declare(
        None, meaning="read documents while training; null: where they exceed 1 GiB on disk, or a source has a share"
    )
    shuffle_window: int = declare(10_000, COUNT, "documents of a source that a stream shuffles at a time")
    lora_rank: int = declare(16, COUNT, "of method: lora")


@dataclass(frozen=True)
class Eval:
    general: Source | None = declare(None, meaning="file with questions or texts; null: the part of the probe that only reports")
    domain: Source | None = declare(None, meaning="null: the held-out documents")
    max_items: int | None = declare(None, COUNT, "of each")
    general_limit: float | None = declare(
        None, Range(0), "nats per token that general loss may rise: eval then finds the largest share alpha of the copies within it"
    )
