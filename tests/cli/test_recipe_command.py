"""adept-fast recipe: what it prints is a recipe as it stands, with what was given filled in."""

from __future__ import annotations

from pathlib import Path

import pytest

from adept_fast.cli.main import main
from adept_fast.cli.recipe import USUAL
from adept_fast.errors import InputError
from adept_fast.pipeline.recipe import PLACEHOLDERS, Recipe, load
from adept_fast.settings.declared_keys import declared_keys

NEEDED = ("model_name_or_path=M", "domain=my.txt")


def printed(capsys: pytest.CaptureFixture, *words: str) -> str:
    capsys.readouterr()
    assert main(["recipe", *words]) == 0
    return capsys.readouterr().out


def reads(tmp_path: Path, text: str) -> Recipe:
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    return load(str(tmp_path / "my.yaml"))


@pytest.mark.parametrize("words", [(), ("all=true",)])
def test_the_starter_is_a_recipe_once_its_placeholders_are_replaced(
    capsys: pytest.CaptureFixture, tmp_path: Path, words: tuple[str, ...]
) -> None:
    text = printed(capsys, *words)
    assert max(map(len, text.splitlines())) <= 110
    for key, (placeholder, value) in zip(PLACEHOLDERS, zip(PLACEHOLDERS.values(), ("M", "my.txt"), strict=True), strict=True):
        with pytest.raises(InputError, match=f"^{key}: {placeholder} still stands in the recipe: put what it says in its place"):
            reads(tmp_path, text)
        assert text.count(placeholder) == 1
        text = text.replace(placeholder, value)
    assert reads(tmp_path, text) == load(None, NEEDED)


def test_every_key_is_printed_on_request_and_the_usual_ones_else(capsys: pytest.CaptureFixture) -> None:
    names = {key.name for key in declared_keys(Recipe)}
    assert {*USUAL} < names
    usual, everything = printed(capsys), printed(capsys, "all=true")
    for name in names:
        line = f"{name.rpartition('.')[2]}: "
        assert line in everything and (line in usual or name not in USUAL), name
    assert len(usual.splitlines()) < 40 and "lora_rank" not in usual


def test_what_is_given_is_filled_in_and_survives(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    given = [
        "model_name_or_path=org/model",
        "domain=[{path: 'a b.jsonl', column: body, weight: 2}, \"[odd], name: #1.txt\", yes, '1e3']",
        "output_dir='- out: #2'",
        "tune.replay={path: web, share: 0.1}",
        "expand.budget={parameters: 0.15}",
        "score.unit_layers=[3, 7]",
        "score.units=head",
        "score.compare=[gate, rank]",
        "tune.max_steps=7",
        "tune.tf32=true",
        "tune.lr_scheduler_kwargs={num_cycles: 2, name: 'true'}",
        "tune.run_name='null'",
        "tune.adam_epsilon=1e-9",
    ]
    text = printed(capsys, *given)
    assert reads(tmp_path, text) == load(None, given)
    assert reads(tmp_path, printed(capsys, "all=true", *given)) == load(None, given)
    assert "\n  max_steps: 7 " in text and "\n  tf32: true" in text
    assert text == printed(capsys, str(tmp_path / "my.yaml")), "a recipe as input is printed as it is"


def test_what_is_wrong_is_refused_as_elsewhere(capsys: pytest.CaptureFixture) -> None:
    for word, answer in (("lr=1", "unknown key lr: did you mean tune.learning_rate?"), ("all=maybe", "all must be true or false"),
                         ("expand.k=0", "expand.k must be a whole number of 1 or more")):  # fmt: skip
        assert main(["recipe", word]) == 2
        said = capsys.readouterr()
        assert answer in said.err and not said.out
