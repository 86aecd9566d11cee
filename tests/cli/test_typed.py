"""What a newcomer types: the wrong subcommand, options, settings in another spelling; each is answered in one line with what to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from adept_fast.cli.commands import COMMANDS
from adept_fast.cli.main import main
from adept_fast.cli.typed import OTHER_NAMES


def refused(capsys: pytest.CaptureFixture, typed: str) -> str:
    capsys.readouterr()
    assert main(typed.split()) == 2
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1 and said.err.startswith("adept-fast: "), said
    return said.err.removeprefix("adept-fast: ").rstrip()


ACTIONS = " (copies takes remove, extract, apply, merge, dial)"
NO_RECIPE = ": no such recipe; a setting is written key=value (in quotes if it has spaces), such as model_name_or_path="
LISTED = " (adept-fast --help lists them)"
WITHOUT_DASHES, JOINED = ": settings are written key=value, without dashes: ", ": settings are written key=value, without spaces: "


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("tun", "unknown subcommand 'tun': did you mean tune?" + LISTED),
        ("train my.yaml", "unknown subcommand 'train': did you mean tune?" + LISTED),
        ("Evaluate", "unknown subcommand 'Evaluate': did you mean eval?" + LISTED),
        ("merge a=x b=y", "unknown subcommand 'merge': did you mean copies merge?" + LISTED),
        ("xyzzy", "unknown subcommand 'xyzzy'" + LISTED),
        ("help tun", "unknown subcommand 'tun': did you mean tune?" + LISTED),
        ("domain=my.txt", "a subcommand comes first, such as adept-fast run domain=my.txt" + LISTED),
        ("my.yaml", "a subcommand comes first, such as adept-fast run my.yaml" + LISTED),
        ("copies", "copies: which action?" + ACTIONS),
        ("copies romove source=a", "copies: unknown action 'romove': did you mean remove?" + ACTIONS),
        ("tune --lr 1e-4", "--lr" + WITHOUT_DASHES + "tune.learning_rate=1e-4"),
        ("tune --lr=1e-4", "--lr=1e-4" + WITHOUT_DASHES + "tune.learning_rate=1e-4"),
        ("tune --num-train-epochs 3", "--num-train-epochs" + WITHOUT_DASHES + "tune.num_train_epochs=3"),
        ("run --model M --domain my.txt", "--model" + WITHOUT_DASHES + "model_name_or_path=M"),
        ("run --model_name_or_path my.txt", "--model_name_or_path" + WITHOUT_DASHES + "model_name_or_path=my.txt"),
        ("run -o out", "unknown option -o: settings are written key=value (adept-fast run --help lists them)"),
        ("run --bf16 my.yaml", "--bf16" + WITHOUT_DASHES + "tune.bf16=..."),
        ("run --config my.yaml", "--config: a recipe is given by its name alone: adept-fast run my.yaml"),
        ("run -c=my.yaml", "-c=my.yaml: a recipe is given by its name alone: adept-fast run my.yaml"),
        ("run --resume", "unknown option --resume: leave it out: the same command goes on from where it stopped"),
        ("copies dial --alpha 0.5", "--alpha" + WITHOUT_DASHES + "alpha=0.5"),
        ("copies dial --model out", "--model" + WITHOUT_DASHES + "source=out"),
        ("tune lr 1e-4", "'lr 1e-4'" + JOINED + "tune.learning_rate=1e-4"),
        ("tune lr: 1e-4", "'lr: 1e-4'" + JOINED + "tune.learning_rate=1e-4"),
        ("tune lr:1e-4", "'lr:1e-4'" + JOINED + "tune.learning_rate=1e-4"),
        ("tune lr =1e-4", "'lr =1e-4'" + JOINED + "tune.learning_rate=1e-4"),
        ("tune lr = 1e-4", "'lr ='" + JOINED + "tune.learning_rate=1e-4"),
        ("tune tune.learning_rate= 1e-4", "'tune.learning_rate= 1e-4'" + JOINED + "tune.learning_rate=1e-4"),
        ("tune my.yaml tune.max_steps 100", "'tune.max_steps 100'" + JOINED + "tune.max_steps=100"),
        ("run domain my.txt", "'domain my.txt'" + JOINED + "domain=my.txt"),
        ("demo my.yaml", "'my.yaml': expected key=value; demo takes settings only (a value with spaces goes in quotes)"),
        ("copies dial source=a b", "'b': expected key=value; copies dial takes settings only (a value with spaces goes in quotes)"),
        ("info cuda", "info takes no settings, found 'cuda'"),
        ("run no.yaml", "'no.yaml': no such recipe (a setting is written key=value)"),
        ("run org/model domain=my.txt", "org/model" + NO_RECIPE + "org/model"),
        ("report out", "out: a folder, and no recipe: write output_dir=out, domain=out or model_name_or_path=out, whichever it is"),
        ("run my.txt", "my.txt: expected keys and values, found 'once' (a text to train on is given as domain=my.txt)"),
        ("recipe domain", "'domain'" + JOINED + "domain=..."),
        ("expand expand.layers=[3, 7]", "7]" + NO_RECIPE + "7]"),
        ("recipe expand.layers=3,7", "expand.layers=3,7: a list is written in brackets: expand.layers=[3,7]"),
        ("compare out=x", "unknown key out: did you mean output_dir?"),
    ],
)
def test_what_is_typed_wrong_is_answered(
    typed: str, answer: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("seed: 1\n")
    (tmp_path / "my.txt").write_text("once\n")
    (tmp_path / "out").mkdir()
    assert refused(capsys, typed) == answer


def test_other_names_lead_to_subcommands() -> None:
    assert {*OTHER_NAMES.values()} <= COMMANDS.keys() and not OTHER_NAMES.keys() & COMMANDS.keys()


def test_settings_with_signs_in_their_values_pass(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of these is taken for a wrong spelling: a path with a colon, an equals sign, an empty value before a recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b:c.yaml").write_text("seed: 1\n")
    assert main(["recipe", "a b:c.yaml", "domain=https://x:1/a=b", "revision=", "model_name_or_path=C:\\models"]) == 0
    said = capsys.readouterr().out
    assert "seed: 1 " in said and '"https://x:1/a=b"' in said and '"C:\\\\models"' in said


def test_the_traceback_is_shown_on_request_wherever_it_is_asked_for() -> None:
    for words in (["--debug", "tune", "--lr", "1"], ["tune", "--lr", "1", "--debug"]):
        with pytest.raises(ValueError, match="without dashes"):
            main(words)
