"""--help of each subcommand: its keys with default and meaning, at most 100 columns wide, without loading torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from adept_fast.cli.commands import COMMANDS
from adept_fast.cli.help import groups, page
from adept_fast.cli.main import main
from adept_fast.settings.key_value import keys_of, settings
from adept_fast.settings.training_arguments import COMMON, checked


def said(capsys: pytest.CaptureFixture, *words: str) -> str:
    capsys.readouterr()
    assert main([*words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_has_examples_and_every_key_with_what_it_means(name: str, capsys: pytest.CaptureFixture) -> None:
    text = said(capsys, *name.split(), "--help")
    assert text == said(capsys, "help", *name.split()) == said(capsys, *name.split(), "-h", "x=1") == page(name) + "\n"
    assert max(map(len, text.splitlines())) <= 100
    for example in COMMANDS[name].examples:
        assert f"\n  adept-fast {name} {example}".rstrip() + "\n" in text
    for _, keys in groups(COMMANDS[name]):
        assert keys
        for key in keys:
            assert f"  {key.name}=" in text and key.told, key.name


def test_the_tables_of_the_stages_are_told_apart() -> None:
    titles = {name: [title for title, _ in groups(COMMANDS[name])][1:-1] for name in ("tune", "eval", "report", "run")}
    others = "of other tables"
    assert titles == {"tune": ["tune", others], "eval": ["eval", others], "report": [], "run": ["score", "expand", "tune", "eval"]}
    for name in ("tune", "run"):
        assert "Any other name of transformers' TrainingArguments works too" in page(name)
    needed, left = "(must be given) ", "  domain=...                          "
    assert f"{left}{needed}file" in page("tune") and f"{left}file" in page("eval")


def test_the_demo_shows_its_own_defaults() -> None:
    assert "tune.max_steps=60 " in page("demo") and "tune.max_steps=-1 " in page("run") and "recipe.yaml" not in page("demo")


def test_no_key_is_left_out() -> None:
    from adept_fast.pipeline.recipe import Recipe
    from adept_fast.settings.training_arguments import known

    listed = {key.name for _, keys in groups(COMMANDS["run"]) for key in keys}
    whole = {name for name in keys_of(Recipe) if name not in ("score", "expand", "tune", "eval") and not name.startswith("expand.budget.")}
    assert {f"tune.{name}" for name in COMMON} <= listed and listed == whole - {f"tune.{name}" for name in known().keys() - COMMON.keys()}


def test_the_common_arguments_have_the_defaults_that_a_run_has(tmp_path: object) -> None:
    from pathlib import Path

    from adept_fast.tuning.tuning_settings import TuningSettings, arguments

    args = arguments(TuningSettings(), Path(str(tmp_path)))
    for name, key in COMMON.items():
        value = getattr(args, name)
        told = {"report_to": [], "gradient_checkpointing": False, "eval_steps": value}.get(name, key.default)
        assert getattr(value, "value", value) == told, name
        checked(name, key.default)


def test_every_example_is_read_as_it_stands() -> None:
    for name, command in COMMANDS.items():
        for example in command.examples:
            words = [word for word in example.partition(">")[0].split() if "=" in word]
            for kind in command.declarations:
                names = {*keys_of(kind)}
                settings(kind, [word for word in words if word.partition("=")[0] in names])
                words = [word for word in words if word.partition("=")[0] not in names]
            assert not words, (name, words)


def test_the_overview_names_the_three_usual_commands_and_all_others(capsys: pytest.CaptureFixture) -> None:
    text = said(capsys)
    assert text == said(capsys, "--help") == said(capsys, "help") and len(text.splitlines()) < 30
    assert all(f"adept-fast {name} " in text for name in ("demo", "run", "recipe"))
    assert all(f"\n  {name.partition(' ')[0]} " in text for name in COMMANDS)
    assert "copies merge" in said(capsys, "copies", "--help") and said(capsys, "--version").strip()


@pytest.mark.slow
def test_help_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from adept_fast.cli.main import main; from adept_fast.cli.commands import COMMANDS\n"
        "codes = [main([*name.split(), '--help']) for name in COMMANDS] + [main([]), main(['recipe'])]\n"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy', 'matplotlib'} & sys.modules.keys()) or any(codes))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
