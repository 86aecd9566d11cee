"""One case: a copy of a whole run in which one file is damaged, a stage that reads it, and the verdict on how that ended."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from adept_fast.errors import InputError
from adept_fast.pipeline.recipe import Recipe
from adept_fast.settings.key_value import keys_of
from tests.fuzz.files import Stage, files, make
from tests.fuzz.mutations import changed, replaced, rewritten
from tests.support.attempts import Attempts

CPU = 20  # seconds; a stage takes about one
WALL = 300
MEMORY = 2 << 30  # bytes that a stage may take more than it has when it is forked
KEYS = {"domain": "(domain", "probe": "steering items", "held": "eval.domain"}  # what is said of data that are other data now
LONGEST = 1500  # characters of a message


@dataclass(frozen=True)
class Verdict:
    """fault: what is wrong with how the case ended; nothing where all is right."""

    number: int
    file: str
    damage: str
    command: str
    code: int
    line: str
    fault: str = ""

    def again(self, seed: int) -> str:
        return f"python -m tests.fuzz --seed {seed} --only {self.number}"


class Fuzzer:
    """Runs cases by number, each drawn from the seed and its own number alone."""

    def __init__(self, folder: Path, attempts: Attempts, seed: int) -> None:
        self.folder, self.attempts, self.seed = folder, attempts, seed
        self.whole = folder / "whole"
        self.whole.mkdir()
        make(self.whole, attempts)
        self.files = files(self.whole)
        weights = {name: max(stage.weight for stage in stages) for name, (_, stages) in self.files.items()}
        self.names, self.weights = list(weights), list(weights.values())
        self.keys = {part for key in keys_of(Recipe) for part in (key, key.rpartition(".")[2])}

    def run(self, number: int) -> Verdict:
        random = Random(f"{self.seed} {number}")
        name = random.choices(self.names, self.weights)[0]
        form, stages = self.files[name]
        stage = random.choices(stages, [stage.weight for stage in stages])[0]
        case = self.folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(self.whole, case)
        content, neutral = (case / name).read_bytes(), None
        drawn = random.random()
        if drawn < 0.06 and (neutral := rewritten(content, form)) is not None:
            damage = "written otherwise"
            (case / name).write_bytes(neutral)
        elif drawn < 0.12:
            damage = replaced(case / name, random)
        else:
            damage, damaged = changed(content, form, random)
            (case / name).write_bytes(damaged)
        errors = self.folder / "errors.txt"
        limits = {"seconds": WALL, "cpu": CPU, "memory": MEMORY}
        code, _ = self.attempts.run(stage.arguments, self.folder / "said.txt", folder=str(case), errors=str(errors), **limits)
        line = errors.read_text(errors="replace").strip()
        fault = self._fault(case, name, stage, code, line)
        return Verdict(number, name, damage.encode("ascii", "backslashreplace").decode(), " ".join(stage.arguments), code, line, fault)

    def _fault(self, case: Path, name: str, stage: Stage, code: int, line: str) -> str:
        if code == 0:
            try:
                stage.proves(case)
            except (AssertionError, InputError, OSError) as error:
                return f"exit 0, but the result is not right: {error!r}"
            return ""
        if code != 2:
            return f"exit {code}"
        if "\n" in line or not line.startswith("adept-fast: ") or len(line) > LONGEST:
            return "exit 2, but not with one line"
        return "" if self._named(name, line) else "exit 2, but nothing names the file"

    def _named(self, name: str, line: str) -> bool:
        """By its path, or by its folder's where the fault is the folder's; a recipe by the key."""
        path = Path(name)
        places = {name, *(str(parent) for parent in path.parents if str(parent) not in (".", "out", "stopped"))}
        if any(place in line for place in places) or (len(path.parts) == 1 and KEYS.get(path.stem, "none") in line):
            return True
        said = [key for found in re.findall(r"[a-z_.]+[a-z_]", line) for key in (found, found.rpartition(".")[0])]  # probe.path is of probe
        return path.name == "recipe.yaml" and (any(key in self.keys for key in said) or "no such" in line or "neither a file nor" in line)


@contextmanager
def fuzzer(seed: int) -> Iterator[Fuzzer]:
    with TemporaryDirectory(prefix="fuzz-") as folder:
        environment = {"ADEPT_FAST_CACHE": str(Path(folder) / "cache"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        with Attempts(environment) as attempts:
            yield Fuzzer(Path(folder), attempts, seed)
