"""The recipe: its keys, their defaults, and what does not go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from adept_fast.data.items import STYLES
from adept_fast.data.sources import GENERAL, Source
from adept_fast.errors import InputError
from adept_fast.methods import METHODS
from adept_fast.overrides import KINDS, Count, number, numbers, settings, unknown

SET_ELSEWHERE = {"output_dir": "output_dir", "seed": "seed", "data_seed": "seed", "resume_from_checkpoint": "output_dir"}
WHOLE = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "save_steps", "eval_steps")
LEAST = {
    "save_total_limit": 1,
    **dict.fromkeys(("logging_steps", "max_grad_norm", "dataloader_num_workers", "neftune_noise_alpha", "label_smoothing_factor"), 0),
}
TRAINING = {
    "learning_rate": 2.0e-4,
    "num_train_epochs": 1,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 4,
}


@dataclass(frozen=True)
class Score:
    """max_items: probe items scored, drawn by hash and seed. loss null: all are measured, and answer decides, or kl for a chat model.
    regret: race for the expand.k lowest layers instead of measuring all layers on all items, to that many nats per token at `confidence`.
    sweep_tokens: bound on the tokens of one layer call, that is on memory. domain_items: training documents of the domain that are scored
    beside the probe. compare: cheap methods to score by too. units: mask the parts of layers too, by "tensor" or "head", of unit_layers
    (null: all)."""

    method: str = "masking"
    loss: str | None = None
    max_items: Count | None = None
    seed: int = 0
    probe_format: str = "plain"
    regret: float | None = None
    confidence: float = 0.95
    sweep_tokens: Count | None = None
    domain_items: Count | None = None
    compare: tuple[str, ...] = ()
    units: str | None = None
    unit_layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Budget:
    """Shares of full training that copies may take, of its parameters and of its time."""

    parameters: float | None = None
    time: float | None = None

    @property
    def shares(self) -> dict[str, float]:
        return {name: share for name, share in vars(self).items() if share is not None}


@dataclass(frozen=True)
class Expand:
    """k layers by placement, or as many as `budget` allows, or exactly `layers`."""

    k: Count = 4
    placement: str = "lowest"
    layers: tuple[int, ...] | None = None
    budget: Budget | None = None
    initialisation: str = "zero_output"


@dataclass(frozen=True)
class Tune:
    """max_items: probe items and held-out documents measured at each refresh. replay: a general corpus mixed into training.
    lora_rank: of method=lora.
    anchor_weight: of KL(base || model) on anchor_tokens steering tokens, added to the loss of every anchor_every-th step.
    streaming: read documents while training; null: where they exceed a gibibyte on disk, or a source has a share of the tokens.
    shuffle_window: documents of a source that a stream shuffles at a time.
    general_limit: rise of general loss, nats per token of held-back probe items, at which training stops or rates are cut.
    training: any TrainingArguments by name, written beside the others (tune.learning_rate=...)."""

    units: str = "tensor"
    rate_map: str = "rank"
    rate_floor: float = 0.0
    rate_average: float = 0.0
    rate_conflict: bool = False
    refresh_steps: Count = 500
    block_size: Count = 1024
    max_items: Count = 64
    replay: Source | None = None
    anchor_weight: float | None = None
    anchor_every: Count = 4
    anchor_tokens: Count = 256
    streaming: bool | None = None
    shuffle_window: Count = 10_000
    general_limit: float | None = None
    general_action: str = "stop"
    lora_rank: Count = 16
    training: Mapping[str, Any] = field(default_factory=TRAINING.copy, metadata={"others": lambda *entry: _training_arguments(*entry)})


@dataclass(frozen=True)
class Eval:
    """general null: the reporting part of the probe; domain null: the held-out documents. general_limit: nats per token that general loss
    may rise, to which the largest share of the tuned copies is sought."""

    general: Source | None = None
    domain: Source | None = None
    max_items: Count | None = None
    general_limit: float | None = None


@dataclass(frozen=True)
class Recipe:
    """What a run is made from. Only model_name_or_path and domain have no default. method: see methods.py."""

    model_name_or_path: str = ""
    domain: tuple[Source, ...] = ()
    output_dir: str = "adept_out"
    method: str = "adept"
    probe: Source = field(default_factory=lambda: Source(GENERAL))
    revision: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    score: Score = field(default_factory=Score)
    expand: Expand = field(default_factory=Expand)
    tune: Tune = field(default_factory=Tune)
    eval: Eval = field(default_factory=Eval)

    @property
    def folder(self) -> Path:
        return Path(self.output_dir).expanduser()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def load(path: str | None, overrides: Sequence[str] = (), required: Iterable[str] = ("model_name_or_path", "domain")) -> Recipe:
    """Read a YAML recipe (or none), apply "key.sub=value" overrides, check every key and value. Raises InputError."""
    import yaml

    content: dict[str, Any] = {}
    if path is not None:
        try:
            content = yaml.load(Path(path).read_text(encoding="utf-8"), _each_key_once()) or {}
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path}: no such recipe (a setting is written key=value)") from None
        except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
            raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
        if not isinstance(content, dict):
            raise InputError(f"{path}: expected keys and values, found {type(content).__name__}")
    recipe = settings(Recipe, overrides, content)
    if recipe.score.probe_format not in STYLES:
        raise InputError(f"score.probe_format must be one of {', '.join(STYLES)}, found {recipe.score.probe_format!r}")
    check_method(recipe)
    if not 0 <= recipe.seed < 2**32:
        raise InputError(f"seed must be from 0 to {2**32 - 1}, found {recipe.seed}")
    for key in required:
        if not getattr(recipe, key):
            raise InputError(f"{key} is missing: give it as {key}=... or in the recipe")
    return recipe


def _each_key_once() -> Any:
    """A safe loader for tables without a key that stands there twice, of which YAML would take the last without a word."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            for key, _ in node.value:
                if keys.count(key.value) > 1:
                    raise yaml.YAMLError(f"{key.value} stands there twice, first in line {key.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    return Loader


def check_method(recipe: Recipe) -> None:
    """Raise InputError for an unknown method, or settings that it has no use for."""
    if recipe.method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, found {recipe.method!r}")
    method = METHODS[recipe.method]
    if method.uniform and recipe.expand.layers is not None:
        raise InputError(f"method={recipe.method} spaces the copies evenly: leave expand.layers out")
    if recipe.method == "replay" and recipe.tune.replay is None:
        raise InputError("method=replay needs a corpus to replay: set tune.replay, with a share or weight")
    if recipe.expand.budget is not None and (method.uniform or recipe.expand.layers is not None):
        given = f"method={recipe.method} takes expand.k" if method.uniform else "expand.layers says which"
        raise InputError(f"expand.budget chooses how many layers to copy, but {given}: leave one out")
    for key in ("anchor_weight", "general_limit"):
        if not method.copies and getattr(recipe.tune, key) is not None:
            raise InputError(f"method={recipe.method} keeps no base inside the model to measure against: leave tune.{key} out")


def _training_arguments(key: str, value: Any) -> dict[str, Any]:
    """A TrainingArguments name under tune, or the whole table as a resolved recipe has it."""
    from transformers import TrainingArguments

    if key == "training" and isinstance(value, Mapping):
        return {name: setting for inner, entry in value.items() for name, setting in _training_arguments(inner, entry).items()}
    known = {entry.name: entry for entry in fields(TrainingArguments) if entry.init}
    if key in SET_ELSEWHERE:
        raise InputError(f"tune.{key} is set by the recipe's {SET_ELSEWHERE[key]}")
    if key not in known:
        raise unknown(key, [*known, *(entry.name for entry in fields(Tune) if entry.name != "training")], "tune.")
    hint = get_type_hints(TrainingArguments)[key]
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    kind = kinds[0] if len(kinds) == 1 and kinds[0] in (bool, int, float) else None
    if kind in (int, float) and isinstance(value, (str, float)):
        value = number(value, f"tune.{key}")
    if key in WHOLE and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"tune.{key} must be a whole number of 1 or more, found {value!r}")
    fits = isinstance(value, bool) == (kind is bool) and isinstance(value, (kind or object, int))
    if kind and not fits and not (value is None and NoneType in get_args(hint)):
        raise InputError(f"tune.{key} must be {KINDS[kind]}, found {value!r}")
    if key in LEAST and value is not None and value < LEAST[key]:
        raise InputError(f"tune.{key} must be {LEAST[key]} or more, found {value!r}")
    if key == "optim_args" and value is not None:
        raise InputError("tune.optim_args: unit-wise rates need adept_fast.AdamW, which takes tune.adam_beta1 and its like: leave it out")
    if key == "num_train_epochs" and value <= 0:
        raise InputError(f"tune.{key} must be above 0, found {value!r}")
    if value is False and key.endswith("_strategy"):
        value = "no"  # which YAML 1.1 reads as false
    return {key: numbers(value) if isinstance(value, Mapping) else value}
