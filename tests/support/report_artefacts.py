"""Artefacts of a run as it would have written them, for tests of the report and of its charts."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from adept_fast.scoring.scores import LayerScores
from adept_fast.tuning.training_history import TrainingHistory

LAYERS = 30
COPIED = [3, 5, 12, 14]
KINDS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
KINDS += ["input_layernorm", "post_attention_layernorm"]
EVIL = "<script>alert('x')</script>&\"$a_b$"


def profile(base: float | None, lift: float) -> dict:
    chance = random.Random(7)
    values = [10.1, 3.5] + [lift + chance.gauss(0.35, 0.25) for _ in range(LAYERS - 2)]
    for rank, layer in enumerate(COPIED):
        values[layer] = lift - 0.03 * (4 - rank)
    return {"values": values, "low": [value - 0.04 for value in values], "high": [value + 0.05 for value in values], "base_loss": base}


def analysis(layers: int = LAYERS, names: int = 2) -> dict:
    sizes = [{"items": items, "same": 0.33, "frequency": [layer / layers for layer in range(layers)]} for items in (16, 48)]
    ranks = {name: [[layer, layer - 1, layer + 1] for layer in range(layers)] for name in ("kl", "domain")}
    table = [[1.0 if row == column else None for column in range(names)] for row in range(names)]
    return {
        "stability": {"layers": [0], "placement": "lowest", "draws": 1000, "sizes": sizes},
        "conflicts": {"profiles": ["kl", "domain"], "ranks": ranks, "spearman": None, "layers": [0]},
        "comparison": {
            "names": [f"method {name}" for name in range(names)], "values": [list(range(layers))] * names,
            "spearman": table, "low": table, "high": table,
        },
    }  # fmt: skip


def layer_scores(content: dict | None = None) -> LayerScores:
    return LayerScores.of(content or scores(), Path("scores.json"))


def history(folder: Path, lines: list[dict]) -> TrainingHistory:
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TrainingHistory.load(folder / "log.jsonl")


def scores(model: str = "org/tiny") -> dict:
    profiles = {"answer": profile(0.849, -0.02), "kl": profile(None, 0.15), "all": profile(2.6, 0.1)}
    return {
        "schema": 1, "method": "masking", "loss": "kl", "profiles": profiles, "items": 48, "tokens": 1234, "confidence": 0.95,
        "seconds": 85.3, "model": model, "notes": ["one forward a layer"], "analysis": analysis(),
    }  # fmt: skip


def record(model: str = "org/tiny") -> dict:
    return {
        "schema": 2,
        "source": {"name_or_path": model, "identity": "xxh3_128:" + "ab" * 16, "num_hidden_layers": LAYERS},
        "inserted": [{"layer": old + rank + 1, "copied_from": old} for rank, old in enumerate(COPIED)],
        "selection": {"placement": "lowest", "k": 4, "layers": COPIED, "notes": ["the intervals do not part the chosen layers from 7"]},
        "parameters": {"total": 148_675_392, "trainable": 14_160_384},
        "versions": {"torch": "2.13.0"},
    }


def refresh(step: int, names: list[str]) -> dict:
    chance = random.Random(step)
    return {"event": "refresh", "step": step, "rates": {name: 2 * chance.random() for name in names}, "importance": {}}


def log(steps: int = 60) -> list[dict]:
    names = [f"model.layers.{entry['layer']}.{kind}" for entry in record()["inserted"] for kind in KINDS]
    lines: list[dict] = [{"event": "plan", "step": 0, "steps": steps, "tokens": 512 * steps, "epochs": 0.25}]
    for step in range(0, steps + 1, 20):
        if step < steps:
            lines.append(refresh(step, names))
        lines.append({"event": "evaluation", "step": step, "general_loss": 0.85 + step / 5000, "domain_loss": 2.7 - 0.08 * math.sqrt(step)})
        for late in range(step + 1, min(step + 20, steps) + 1):
            loss = 2.6 - 0.07 * math.sqrt(late)
            lines.append({"event": "step", "step": late, "loss": loss, "learning_rate": 1e-3, "tokens_per_second": 256.0})
    return [*lines, {"event": "end", "step": steps}]


def corpus(loss: float, accuracy: float | None = None) -> dict:
    result = {"loss": loss, "low": loss - 0.05, "high": loss + 0.06, "perplexity": math.exp(loss), "tokens": 2881, "items": 96}
    bounds = {} if accuracy is None else {"accuracy_low": accuracy - 0.08, "accuracy_high": accuracy + 0.07}
    return result | {"accuracy": accuracy} | bounds


def change(value: float, accuracy: float | None = None) -> dict:
    points = None if accuracy is None else {"value": accuracy, "low": accuracy - 0.01, "high": accuracy + 0.01}
    return {"loss": {"value": value, "low": value - 0.025, "high": value + 0.03}, "accuracy": points}


def evaluation(general: float = 0.872, domain: float = 2.101) -> dict:
    return {
        "schema": 2,
        "models": {
            "base": {"general": corpus(0.849, 0.41), "domain": corpus(2.704), "shifted_tokens": None},
            "expanded": {"same_as": "base", "reason": "bit-equal logits, verified"},
            "tuned": {"general": corpus(general, 0.44), "domain": corpus(domain), "shifted_tokens": 0.0218},
        },
        "changes": {"tuned": {"general": change(general - 0.849, 0.03), "domain": change(domain - 2.704)}},
        "answers": [
            {"prompt": "Split a string.", "from": "domain", "reference": " It splits.", "base": " One two three", "tuned": " One 2 three"},
            {"prompt": EVIL, "from": "eval.prompts", "reference": None, "base": EVIL, "tuned": EVIL},
        ],
        "tasks": {
            "quiz": {
                "items": 9,
                "metrics": {
                    "acc": {
                        "base": 0.5,
                        "tuned": 0.4,
                        "change": {"value": -0.1, "low": -0.15, "high": -0.05},
                        "higher_is_better": True,
                    },
                    "word_perplexity": {
                        "base": 7070.977,
                        "tuned": 8409.042,
                        "change": {"value": 1338.065, "low": 921.467, "high": 1571.4},
                        "higher_is_better": False,
                    },
                },
            }
        },
        "seconds": 12.5,
        "inputs": {},
        "versions": {},
    }


def write_all(folder: Path, model: str = "org/tiny", results: dict | None = None, lines: list[dict] | None = None) -> None:
    (folder / "expanded").mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(scores(model)))
    (folder / "expanded" / "adept_config.json").write_text(json.dumps(record(model)))
    (folder / "eval.json").write_text(json.dumps(results or evaluation()))
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines or log()))
