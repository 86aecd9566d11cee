"""Every public function on arguments of a wrong kind: it takes them, or says in a line which one is wrong."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import adept_fast
from adept_fast.data.items import Item
from adept_fast.scoring.unit_importance import UnitImportance
from tests.support import tiny_models

WRONG: tuple[Any, ...] = (None, 0, "x", [None], object())
ERRORS = ("ExpansionError", "InputError", "UnsupportedFamilyError")


@cache
def base() -> Any:
    return tiny_models.model(num_hidden_layers=3)


@cache
def expanded() -> Any:
    return adept_fast.expand_model(base(), [1])


@cache
def items() -> list[Item]:
    return tiny_models.items(3)


@cache
def importance() -> UnitImportance:
    return adept_fast.score_units(expanded(), items(), adept_fast.Units.of(expanded()))


@cache
def scores() -> adept_fast.LayerScores:
    return adept_fast.score_layers(base(), items())


@cache
def folders() -> Path:
    import tempfile

    folder = Path(tempfile.mkdtemp())
    tiny_models.checkpoint(folder / "model", num_hidden_layers=3)
    adept_fast.expand_checkpoint(folder / "model", folder / "expanded", [1])
    adept_fast.extract_copies(folder / "expanded", folder / "delta")
    scores().save(folder / "scores.json")
    return folder


@cache
def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """By name: what is called, and arguments that are right."""
    model, units = base(), importance().units
    there = folders()
    copies = {"source": there / "expanded", "target": there / "made"}
    made = {
        "AdamW": {"params": [torch.nn.Parameter(torch.ones(2))]},
        "AdeptCallback": {"probe": items()},
        "AdeptTrainer": {
            "model": expanded(), "args": TrainingArguments(output_dir=str(there / "run"), report_to="none", use_cpu=True),
            "adept": adept_fast.AdeptCallback(items()),
        },
        "Anchor": {"items": items(), "weight": 0.5},
        "LayerScores.load": {"path": there / "scores.json"},
        "OffloadedAdamW": {"params": [torch.nn.Parameter(torch.ones(2))]},
        "Race": {"k": 1, "regret": 0.1},
        "Units.of": {"model": expanded()},
        "UnitScores.load": {"path": there / "scores.json"},
        "apply_copies": {"base": there / "model", "delta": there / "delta", "target": there / "made"},
        "apply_rates": {
            "optimizer": adept_fast.AdamW(expanded().parameters()), "model": expanded(), "units": units, "rates": torch.ones(len(units)),
        },
        "compare_scores": {"several": [scores(), scores()]},
        "corpus_conflicts": {"scores": scores(), "first": "answer", "second": "answer"},
        "dial": {**copies, "alpha": 0.5},
        "expand_checkpoint": {"source": there / "model", "target": there / "made", "layers": [1]},
        "expand_model": {"model": model, "layers": [1]},
        "extract_copies": copies,
        "fast_step": {"model": expanded()},
        "freeze_original": {"model": expanded()},
        "mask_units": {"model": model, "probe": items()},
        "merge_copies": {"a": there / "expanded", "b": there / "expanded", "target": there / "made"},
        "param_groups": {"model": torch.nn.Linear(2, 2)},
        "remove_copies": copies,
        "score_layers": {"model": model, "probe": items()},
        "score_units": {"model": expanded(), "probe": items(), "units": units},
        "select_layers": {"scores": scores(), "k": 1},
        "selection_stability": {"scores": scores(), "layers": [0]},
        "unit_rates": {"importance": importance()},
        "verify_expansion": {"base": model, "expanded": model, "inputs": torch.ones(1, 4, dtype=torch.int64)},
    }  # fmt: skip
    found = {}
    for name, right in made.items():
        owner, _, method = name.partition(".")
        found[name] = (getattr(getattr(adept_fast, owner), method) if method else getattr(adept_fast, owner), right)
    return found


NAMES = (
    *("AdamW", "AdeptCallback", "AdeptTrainer", "Anchor", "LayerScores.load", "OffloadedAdamW", "Race", "UnitScores.load", "Units.of"),
    *("apply_copies", "apply_rates", "compare_scores", "corpus_conflicts", "dial", "expand_checkpoint", "expand_model", "extract_copies"),
    *("fast_step", "freeze_original", "mask_units", "merge_copies", "param_groups", "remove_copies", "score_layers", "score_units"),
    *("select_layers", "selection_stability", "unit_rates", "verify_expansion"),
)
OF_TORCH = ("optimizer can only optimize Tensors", "optimizer got an empty parameter list")


def wrong(name: str) -> Iterator[tuple[str, Any]]:
    call, _ = calls()[name]
    for argument, parameter in inspect.signature(call).parameters.items():
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            yield from ((argument, value) for value in WRONG)


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_of_a_wrong_kind_is_taken_or_named_in_a_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # "x" is no dataset: nothing is asked of a hub
    assert {each.partition(".")[0] for each in NAMES} == {*adept_fast.__all__} - {*ERRORS} and {*NAMES} == calls().keys()
    said = []
    for argument, value in wrong(name):
        call, right = calls()[name]
        shutil.rmtree(folders() / "made", ignore_errors=True)
        try:
            made = call(**{**right, argument: value})
            if name == "fast_step":
                with made:
                    pass
        except Exception as error:
            text = str(error)
            named = argument in text or (isinstance(value, str | int) and str(value) in text) or text.startswith(OF_TORCH)
            kinds = (adept_fast.InputError, adept_fast.UnsupportedFamilyError)
            if "\n" in text or not named or not (isinstance(error, kinds) or text.startswith(OF_TORCH)):
                said.append(f"{argument}={value!r}: {type(error).__name__}: {text}")
    assert not said, "\n".join(said)
