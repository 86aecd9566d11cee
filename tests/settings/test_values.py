"""What is typed, and what it is read as: the same behind key= and in a recipe, by what the key takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adept_fast.data.sources import Source
from adept_fast.errors import InputError
from adept_fast.pipeline.recipe import load
from adept_fast.settings.key_value import overridden

NEEDED = ["model_name_or_path=M", "domain=d.txt"]


TEXTS = [
    *("a #2.jsonl", "#2", "my data.txt", "010", "1e-4", "0x10", "1:30", "2024-01-01", "yes", "no", "on", "off", "true", "~", "~/out"),
    *("*.md", "&a", "!b", "%c", "@d", "`e", "a: b", "a:b", "C:\\new\\x", "s3://a/b", "- a", "? a", "a, b", "| a", "> a", "None", "NaN"),
    *(".inf", "1_0"),
    *("größe", "日本.txt", "a'b", 'a"b', "[a", "a]", "{a}b", "a=b", "=", "<<", "...", "---", "a\u00a0b", "$HOME", "-"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_what_stands_there(text: str) -> None:
    recipe = load(None, ["model_name_or_path=M", f"output_dir={text}", f"domain={text}", f"revision=  {text}\t"])
    assert recipe.output_dir == recipe.revision == text and recipe.domain == (Source(text),)


@pytest.mark.parametrize("text", ["010", "1e-4", "1:30", "2024-01-01", "yes", "no", "on", "true", "1_0", "0x10", ".inf", "~/out"])
def test_text_in_a_recipe_is_what_stands_there(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model_name_or_path: M\ndomain: {text}  # a comment\noutput_dir: {text}\nprobe: [{text}]\n")
    with pytest.raises(InputError, match="probe: a source is a path"):
        load(str(tmp_path / "recipe.yaml"))
    recipe = load(str(tmp_path / "recipe.yaml"), ["probe=general"])
    assert recipe.output_dir == text and recipe.domain == (Source(text),)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("output_dir=' a #'", " a #"),
        ('output_dir="a\\tb"', None),
        ('output_dir="[a]"', "[a]"),
        ("revision=null", None),
        ("revision=", None),
        ("revision='null'", "null"),
        ("seed=010", 10),
        ("seed=1_000", 1000),
        ("seed=+7", 7),
        ("score.max_items=~", None),
        ("score.regret=1e-4", 1e-4),
        ("score.regret=4.e-2", 0.04),
        ("score.regret=.5", 0.5),
        ("score.regret=1_0", 10),
        ("tune.rate_conflict=On", True),
        ("tune.rate_conflict=NO", False),
        ("tune.learning_rate=5E-5", 5e-5),
        ("tune.max_steps=007", 7),
        ("tune.save_strategy=no", "no"),
        ("tune.bf16=yes", True),
        ("tune.tf32=null", None),
        ("tune.run_name=on", "on"),
        ("tune.lr_scheduler_type=linear", "linear"),
        ("tune.lr_scheduler_kwargs={a: 1e-5, b: 010, c: a#b, d: no}", {"a": 1e-5, "b": 10, "c": "a#b", "d": False}),
        ("expand.layers=3", (3,)),
        ("expand.layers=[03, 010]", (3, 10)),
        ("expand.layers=[]", ()),
        ("score.compare=gate", ("gate",)),
        ("domain=[a #1.txt, '#2.txt', {path: 'c, d', weight: 1e-1}]", (Source("a #1.txt"), Source("#2.txt"), Source("c, d", weight=0.1))),
        ("domain={path: 010.txt, split: on, column: no, weight: 2}", (Source("010.txt", split="on", column="no", weight=2),)),
        ("tune.replay={path: a #2, share: 5e-1}", Source("a #2", share=0.5)),
    ],
)
def test_values_are_read_by_what_their_key_takes(setting: str, value: Any) -> None:
    key = setting.partition("=")[0]
    if setting.startswith('output_dir="a\\t'):
        with pytest.raises(InputError, match="output_dir must be text of one line"):
            load(None, [*NEEDED, setting])
        return
    recipe = load(None, [*NEEDED, setting])
    found = recipe
    for part in key.split("."):
        found = getattr(found, part) if hasattr(found, part) else found.training[part]
    assert found == value and type(found) is type(value)
    json.dumps(recipe.as_dict())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=1:30", "seed must be a whole number from 0 to 4294967295, found '1:30'"),
        ("seed=0x10", "found '0x10'"),
        ("seed=1.0", "found '1.0'"),
        ("seed=2024-01-01", "found '2024-01-01'"),
        ("seed=١", "seed must be a whole number"),
        ("tune.learning_rate=1,5", "found '1,5'"),
        ("tune.learning_rate=nan", "found nan"),
        ("tune.learning_rate=1e999", "found inf"),
        ("tune.rate_conflict=1", "tune.rate_conflict must be true or false, found '1'"),
        ("expand.layers=3,7", r"expand.layers=3,7: a list is written in brackets: expand.layers=\[3,7\]"),
        ("expand.layers=[3, 7", "found '\\[3, 7'"),
        ("output_dir=[a]", r"output_dir must be text of one line, found \['a'\]"),
        ("domain=[a: b: c]", "domain: the value is not valid YAML"),
        ("domain=[*a]", "domain: the value is not valid YAML .found undefined alias"),
        ("domain=[&a [*a]]", "contains itself"),
        ("tune.lr_scheduler_kwargs={1: a, 1: b}", "key 1 twice"),
        ("tune.lr_scheduler_kwargs={[a]: b}", "not valid YAML"),
        ("domain='a' b'", "not valid YAML"),
        ("expand.layers=" + "[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("expand.layers=" + "[" * 2000 + "]" * 2000, "not valid YAML"),
    ],
)
def test_values_that_are_none_name_the_key(setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        load(None, [*NEEDED, setting])
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


LAUGHS = "a: &a [x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "expected keys and values, found ['a', 'b']"),
        ("text\n", "expected keys and values, found 'text'"),
        ("1: a\n", "unknown key 1"),
        ("null: a\n", "unknown key null"),
        ("? [a, b]\n: c\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "key seed twice, first in line 1"),
        ("tune: {lr: 1e-4}\n", "unknown key tune.lr: did you mean tune.learning_rate"),
        ("tune.learning_rate: 1e-4\n", "unknown key tune.learning_rate: in a recipe write it as a table: tune: {learning_rate: ...}"),
        ("seed: " + "9" * 5000, "seed must be a whole number"),
        (LAUGHS, "more than 100000 entries"),
        ("tune: &t\n  a: *t\n", "contains itself"),
        ("a: " + "[" * 100_000, "not valid YAML"),
        ("seed: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("seed: .nan\n", "seed must be a whole number from 0 to 4294967295, found '.nan'"),
        ("seed: \x00\n", "not valid YAML"),
        ("a: b\n---\nc: d\n", "not valid YAML"),
    ],
)
def test_recipes_that_are_none_name_the_file_or_the_key(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(InputError) as refused:
        load(str(tmp_path / "recipe.yaml"), NEEDED)
    assert message in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_aliases_and_merged_tables_are_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("probe: &p {path: a.txt, column: body}\neval:\n  general: *p\n  domain: {<<: *p, path: b.txt}\n")
    recipe = load(str(tmp_path / "recipe.yaml"), NEEDED)
    assert recipe.probe == recipe.eval.general == Source("a.txt", column="body") and recipe.eval.domain == Source("b.txt", column="body")


def test_a_key_given_twice_counts_last_and_is_told() -> None:
    given = ["seed=1", "domain=a", "seed=1", "domain=b=c", "domain=d"]
    assert overridden(given) == ["domain=a", "domain=b=c"]
    assert load(None, ["model_name_or_path=M", *given]).domain == (Source("d"),)
