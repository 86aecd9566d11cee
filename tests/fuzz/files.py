"""The files that a run reads, and the stages that read each: a small run made whole once, of which every case takes a copy."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.checkpoints.safetensors_index import open_shards, read_header
from adept_fast.expansion.delta import FILE as DELTA
from adept_fast.runtime.input_files import read_json
from adept_fast.scoring.scores import LayerScores
from tests.support import tiny_models
from tests.support.attempts import Attempts

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
GIVEN = {
    "model_name_or_path": "model",
    "output_dir": "out",
    "probe": "probe.jsonl",
    "domain": "domain.txt",
    "dtype": "float32",
    "score": {"max_items": 3, "units": "tensor"},
    "expand": {"layers": [1], "k": 1},
    "tune": {"max_steps": 2, "refresh_steps": 1, "block_size": 24, "max_items": 2, "units": "head", "learning_rate": 1e-3},
    "eval": {"max_items": 4, "domain": "held.jsonl", "answer_tokens": 2},
}
RECIPE = ("recipe.yaml",)
KILLED = "adept_fast.tuning.tune_checkpoint:export_tuned"  # checkpoints are there, and nothing after them
OUT, STOPPED = "output_dir=out", "output_dir=stopped"


def scored(folder: Path) -> None:
    scores = LayerScores.load(folder / "new" / "scores.json")
    assert len(scores.values) == len(scores.low) == len(scores.high) > 0 and all(value == value for value in scores.values)


def expanded(folder: Path) -> None:
    assert AdeptConfig.load(folder / "new" / "expanded").copies and open_shards(folder / "new" / "expanded").tensors


def reported(folder: Path) -> None:
    page = (folder / "out" / "report.html").read_text()
    assert page.rstrip().endswith("</html>") and "Traceback" not in page


def compared(folder: Path) -> None:
    assert read_json(folder / "both" / "compare.json")["rows"]


def tuned(folder: Path) -> None:
    assert open_shards(folder / "stopped" / "tuned").tensors


def written(folder: Path) -> None:
    alone = folder / "target" / DELTA
    assert read_header(alone)[0] if alone.is_file() else open_shards(folder / "target").tensors


def evaluated(folder: Path) -> None:
    assert read_json(folder / "out" / "eval.json")["models"]["tuned"]


def streamed(folder: Path) -> None:
    assert open_shards(folder / "new" / "tuned").tensors


def said(folder: Path) -> None:
    """The stage wrote nothing."""


@dataclass(frozen=True)
class Stage:
    """arguments: of adept-fast, in the copy; proves: what must hold after exit 0; weight: how often it is drawn."""

    arguments: tuple[str, ...]
    proves: Callable[[Path], None]
    weight: int = 4


SCORE = Stage(("score", *RECIPE, "output_dir=new", "score.units=null"), scored, 8)
EXPAND = Stage(("expand", *RECIPE, "output_dir=new"), expanded, 4)
REPORT = Stage(("report", OUT), reported, 12)
COMPARE = Stage(("compare", "out", "other", "output_dir=both"), compared, 12)
RESUME = Stage(("tune", *RECIPE, STOPPED), tuned, 2)
TUNE = Stage(("tune", *RECIPE, "output_dir=new", "tune.max_steps=1"), streamed, 1)
EVAL = Stage(("eval", *RECIPE), evaluated, 2)
RENDER = Stage(("eval", *RECIPE, OUT), evaluated, 2)


def copies(*arguments: str) -> Stage:
    return Stage(("copies", *arguments, "target=target"), written, 6)


APPLY = copies("apply", "base=model", "delta=delta")
CHOOSE = Stage(("expand", *RECIPE, OUT, "expand.layers=null"), said, 6)  # expanded/ stands there, of other layers perhaps
FILES: dict[str, tuple[str, tuple[Stage, ...]]] = {
    "recipe.yaml": ("yaml", (SCORE, EXPAND, REPORT)),
    "probe.jsonl": ("jsonl", (SCORE, EXPAND)),
    "domain.txt": ("text", (EVAL, RESUME)),
    "domain.jsonl": ("jsonl", (Stage((*EVAL.arguments, "eval.domain=domain.jsonl"), evaluated),)),
    "domain.json": ("json", (Stage((*EVAL.arguments, "eval.domain=domain.json"), evaluated),)),
    "domain.jsonl.gz": ("gz", (Stage((*EVAL.arguments, "eval.domain=domain.jsonl.gz"), evaluated),)),
    "domain.parquet": ("parquet", (Stage((*EVAL.arguments, "eval.domain=domain.parquet"), evaluated),)),
    "held.jsonl": ("jsonl", (EVAL,)),
    "model/config.json": ("json", (SCORE, EXPAND, APPLY)),
    "model/model.safetensors.index.json": ("json", (SCORE, EXPAND, APPLY)),
    "model/model-00001-of-00002.safetensors": ("safetensors", (SCORE, EXPAND, APPLY)),
    "model/model-00002-of-00002.safetensors": ("safetensors", (SCORE, EXPAND)),
    "model/tokenizer.json": ("json", (SCORE, EXPAND)),
    "model/tokenizer_config.json": ("json", (SCORE, EXPAND)),
    "model/generation_config.json": ("json", (SCORE,)),
    "delta/adept_config.json": ("json", (APPLY,)),
    "delta/adept_copies.safetensors": ("safetensors", (APPLY,)),
    "out/scores.json": ("json", (REPORT, CHOOSE)),
    "out/scores.items.safetensors": ("safetensors", (CHOOSE,)),
    "out/unit_scores.json": ("json", (REPORT,)),
    "out/eval.json": ("json", (REPORT, COMPARE, RENDER)),
    "out/eval.items.safetensors": ("safetensors", (COMPARE,)),
    "out/trainer_log.jsonl": ("jsonl", (REPORT, COMPARE)),
    "out/recipe.yaml": ("yaml", (REPORT, COMPARE)),
    "out/expanded/adept_config.json": ("json", (REPORT, copies("remove", "source=out/expanded"), Stage(("verify", *RECIPE), said))),
    "out/expanded/config.json": ("json", (copies("extract", "source=out/expanded"), Stage(("verify", *RECIPE), said))),
    "out/tuned/adept_config.json": ("json", (copies("remove", "source=out/tuned"), copies("dial", "source=out/tuned", "alpha=0.5"))),
    "out/tuned/model-00001-of-00002.safetensors": ("safetensors", (copies("dial", "source=out/tuned", "alpha=0.5"), EVAL)),
    "stopped/expanded/adept_config.json": ("json", (RESUME,)),
    "stopped/trainer_log.jsonl": ("jsonl", (RESUME,)),
    "stopped/checkpoints/inputs.json": ("json", (RESUME,)),
}
"""File -> (form, the stages that read it). More are found in the whole run: what a stage keeps beside its tensors, checkpoints."""


def files(whole: Path) -> dict[str, tuple[str, tuple[Stage, ...]]]:
    """FILES, with those whose names a run makes up."""
    found = dict(FILES)
    for path in sorted(whole.glob("stopped/expanded/adept_*.safetensors")):
        found[str(path.relative_to(whole))] = ("safetensors", (RESUME,))
    last = max(whole.glob("stopped/checkpoints/checkpoint-*"), key=lambda path: path.name)
    forms = {".safetensors": "safetensors", ".json": "json"}
    for path in sorted(last.iterdir()):
        found[str(path.relative_to(whole))] = (forms.get(path.suffix, "bytes"), (RESUME,))
    assert all((whole / name).is_file() for name in found), [name for name in found if not (whole / name).is_file()]
    return found


def make(folder: Path, attempts: Attempts) -> None:
    """The whole run, in `folder`."""
    tiny_models.model("llama", **SMALL).save_pretrained(folder / "model", max_shard_size="40KB")
    tiny_models.tokenizer().save_pretrained(folder / "model")
    rows = [{"instruction": f"The fox counts {number} and", "output": f" {number + 1} stones"} for number in range(9)]
    texts = [{"text": sentence} for sentence in tiny_models.SENTENCES[:12]]
    (folder / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "domain.txt").write_text("\n\n".join(tiny_models.SENTENCES[12:24]))
    lines = "".join(json.dumps(row) + "\n" for row in texts)
    (folder / "domain.jsonl").write_text(lines)
    (folder / "held.jsonl").write_text(lines)
    (folder / "domain.json").write_text(json.dumps(texts))
    (folder / "domain.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    _table(texts, folder / "domain.parquet")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(GIVEN))
    for arguments, place in (
        (("score", *RECIPE), ""),
        (("run", *RECIPE), ""),
        (("run", *RECIPE, "output_dir=other", "seed=1"), ""),
        (("expand", *RECIPE, STOPPED), ""),
        (("tune", *RECIPE, STOPPED), KILLED),
        (("copies", "extract", "source=out/tuned", "target=delta"), ""),
    ):
        code, output = attempts.run(arguments, folder.parent / "made.txt", place, folder=str(folder))
        assert code == (-9 if place else 0), output


def _table(rows: list[dict[str, str]], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
