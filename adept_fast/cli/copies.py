"""`adept-fast copies ACTION`: edit copies on disk. An action's keys are the arguments of its function in adept_fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adept_fast.errors import InputError
from adept_fast.expansion.settings import ALPHA, MERGES
from adept_fast.settings import key_value
from adept_fast.settings.validation import declare, require_path

EXPANDED, TARGET = "an expanded or tuned model", "folder to write, which must not exist yet"
VERIFY, CODE = "compare the result with its base; false leaves a note in the record", "run the Python code that comes with a model"


@dataclass(frozen=True, kw_only=True)
class Remove:
    source: str = declare(meaning=EXPANDED)
    target: str = declare(meaning=TARGET)
    copies: tuple[int, ...] | None = declare(None, meaning="the copies at these layers only: [3, 8]; null: all, which gives the original")
    verify: bool = declare(True, meaning=VERIFY)
    trust_remote_code: bool = declare(False, meaning=CODE)


@dataclass(frozen=True, kw_only=True)
class Extract:
    source: str = declare(meaning=EXPANDED)
    target: str = declare(meaning=TARGET)
    trust_remote_code: bool = declare(False, meaning=CODE)


@dataclass(frozen=True, kw_only=True)
class Apply:
    base: str = declare(meaning="the model that the copies were made on")
    delta: str = declare(meaning="folder that copies extract wrote")
    target: str = declare(meaning=TARGET)
    verify: bool = declare(True, meaning=VERIFY)
    trust_remote_code: bool = declare(False, meaning=CODE)


@dataclass(frozen=True, kw_only=True)
class Merge:
    a: str = declare(meaning="a tuned model")
    b: str = declare(meaning="another one, made on the same base; to average, with copies of the same layers")
    target: str = declare(meaning=TARGET)
    weights: tuple[float, ...] = declare((0.5, 0.5), meaning="of a and b in the average; they sum to 1")
    how: str = declare("average", MERGES, "one copy in the place of two, or all copies in one model")
    verify: bool = declare(True, meaning=VERIFY)
    trust_remote_code: bool = declare(False, meaning=CODE)


@dataclass(frozen=True, kw_only=True)
class Dial:
    source: str = declare(meaning="a tuned model")
    target: str = declare(meaning=TARGET)
    alpha: float = declare(bounds=ALPHA, meaning="0 gives the base, 1 the tuned model; above 1 extrapolates")
    verify: bool = declare(True, meaning=VERIFY)
    trust_remote_code: bool = declare(False, meaning=CODE)


FUNCTIONS = {"remove": "remove_copies", "extract": "extract_copies", "apply": "apply_copies", "merge": "merge_copies", "dial": "dial"}
KINDS = {"remove": Remove, "extract": Extract, "apply": Apply, "merge": Merge, "dial": Dial}


def run(name: str, words: Sequence[str]) -> str:
    """Run an action, and return the line that states what was written and what was verified. Raises InputError."""
    import adept_fast
    from adept_fast.checkpoints import checkpoint
    from adept_fast.checkpoints.adept_config import AdeptConfig

    action = name.removeprefix("copies ")
    settings = vars(key_value.settings(KINDS[action], words))
    folders = {key: require_path(key, settings[key]) for key in ("target", "delta") if key in settings}
    target = folders["target"]
    if target.exists():
        raise InputError(f"target: {target} exists already: remove it or choose another target")
    saved_again = action == "remove" and AdeptConfig.load(checkpoint.resolve(settings["source"]).path).source.get("saved_again")
    record = getattr(adept_fast, FUNCTIONS[action])(**{**settings, **folders})
    if record is None:
        written, proven = "the original without copies", f"it is the original{' as it was saved again' if saved_again else ''} bit for bit"
    else:
        written, proven = f"copies at layers {', '.join(map(str, record.copies))}", "its base is in it bit for bit"
    if record is not None and action == "extract":
        return f"{target}: {written}, alone; of base {record.source['name_or_path']}, which apply checks and proves"
    if action == "merge":
        proven = "the base is in it bit for bit, its logits are finite"
    return f"{target}: {written}; " + (f"proven: {proven}" if settings["verify"] else "not compared (verify=false)")
