"""Recipes: defaults, overrides, and unknown keys that name the nearest one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from adept_fast.data.sources import Source
from adept_fast.errors import InputError
from adept_fast.pipeline.recipe import Recipe, load
from adept_fast.scoring.settings import Budget
from adept_fast.settings.training_arguments import DEFAULTS, known
from adept_fast.tuning.tuning_settings import TuningSettings, arguments, check_settings

NEEDED = ["model_name_or_path=M", "domain=d.txt"]


def test_defaults_need_no_yaml() -> None:
    recipe = load(None, NEEDED)
    assert recipe.domain == (Source("d.txt"),) and recipe.probe == Source("general")
    assert (recipe.expand.k, recipe.tune.refresh_steps, recipe.tune.training) == (4, 500, DEFAULTS)


def test_yaml_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model_name_or_path: M\ndomain:\n- {path: a.jsonl, weight: 2, column: body}\n- b.txt\ntune: {units: head, weight_decay: 0.1}\n"
    )
    recipe = load(str(path), ["tune.max_steps=7", "tune.learning_rate=2e-5", "expand.layers=[3, 1]", "score.loss=kl", "score.regret=4e-2"])
    assert recipe.domain == (Source("a.jsonl", column="body", weight=2), Source("b.txt"))
    assert recipe.tune.units == "head" and recipe.tune.training == {**DEFAULTS, "weight_decay": 0.1, "max_steps": 7, "learning_rate": 2e-5}
    assert recipe.expand.layers == (3, 1) and (recipe.score.loss, recipe.score.regret) == ("kl", 0.04)


def test_a_resolved_recipe_reads_back(tmp_path: Path) -> None:
    import yaml

    recipe = load(None, [*NEEDED, "tune.max_steps=3", "eval.general=g.jsonl"])
    path = tmp_path / "again.yaml"
    content = recipe.as_dict()
    content["domain"], content["expand"]["layers"] = list(content["domain"]), None
    path.write_text(yaml.safe_dump(content))
    assert load(str(path)) == recipe
    assert load(str(path), ["tune.max_steps=9"]).tune.training == {**recipe.tune.training, "max_steps": 9}


def test_text_stays_text_and_numbers_are_read() -> None:
    recipe = load(None, [*NEEDED, "output_dir=010", "revision=0123456", "tune.warmup_steps=3e-2"])
    assert (recipe.output_dir, recipe.revision, recipe.tune.training["warmup_steps"]) == ("010", "0123456", 0.03)
    recipe = load(None, [*NEEDED, "tune.lr_scheduler_kwargs={min_lr: 1e-5, power: 2}", "domain={path: d.txt, share: 5e-1}"])
    assert recipe.tune.training["lr_scheduler_kwargs"] == {"min_lr": 1e-5, "power": 2} and recipe.domain[0].share == 0.5


def test_no_steps_are_steps_that_are_not_set(tmp_path: Path) -> None:
    recipe = load(None, [*NEEDED, "tune.max_steps=3", "tune.max_steps=-1"])
    assert recipe.tune.training["max_steps"] == -1
    given = TuningSettings(training=recipe.tune.training)
    check_settings(given)
    assert arguments(given, tmp_path).max_steps == -1
    for wrong in ("-2", "0", "true", "-1.0"):
        with pytest.raises(InputError, match="^tune.max_steps must be a whole number of 1 or more, found"):
            load(None, [*NEEDED, f"tune.max_steps={wrong}"])
    with pytest.raises(InputError, match="gradient_accumulation_steps must be a whole number of 1 or more, found True"):
        TuningSettings(training={"gradient_accumulation_steps": True})  # which equals the default


def test_what_yaml_reads_otherwise_than_transformers() -> None:
    training = load(None, [*NEEDED, "tune.save_strategy=no", "tune.eval_strategy=no", "tune.bf16=yes", "tune.tf32=null"]).tune.training
    assert [training[key] for key in ("save_strategy", "eval_strategy", "bf16", "tf32")] == ["no", "no", True, None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["domian=x"], "unknown key domian: did you mean domain"),
        (["score.max_item=3"], "unknown key score.max_item: did you mean score.max_items"),
        (["tune.learning_rates=1"], "unknown key tune.learning_rates: did you mean tune.learning_rate"),
        (["tune.refresh=1"], "did you mean tune.refresh_steps"),
        (["tune.output_dir=x"], "set by the recipe's output_dir"),
        (["expand.k=two"], "expand.k must be a whole number of 1 or more, found 'two'"),
        (["expand.k=0"], "expand.k must be a whole number of 1 or more, found 0"),
        (["score.regret=low"], "score.regret must be a number"),
        (["score.max_items=true"], "must be a whole number"),
        (["score=3"], "score must be a table"),
        (["domain={paht: x}"], "domain"),
        (["score.max_items"], "expected key=value"),
        (["tune.learning_rate=fast"], "tune.learning_rate must be a number"),
        (["tune.gradient_checkpointing=ture"], "tune.gradient_checkpointing must be true or false, found 'ture'"),
        (["tune.bf16=None"], "tune.bf16 must be true or false"),
        (["tune.learning_rate=true"], "tune.learning_rate must be a number from 0 to 1, found 'true'"),
        (["tune.weight_decay=null"], "tune.weight_decay must be a number of 0 or more, found None"),
        (["tune.save_total_limit=1.5"], "tune.save_total_limit must be a whole number"),
        (["tune.num_train_epochs=nan"], "tune.num_train_epochs must be a number above 0 and at most 1000000, found nan"),
        (["tune.num_train_epochs=0"], "tune.num_train_epochs must be a number above 0 and at most 1000000, found 0"),
        (["tune.anchor_weight=.inf"], "tune.anchor_weight must be a number from 0 to 1000, found inf"),
        (["domain="], r"^domain is empty: give it as domain=\.\.\.$"),
        (["output_dir=null"], r"^output_dir is empty: give it as output_dir=\.\.\.$"),
        (["expand.placement="], r"^expand.placement is empty: give it as expand.placement=\.\.\.$"),
        (["domian=x", "tune={a: 1, lr: 2}"], "^unknown key domian: did .*; unknown key tune.a: adept.*; unknown key tune.lr: did"),
        ([f"a{number}=1" for number in range(9)], "^(unknown key a[0-4]: [^;]*; ){5}and 4 more$"),
        (["domain={path: null}"], r"domain\[0\].path must be text of one line, found None"),
        (["domain={path: a, weight: 1e12}"], r"domain\[0\].weight must be a number above 0 and at most 1000"),
        (["domain={path: a, path: b}"], "domain: the value is not valid YAML .key path twice"),
        (["domain=d.txt", "domain.weight=2"], "domain.weight: domain is not a table of settings but 'd.txt'"),
        (["seed=2001-13-01"], "seed must be a whole number from 0 to 4294967295, found '2001-13-01'"),
        (["seed=1" + "0" * 5000], "seed must be a whole number from 0 to 4294967295, found '1000"),
        (["tune.a=1"], "unknown key tune.a: adept-fast recipe all=true lists all"),
        (["score.compare={a: 1}"], r"score.compare\[0\] must be one of gate, .*, found {'a': 1}"),
        (["score.compare=[1, [2]]"], r"score.compare\[0\] must be one of gate, "),
        (["tune.optim=sgd"], "tune.optim must be one of adamw_torch, adamw_torch_fused, found 'sgd'"),
        (["tune.lr_scheduler_type={a: 1}"], "tune.lr_scheduler_type must be one of linear, cosine, "),
        (["tune.lr_scheduler_kwargs=[a]"], r"tune.lr_scheduler_kwargs must be a table of settings, found \['a'\]"),
        (["tune.report_to=[1]"], r"tune.report_to must be text of one line or a list, found \[1\]"),
        (["tune.accelerator_config=[1]"], r"tune.accelerator_config must be a table of settings or text of one line, found \[1\]"),
        (["tune.learning_rate=no"], "tune.learning_rate must be a number from 0 to 1, found 'no'"),
        (["tune.hub_token=abc"], "tune.hub_token: checkpoints have only the copies"),
    ],
)
def test_bad_settings_name_the_key(settings: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(None, [*NEEDED, *settings])


@pytest.mark.slow
def test_odd_values_are_taken_or_refused_in_one_line_that_names_the_key() -> None:
    recipe = load(None, NEEDED)
    keys = [entry.name for entry in fields(Recipe)]
    tables = {"expand.budget": Budget, "probe": Source, **{key: getattr(recipe, key) for key in ("score", "expand", "tune", "eval")}}
    for key, table in tables.items():
        keys += [f"{key}.{entry.name}" for entry in fields(table) if entry.name != "training"]
    keys += [f"tune.{name}" for name in known()]
    assert len(keys) > 170
    for key in keys:
        for value in ("{a: 1}", "[1, [2]]", "1e400", ".nan", '"\\0"', "x" * 5000, "-1"):
            try:
                load(None, [*NEEDED, f"{key}={value}"])
            except InputError as error:
                assert key.rpartition(".")[2] in str(error) and "\n" not in str(error) and len(str(error)) < 500, (key, value)


def test_what_a_method_does_not_use_is_said() -> None:
    assert load(None, [*NEEDED, "method=full", "expand.k=2"]).unused == "warning: method=full copies no layers: expand.k has no effect"
    assert load(None, [*NEEDED, "method=full", "expand.k=4"]).unused is load(None, [*NEEDED, "expand.k=2"]).unused is None


def test_missing_keys_and_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="domain is missing"):
        load(None, NEEDED[:1])
    (tmp_path / "bad.yaml").write_text("a: [1")
    for path in ("none.yaml", "bad.yaml/x"):
        with pytest.raises(InputError, match="no such recipe"):
            load(str(tmp_path / path))
    with pytest.raises(InputError, match="not valid YAML"):
        load(str(tmp_path / "bad.yaml"))
    (tmp_path / "twice.yaml").write_text("domain:\n- {path: a}\ntune: {k: 1}\nexpand:\n  k: 2\ntune:\n  block_size: 3\n")
    with pytest.raises(InputError, match="twice.yaml: not valid YAML .key tune twice, first in line 3"):
        load(str(tmp_path / "twice.yaml"))


def test_the_names_that_a_key_may_have_are_those_that_there_are() -> None:
    from adept_fast.tuning.settings import RATE_MAPS
    from adept_fast.tuning.unit_rates import MAPS

    assert RATE_MAPS == tuple(MAPS)


@pytest.mark.parametrize(
    "settings",
    [
        ["score.regret=0.1", "score.method=gate"],
        ["score.regret=0.1", "expand.placement=lowest_per_band"],
        ["score.regret=0.1", "expand.budget={time: 0.5}"],
        ["score.loss=kl", "score.method=fisher"],
        ["score.unit_layers=[1]"],
        ["expand.budget={}"],
    ],
)
def test_settings_that_do_not_go_together_name_the_key(settings: list[str]) -> None:
    with pytest.raises(InputError, match=settings[0].partition("=")[0]):
        load(None, [*NEEDED, *settings])
    assert all(load(None, [*NEEDED, *settings[at : at + 1]]) for at in range(len(settings)) if len(settings) > 1)


def test_what_takes_the_same_values_from_python_refuses_the_same() -> None:
    from adept_fast import Anchor, Race
    from adept_fast.tuning.tuning_settings import TuningSettings

    for given in ({"refresh_steps": 0}, {"units": "layer"}, {"rate_average": 1.0}, {"training": {"weight_decay": -1}}, {"seed": -1}):
        with pytest.raises(InputError, match=f"^{'weight_decay' if 'training' in given else next(iter(given))} must be"):
            TuningSettings(**given)
    for refused in (lambda: Anchor([], weight=None), lambda: Race(regret=None).check(9), lambda: Source.of({"path": "a", "weight": True})):
        with pytest.raises(InputError, match="must be a number"):
            refused()
