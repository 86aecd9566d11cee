"""The README's Python examples run as they stand, and docs/reference/recipe.md has every key as it is declared."""

from __future__ import annotations

import json
import re
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from adept_fast import AdamW
from adept_fast.data.items import load_items
from adept_fast.evaluation import results
from adept_fast.pipeline.recipe import load
from adept_fast.pipeline.run_directory import FILES, FOLDERS
from adept_fast.scoring.budget import LayerCosts
from adept_fast.scoring.profile import Profile
from adept_fast.scoring.scores import LayerScores, UnitScores
from tests.support import reference_pages, tiny_models

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPE = (ROOT / "docs" / "reference" / "recipe.md").read_text(encoding="utf-8")
BLOCK = r"```{}\n(.+?)```"


def run(number: int) -> dict[str, Any]:
    """Names and values after one example of the README."""
    names: dict[str, Any] = {}
    exec(compile(re.findall(BLOCK.format("python"), README, re.DOTALL)[number], "README.md", "exec"), names)
    return names


@pytest.mark.slow
def test_scoring_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.checkpoint(tmp_path / "MODEL", num_hidden_layers=5)
    monkeypatch.setattr("adept_fast.scoring.score_layers.load_items", lambda *given, **named: load_items(*given, **named)[:12])
    assert len(run(0)["scores"].values) == 5


def test_the_optimizer_alone() -> None:
    made = run(1)
    weight = made["model"].weight
    before = weight.detach().clone()
    made["model"](torch.randn(4, 64, dtype=torch.bfloat16)).square().sum().backward()
    made["opt"].step()
    rows = (weight != before).any(1)
    assert not rows[0] and rows[8:].all()


def test_the_bytes_of_a_parameter_are_those_of_the_tensors_after_a_step() -> None:
    page = (ROOT / "docs" / "how-to" / "optimizer.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (fp32|bf16) \| `(.+?)` \| `(.+?)` \| (.+) \|$", page, re.MULTILINE)
    assert len(rows) >= 7
    for dtype, state_dtype, master_weights, numbers in rows:
        parameter = torch.nn.Parameter(torch.ones(64, 64, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]))
        parameter.grad = torch.ones_like(parameter)
        optimizer = AdamW([parameter], state_dtype=eval(state_dtype), master_weights=eval(master_weights))
        optimizer.step()
        held = {key: x.nbytes / parameter.numel() for key, x in optimizer.state[parameter].items() if key != "step"}
        moments = sum(size for key, size in held.items() if key.startswith("exp_avg"))
        master = sum(held.values()) - moments
        found = [2 * parameter.element_size(), moments, master]
        assert [*found, sum(found)] == [float(number) for number in numbers.split(" | ")], (dtype, state_dtype, master_weights)


@pytest.mark.parametrize("name", reference_pages.PAGES)
def test_a_reference_page_stands_as_it_is_declared(name: str) -> None:
    text = (reference_pages.FOLDER / name).read_text(encoding="utf-8")
    assert reference_pages.PAGES[name](text) == text, "run python tests/support/reference_pages.py"


def test_the_keys_of_a_recipe_stand_in_its_page_with_their_defaults() -> None:
    page = yaml.safe_load(re.findall(BLOCK.format("yaml"), RECIPE, re.DOTALL)[0])
    given = [f"model_name_or_path={page['model_name_or_path']}", f"domain={page['domain']}"]
    recipe = json.loads(json.dumps(load(None, given).as_dict()))
    recipe["tune"] |= recipe["tune"].pop("training")
    recipe["probe"], recipe["domain"] = recipe["probe"]["path"], recipe["domain"][0]["path"]
    assert page == recipe


def test_as_many_model_types_are_claimed_as_the_table_of_families_has() -> None:
    supported, _ = (ROOT / "docs" / "reference" / "families.md").read_text(encoding="utf-8").split("| type | reason |")
    rows = re.findall(r"^\| (?!type )[a-z]", supported, re.MULTILINE)
    assert re.findall(r"(\d+) decoder-only model types", README) == [str(len(rows))]


def test_the_trips_of_the_design_name_files_and_functions_that_exist() -> None:
    design = (ROOT / "docs" / "explanation" / "design.md").read_text(encoding="utf-8")
    trips = design.partition("## Four trips\n")[2].partition("\n## ")[0]
    steps = re.findall(r"^ *(?:\d+\.|-) `([a-z_/]+)\.py`: `([A-Za-z_.]+)`\.", trips, re.MULTILINE)
    assert len(steps) == len(re.findall(r"^ *(?:\d+\.|-) ", trips, re.MULTILINE)) > 30
    for file, name in steps:
        found: Any = import_module(f"adept_fast.{file.replace('/', '.')}")
        for part in name.split("."):
            found = getattr(found, part)


def test_the_page_of_artefacts_names_every_file_field_and_event() -> None:
    page = (ROOT / "docs" / "reference" / "artefacts.md").read_text(encoding="utf-8")
    scores = {entry.name for kind in (LayerScores, UnitScores, LayerCosts, Profile) for entry in fields(kind)} - {"per_item"}
    kinds = [kind for kind in vars(results).values() if is_dataclass(kind) and kind.__module__ == results.__name__]
    evaluated = {entry.name.rstrip("_") for kind in kinds for entry in fields(kind)}
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "adept_fast" / "tuning").glob("*.py"))
    events = set(re.findall(r"(?:log|self)\.write\(\"(\w+)\"", source))
    assert {"plan", "step", "refresh", "evaluation", "end"} <= events
    listed = set(re.findall(r"`([\w./]+)`", page)) | set(re.findall(r"^#+ (.+)$", page, re.MULTILINE))
    assert not {*scores, *evaluated, *events, *FILES, *(f"{name}/" for name in FOLDERS)} - listed
