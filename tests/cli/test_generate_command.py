"""adept-fast generate: what it prints, the base beside the model, and refusals in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.cli.main import main
from adept_fast.expansion.expand_checkpoint import expand_checkpoint
from adept_fast.expansion.expand_model import copies
from tests.support import tiny_models

FEW = "max_new_tokens=5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and the same with a copy that is no longer silent."""
    folder = tmp_path_factory.mktemp("generate")
    tiny_models.checkpoint(folder / "base")
    expand_checkpoint(folder / "base", folder / "tuned", [1], verify=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "tuned")
    model.adept_config = AdeptConfig.load(folder / "tuned")
    with torch.no_grad():
        for parameter in copies(model)[0].parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    model.save_pretrained(folder / "tuned")
    return folder


def said(capsys: pytest.CaptureFixture, *words: str) -> str:
    capsys.readouterr()
    assert main(["generate", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def plain(folder: Path, text: str) -> str:
    """The answer by transformers alone."""
    tokenizer, model = tiny_models.tokenizer(), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    text = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=5)[0, ids.shape[1] :], skip_special_tokens=True)
    return "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in text)  # nothing may steer a terminal


def test_one_prompt_gives_the_answer_alone(folder: Path, capsys: pytest.CaptureFixture) -> None:
    base, tuned = (plain(folder / name, "The fox?") for name in ("base", "tuned"))
    assert base != tuned
    assert said(capsys, f"source={folder / 'tuned'}", "prompt=The fox?", FEW).rstrip("\n") == tuned
    both = said(capsys, f"source={folder / 'tuned'}", "prompt=The fox?", "base=true", FEW)
    assert both.split("\n") == ["prompt:", "  The fox?", "base:", f"  {base.strip()}", f"{folder / 'tuned'}:", f"  {tuned.strip()}", ""]


def test_several_prompts_and_seeds(folder: Path, capsys: pytest.CaptureFixture) -> None:
    words = [f"source={folder / 'base'}", 'prompt=["The fox", "The heron, who"]', FEW, "temperature=2"]
    first = said(capsys, *words, "seed=1")
    assert first.startswith("prompt:\n  The fox\n") and "\n\nprompt:\n  The heron, who\n" in first
    assert first == said(capsys, *words, "seed=1") != said(capsys, *words, "seed=2")


@pytest.mark.parametrize("words, message", [
    (["prompt=a"], "source is missing"),
    (["source={folder}/base"], "prompt is missing"),
    (["source={folder}/none", "prompt=a"], "no such model folder"),
    (["source={folder}/base", "prompt=[]"], "prompt is an empty list: give a text"),
    (["source={folder}/base", "prompt=[[1]]"], "prompt[0]: a prompt is text, found [1]"),
    (["source={folder}/base", "prompt=a", "base=true"], "base has no record of copies, so no base is in it"),
    (["source={folder}/base", "prompt=a", "chat=true"], "no chat template"),
    (["source={folder}/base", "prompt=a", "max_new_tokens=128"], "prompt[0] has 1 tokens, and the model takes 0 before its answer"),
    (["source={folder}/base", "prompt=a", "temperature=-1"], "temperature must be a number from 0 to 100"),
    (["source={folder}/base", "prompt=a", "max_tokens=5"], "did you mean max_new_tokens?"),
    (["model={folder}/base", "prompt=a"], "did you mean source?"),
])  # fmt: skip
def test_refusals_are_one_line(folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", *(word.format(folder=folder) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
