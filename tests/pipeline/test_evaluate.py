"""What `eval` asks and measures beside general and domain loss: answers, and the loss of an earlier domain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adept_fast.cli.main import main
from adept_fast.evaluation.results import EvaluationResults
from tests.support import tiny_models

pytestmark = pytest.mark.slow
COMMON = [
    *("expand.layers=[1]", "expand.k=1", "tune.max_steps=2", "tune.block_size=32", "tune.max_items=4", "tune.learning_rate=1e-2"),
    *("tune.refresh_steps=2", "eval.answer_tokens=4", "eval.max_items=8"),
]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two domains, and the run on the first."""
    folder = tmp_path_factory.mktemp("domains")
    tiny_models.checkpoint(folder / "model")
    for name, place in (("fox", "wood"), ("heron", "river")):
        (folder / f"{name}.txt").write_text("\n\n".join(f"The {name} knows stone {number} of the {place}." for number in range(90)))
    assert main(["run", *given(folder, "model", "fox", "one"), 'eval.prompts=["The fox knows", "how many?"]']) == 0
    return folder


def given(folder: Path, model: str, domain: str, output: str) -> list[str]:
    return [f"model_name_or_path={folder / model}", f"domain={folder / domain}.txt", f"output_dir={folder / output}", *COMMON]


def test_a_second_domain_measures_the_first_ones_loss(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    earlier = EvaluationResults.load(first / "one" / "eval.json")
    arguments = given(first, "one/tuned", "heron", "two")
    also = [f"eval.also.fox={{path: {first / 'fox.txt'}, held_out: true}}", f"eval.also.all-foxes={first / 'fox.txt'}"]
    assert main(["run", *arguments, *also]) == 0
    found = EvaluationResults.load(first / "two" / "eval.json")
    assert earlier.tuned is not None and found.tuned is not None and earlier.tuned.domain is not None
    assert found.base.also["fox"] == earlier.tuned.domain, "the documents that the first run held out, under the model that it made"
    assert found.base.also["all-foxes"].items == 8 and found.tuned.also["fox"].loss != found.base.also["fox"].loss
    change = found.changes["tuned"].also["fox"].loss
    assert change.value == pytest.approx(found.tuned.also["fox"].loss - found.base.also["fox"].loss) and change.low <= change.value
    assert [answer.from_ for answer in found.answers] == ["domain"] * 2 + ["general"] * 2, "two documents are held out"
    assert all(answer.reference and answer.base is not None and answer.tuned is not None for answer in found.answers)
    assert "fox loss: base " in capsys.readouterr().out
    assert main(["eval", *arguments, "eval.prompts=[]"]) == 0
    assert "eval.also.NAME={path: ..., held_out: true} measures that one's loss too" in capsys.readouterr().out
    again = EvaluationResults.load(first / "two" / "eval.json")
    assert again.answers == () and not again.base.also and again.changes["tuned"].domain == found.changes["tuned"].domain


def test_prompts_of_the_recipe(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = given(first, "model", "fox", "one")
    fox, many = EvaluationResults.load(first / "one" / "eval.json").answers
    assert (fox.prompt, fox.from_, fox.reference, many.prompt) == ("The fox knows", "eval.prompts", None, "how many?")
    assert fox.base != fox.tuned
    assert main(["eval", *arguments, f"eval.prompts={'fox ' * 200}"]) == 2
    assert "eval.prompts[0] has " in capsys.readouterr().err


@pytest.mark.parametrize("setting, said", [
    ("eval.also.general=fox.txt", "eval.also: 'general' is no name for a further corpus"),
    ("eval.also.fox={path: fox.txt, held_out: 3}", "eval.also.fox.held_out must be true or false, found 3"),
    ("eval.also.fox={path: fox.txt, weight: 2}", "eval.also.fox: weight and share say how much of a source is trained on"),
    ("eval.also=fox.txt", "eval.also: a table of names and sources, such as {law: law.jsonl}, found 'fox.txt'"),
    ("eval.also.fox=none.txt", "none.txt"),
    ("eval.prompts=[[]]", "eval.prompts[0]: a prompt is text, found []"),
])  # fmt: skip
def test_wrong_settings_are_named(first: Path, setting: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *given(first, "model", "fox", "one"), setting]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.nightly
def test_tasks_of_lm_eval_give_what_its_own_command_gives(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'adept-fast[eval]'")
    from tests.evaluation.test_lm_tasks import choice_task, text_task

    monkeypatch.setenv("HF_DATASETS_CACHE", str(first / "cache"))
    choice_task(first / "tasks")
    text_task(first / "tasks")
    chosen = ["eval.tasks=[stones, rivers]", f"eval.tasks_include_path={first / 'tasks'}", "eval.tasks_limit=11"]
    assert main(["eval", *given(first, "model", "fox", "one"), *chosen]) == 0
    tasks = EvaluationResults.load(first / "one" / "eval.json").tasks
    assert (tasks["stones"].items, tasks["rivers"].items) == (11, 6)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={first / 'one' / 'tuned'}"]
    command += ["--tasks", "stones,rivers", "--include_path", str(first / "tasks"), "--limit", "11", "--device", "cpu"]
    command += ["--output_path", str(first / "own")]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True)
    own = json.loads(next((first / "own").rglob("results*.json")).read_text())["results"]
    for task, metric in (("stones", "acc"), ("stones", "acc_norm"), ("rivers", "word_perplexity")):
        found = tasks[task].metrics[metric]
        assert found.tuned == pytest.approx(own[task][f"{metric},none"], rel=1e-6) and found.higher_is_better == (task == "stones")
        assert found.change is not None and found.change.value == pytest.approx(found.tuned - found.base)
        assert found.change.low <= found.change.value <= found.change.high
    assert tasks["rivers"].metrics["word_perplexity"].base != tasks["rivers"].metrics["word_perplexity"].tuned
