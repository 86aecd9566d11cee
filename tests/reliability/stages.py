"""Each stage of a run of a tiny model, to be disturbed: what it starts from, its command, and what it leaves when nothing disturbs it."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adept_fast.checkpoints.safetensors_index import read_header
from tests.reliability.disk_faults import Fault, environment
from tests.support import tiny_models
from tests.support.attempts import Attempts

TIMES = {"seconds", "tokens_per_second", "peak_memory"}
NAMES = ("score", "expand", "tune", "eval", "report", "copies")
COPIES = {
    "remove": ("source={out}/tuned", "target={out}/plain"),
    "extract": ("source={out}/tuned", "target={out}/delta"),
    "dial": ("source={out}/tuned", "target={out}/half", "alpha=0.5"),
    "merge": ("a={out}/tuned", "b={out}/expanded", "target={out}/both", "how=stack"),
}
CHECKPOINTS = ("expanded", "tuned", "plain", "delta", "half", "both")
OWN = (".adept_fast-", ".lock", ".scores.journal")


@dataclass(frozen=True)
class Stage:
    """before: output_dir as the stage finds it; after: its contents when the stage has run; seconds, calls: what that took."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    before: Path
    after: dict[str, Any]
    seconds: float
    calls: int


class Stages:
    """All stages, run once in order. A context manager, in whose `out` they are to be disturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.said = folder, folder / "out", folder / "said"
        tiny_models.checkpoint(folder / "model", "qwen2", attention_dropout=0.1)
        rows = [f"{sentence} It is note {number}." for number, sentence in enumerate(tiny_models.SENTENCES * 2)]
        (folder / "notes.txt").write_text("\n\n".join(rows))
        probe = [{"instruction": f"The fox counts {number} and", "output": f" {number + 1} stones"} for number in range(40)]
        (folder / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in probe))
        self.settings = (
            *(f"model_name_or_path={folder / 'model'}", f"domain={folder / 'notes.txt'}", f"output_dir={self.out}", "expand.k=2", "seed=5"),
            *(f"probe={folder / 'probe.jsonl'}", "tune.max_steps=6", "tune.save_steps=2", "tune.save_total_limit=2"),
            *("tune.refresh_steps=2", "tune.per_device_train_batch_size=1", "tune.block_size=64", "tune.weight_decay=0.1"),
            *("tune.max_items=4", "eval.max_items=4", "eval.answer_tokens=2", "score.max_items=12"),
        )

    def __enter__(self) -> Stages:
        self.attempts = Attempts({**environment(self.folder), "ADEPT_FAST_CACHE": str(self.folder / "cache")}).__enter__()
        self.all = {name: self._undisturbed(name) for name in NAMES}
        return self

    def __exit__(self, *error: object) -> None:
        self.attempts.__exit__(*error)

    def _undisturbed(self, name: str) -> Stage:
        before = self.folder / "before" / name
        self.out.mkdir(exist_ok=True)
        shutil.copytree(self.out, before)
        commands: tuple[tuple[str, ...], ...] = ((name, *self.settings),)
        if name == "copies":
            commands = tuple(("copies", action, *(each.format(out=self.out) for each in given)) for action, given in COPIES.items())
        start, calls = time.perf_counter(), 0
        for command in commands:
            code, said = self.run(command, **Fault(str(self.out)).request())
            assert code == 0, said
            calls += int(Path(f"{self.said}.calls").read_text())
        seconds = (time.perf_counter() - start) / len(commands)
        return Stage(name, commands, before, contents(self.out), seconds, calls // len(commands))

    def begin(self, stage: Stage) -> None:
        """output_dir as the stage finds it."""
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(stage.before, self.out)

    def run(self, command: tuple[str, ...], **disturbance: Any) -> tuple[int, str]:
        return self.attempts.run(command, self.said, **disturbance)

    def finish(self, stage: Stage) -> str | None:
        """Give the stage's commands again; what is wrong with how it ends."""
        for command in stage.commands:
            target = next((each.removeprefix("target=") for each in command if each.startswith("target=")), "")
            if target and Path(target).exists():  # copies writes to what is new only
                continue
            code, said = self.run(command)
            if code:
                return f"the same command ended with {code}: {said}"
        found = contents(self.out)
        wrong = [name for name in sorted({*found, *stage.after}) if found.get(name) != stage.after.get(name)]
        return f"{', '.join(wrong)}: not as without the disturbance" if wrong else None

    def torn(self, stage: Stage) -> list[str]:
        """What stands under a final name and is not whole."""
        if not self.out.exists():
            return []
        found, before = contents(self.out), contents(stage.before)
        wrong = [name for name in before if name not in found and not name.startswith("checkpoints/")]  # was lost
        for name, content in found.items():
            if name.startswith("checkpoints/checkpoint-"):
                wrong += [] if _whole(self.out / name) else [name]
            elif name == "trainer_log.jsonl":
                wrong += [] if content is not None and stage.after[name][: len(content)] == content else [name]
            elif content is None or (name.partition("/")[0] in CHECKPOINTS and content not in (stage.after[name], before.get(name))):
                wrong.append(name)
        return wrong


def contents(folder: Path) -> dict[str, Any]:
    """Relative name -> content of each artefact, without times; None for what is not whole. Of checkpoints the trained tensors."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.startswith(OWN) or "/.adept_fast-" in name:
            continue
        if name.startswith("checkpoints/") and path.name != "adept_copies.safetensors":
            continue
        found[name] = _content(path)
    return found


def _content(path: Path) -> Any:
    content = path.read_bytes()
    try:
        if path.suffix == ".json":
            return _timeless(json.loads(content))
        if path.suffix == ".jsonl":
            return [_timeless(json.loads(line)) for line in content.decode().split("\n")[:-1]]  # the last may be cut, which is repaired
        if path.suffix == ".safetensors":
            read_header(path)
        ending = {".png": b"IEND\xaeB`\x82", ".html": b"</html>"}.get(path.suffix, b"")
        return content if content.rstrip().endswith(ending) else None
    except ValueError:
        return None


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(each) for key, each in value.items() if key not in TIMES}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


def _whole(copies: Path) -> bool:
    """Whether a checkpoint that stands under its name can be gone on from."""
    folder = copies.parent
    try:
        read_header(copies)
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(folder / name, weights_only=True)
        return json.loads((folder / "trainer_state.json").read_text())["global_step"] == int(folder.name.rpartition("-")[2])
    except (OSError, RuntimeError, ValueError):
        return False
