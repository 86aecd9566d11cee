"""An error names the argument that its reader wrote; a recipe's reader gets the key in its place."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from adept_fast import AdeptCallback, Anchor, InputError, Race
from adept_fast.data.items import Item, tokenize_item
from adept_fast.data.sources import Record, Source
from adept_fast.pipeline.recipe import load, section
from adept_fast.scoring.budget import LayerCosts, check_budget
from adept_fast.scoring.item_losses import require_losses
from adept_fast.scoring.select_layers import check_choice
from adept_fast.settings.validation import prefixed, require, require_path
from adept_fast.tuning.forgetting_meter import Meter
from adept_fast.tuning.tuning_settings import TuningSettings
from adept_fast.tuning.unit_rates import RateRule

ITEMS = [Item((3, 4, 5), (3, 4, 5))]
COSTS = LayerCosts((10, 10), (10, 10), 40, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AdeptCallback([], refresh_steps=0), "refresh_steps must be a whole number of 1 or more, found 0"),
        (lambda: AdeptCallback([], units="layer"), "units must be one of tensor, head, neuron, found 'layer'"),
        (lambda: AdeptCallback([], skip_nonfinite=-1), "skip_nonfinite must be a whole number of 0 or more, found -1"),
        (lambda: RateRule(map="linear"), "map must be one of rank, mean_preserving, paper, found 'linear'"),
        (lambda: RateRule(average=1.0), "average must be a number from 0 to below 1, found 1.0"),
        (lambda: Anchor(ITEMS, weight=-0.5), "weight must be a number from 0 to 1000, found -0.5"),
        (lambda: Anchor(ITEMS, weight=0.5, tokens=0), "tokens must be a whole number of 1 or more, found 0"),
        (lambda: Meter(ITEMS, limit=-0.1), "limit must be a number of 0 or more, found -0.1"),
        (lambda: Meter(ITEMS, action="halt"), "action must be one of stop, cut, found 'halt'"),
        (lambda: Race(k=2, regret=0.1, growth=1).check(7), "growth must be a number above 1, found 1"),
        (lambda: Race(k=7, regret=0.1).check(7), "k must be a whole number from 1 to 6, one below the layers that a race can choose from"),
        (lambda: check_choice(6, 7, "lowest"), "k must be a whole number from 1 to 6, the number of layers to choose from, found 7"),
        (lambda: check_choice(6, 2, "top"), "placement must be one of lowest, uniform, lowest_per_band, found 'top'"),
        (lambda: check_budget({"time": 1.5}, COSTS, [0, 1]), "budget.time must be a number above 0 and at most 1, found 1.5"),
        (lambda: check_budget({"parameters": 0.1}, COSTS, [0, 1]), "budget.parameters=0.1 allows no copy: that of one layer takes 0.25"),
        (lambda: require_losses("answer", ("kl", "best")), "losses[1] must be one of answer, kl, all, found 'best'"),
        (lambda: tokenize_item(Record({"text": "a"}, "x"), None, "vicuna"), "style must be one of plain, "),
        (lambda: Source.of({"path": "a", "weight": -1}), "weight must be a number above 0 and at most 1000, found -1"),
        (lambda: TuningSettings(rate_floor=2.0), "rate_floor must be a number from 0 to 1, found 2.0"),
        (lambda: TuningSettings(training={"adam_beta1": 1.0}), "adam_beta1 must be a number from 0 to below 1, found 1.0"),
    ],
)
def test_a_function_names_the_argument_that_its_caller_wrote(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value).startswith(message) and message.startswith(error.value.arguments[0])


def test_a_path_is_one_or_is_refused_by_the_name_of_its_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/here")
    assert require_path("target", "~/out") == Path("/here/out") and require_path("target", Path("out")) == Path("out")
    for value in (None, 3, [], b"out", ""):
        with pytest.raises(InputError, match="^target must be a path, found "):
            require_path("target", value)
    with pytest.raises(InputError, match="^output_dir: ~nobody_here/out: there is no such user: write the path out$"):
        _ = load(None, ["output_dir=~nobody_here/out"], required=()).folder


def test_what_transformers_calls_otherwise_is_meant_from_python_too() -> None:
    with pytest.raises(InputError, match="^unknown key lr: did you mean learning_rate"):
        TuningSettings(training={"lr": 1e-4})


def test_an_argument_at_fault_gets_its_key_once_and_a_value_like_it_does_not() -> None:
    with pytest.raises(InputError) as error, prefixed("score."):
        require("loss", "loss", str, ("answer", "kl"))
    assert str(error.value) == "score.loss must be one of answer, kl, found 'loss'" and error.value.arguments == ("score.loss",)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # as a process hands it to another


def test_a_stage_names_keys_of_its_table_and_no_other() -> None:
    for raised, said in (
        (InputError("learning_rate=1 times weight_decay=2 is above 1", "learning_rate", "weight_decay"), None),
        (InputError("rank must be a whole number, found 'rank'", "rank"), "tune.lora_rank must be a whole number, found 'rank'"),
        (InputError("seed must be a whole number", "seed"), "seed must be a whole number"),
        (InputError("dtype must be one of float32", "dtype"), "dtype must be one of float32"),
        (InputError("expand.k must be 1", "expand.k"), "expand.k must be 1"),
        (InputError("units.txt: no such file"), "units.txt: no such file"),
    ):
        with pytest.raises(InputError) as error, section("expand"), section("tune", rank="tune.lora_rank"):
            raise raised
        assert str(error.value) == (said or "tune.learning_rate=1 times tune.weight_decay=2 is above 1")
