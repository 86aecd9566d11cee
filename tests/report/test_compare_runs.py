"""Runs side by side: grouped by recipe, mean and spread over seeds, refused where they were not measured alike."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml

from adept_fast.cli.main import main
from adept_fast.errors import InputError
from adept_fast.evaluation.paired_items import ItemLosses, save_items
from adept_fast.report.compare_charts import trade_off, trajectories
from adept_fast.report.compare_runs import compare, front
from adept_fast.report.drawing import LEAST
from adept_fast.report.evaluated_runs import grouped, load_run


def result(general: float, domain: float, shifted: float | None = None) -> dict:
    measured = [
        {"loss": loss, "low": loss - 0.1, "high": loss + 0.1, "perplexity": math.exp(loss), "tokens": 40, "items": 4, "accuracy": accuracy}
        for loss, accuracy in ((general, general / 10), (domain, None))
    ]
    return {"general": measured[0], "domain": measured[1], "shifted_tokens": shifted}


def change(value: float) -> dict:
    return {"loss": {"value": value, "low": value - 0.05, "high": value + 0.05}, "accuracy": None}


def items(loss: float, accuracy: float | None = None) -> ItemLosses:
    """Four items of ten tokens, whose losses differ by the same steps for each model."""
    right = None if accuracy is None else torch.full((4,), accuracy, dtype=torch.float64)
    return ItemLosses(10 * (loss + torch.tensor([-0.3, -0.1, 0.1, 0.3], dtype=torch.float64)), torch.full((4,), 10), right)


def run(folder: Path, method: str, seed: int, general: float, domain: float, inputs: dict | None = None, **tune: object) -> Path:
    folder.mkdir()
    measured = {"model": "m", "general": "g", "domain": "d", **(inputs or {}), "tuned": str(folder)}
    models = {"base": result(3.0, 4.0), "tuned": result(general, domain, 0.02)}
    changes = {"tuned": {"general": change(general - 3.0), "domain": change(domain - 4.0)}}
    content = {"schema": 2, "models": models, "changes": changes, "seconds": 1.0, "inputs": measured, "versions": {}}
    (folder / "eval.json").write_text(json.dumps(content))
    losses = {"base": (3.0, 4.0), "tuned": (general, domain)}
    each = {name: {"general": items(found[0], found[0] / 10), "domain": items(found[1])} for name, found in losses.items()}
    save_items(folder / "eval.json", each)
    recipe = {"method": method, "seed": seed, "output_dir": str(folder), "tune": tune}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    log = [{"event": "plan", "step": 0, "tokens": 8192}, {"event": "step", "step": 1, "tokens_per_second": 50.0}]
    for step, share in ((0, 0.0), (5, 0.6), (9, 1.0)):
        reached = {"general_loss": 3 + share * (general - 3), "domain_loss": 4 + share * (domain - 4)}
        log.append({"event": "evaluation", "step": step, **reached})
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    return folder


def test_seeds_of_a_recipe_are_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folders = [
        run(tmp_path / "a1", "adept", 1, 3.1, 2.0, learning_rate=0.1),
        run(tmp_path / "a2", "adept", 2, 3.3, 2.4, learning_rate=0.1),
        run(tmp_path / "b", "adept", 1, 3.5, 1.9, learning_rate=0.2),
        run(tmp_path / "f", "full<&", 1, 3.9, 1.8),
    ]
    assert main(["compare", *map(str, folders), "output_dir=~/out"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "base: general loss 3.000, domain loss 4.000 nats per token"
    assert said[1].startswith("adept tune.learning_rate=0.1: general loss 3.200 \N{PLUS-MINUS SIGN} 0.141, domain loss 2.200 ")
    assert said[4] == f"comparison: {tmp_path / 'out' / 'compare.html'}" and len(said) == 5
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert list(rows) == ["base", "adept tune.learning_rate=0.1", "adept tune.learning_rate=0.2", "full<&"]
    adept = rows["adept tune.learning_rate=0.1"]
    assert adept["seeds"] == [1, 2] and adept["tokens"] == 8192 and adept["tokens_per_second"] == 50
    assert adept["general loss"]["mean"] == pytest.approx(3.2) and adept["general loss"]["spread"] == pytest.approx(0.2 / 2**0.5)
    assert adept["shifted tokens (%)"]["mean"] == pytest.approx(2) and "domain accuracy (%)" not in adept
    assert rows["full<&"]["domain loss"] == {"mean": 1.8, "spread": None, "values": [1.8]} and "shifted tokens (%)" not in rows["base"]
    assert adept["against base"]["general"]["loss"]["value"] == pytest.approx(0.2) and adept["against first"] is None
    paired = rows["full<&"]["against first"]["domain"]["loss"]
    assert paired == pytest.approx({"value": -0.4, "low": -0.4, "high": -0.4}), "all items differ alike, so the interval is a point"
    assert [name for name, row in rows.items() if row.get("pareto")] == [*list(rows)[1:]]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "full&lt;&amp;" in page and "full<&" not in page and "3.200" in page and "\N{PLUS-MINUS SIGN} 0.141" in page
    assert not any(outside in page for outside in ("src=", "<script", "@import", 'href="http'))
    assert page.count("<svg") == 2 and "Pareto front" in page and f"Difference from {escape(list(rows)[1])}" in page
    picture = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6].replace("xlink:href", "href"))
    said = "".join(picture.itertext())
    assert all(name in said for name in rows)


def test_a_recipe_beaten_in_both_losses_is_off_the_front_and_small_differences_look_small(tmp_path: Path) -> None:
    worse, better = run(tmp_path / "w", "full", 1, 3.0002, 3.9), run(tmp_path / "b", "adept", 1, 3.0001, 3.8999)
    groups = grouped([load_run(worse), load_run(better)])
    assert [group.name for group in front(groups)] == ["adept"]
    for figure in (trade_off(groups, front(groups)), trade_off(groups, groups), trajectories(groups)):
        assert figure is not None
        for low, high in (figure.axes[0].get_xlim(), figure.axes[0].get_ylim()):
            assert high - low >= LEAST and low < 0 < high
    for path in (worse, better):
        (path / "trainer_log.jsonl").unlink()
    assert trajectories(grouped([load_run(worse), load_run(better)])) is None


def test_runs_that_cannot_be_compared_say_why(tmp_path: Path) -> None:
    one = run(tmp_path / "one", "adept", 1, 3.1, 2.0)
    with pytest.raises(InputError, match="two output_dirs or more"):
        compare([one, one], tmp_path / "out")
    with pytest.raises(InputError, match=r"eval.json: missing"):
        compare([one, tmp_path / "none"], tmp_path / "out")
    lost = run(tmp_path / "lost", "full", 1, 3.2, 2.1)
    (lost / "eval.items.safetensors").unlink()
    with pytest.raises(InputError, match=r"lost/eval.items.safetensors: no such file"):
        compare([one, lost], tmp_path / "out")
    for key, message in (("model", "another base model"), ("domain", "set the same eval.domain")):
        with pytest.raises(InputError, match=message):
            compare([one, run(tmp_path / key, "full", 1, 3.0, 2.0, {key: "x"})], tmp_path / "out")
    with pytest.raises(InputError, match="the same seed"):
        compare([one, run(tmp_path / "again", "adept", 1, 3.0, 2.0)], tmp_path / "out")
    (one / "recipe.yaml").write_text("- 3\n")
    with pytest.raises(InputError, match="recipe.yaml: expected keys and values, found list"):
        compare([one, tmp_path / "again"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
