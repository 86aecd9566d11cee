"""`adept-fast copies ACTION`: edit copies on disk. An action's keys are the arguments of its function in adept_fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adept_fast.errors import InputError
from adept_fast.settings import key_value
from adept_fast.settings.validation import require_path


@dataclass(frozen=True, kw_only=True)
class Remove:
    source: str
    target: str
    copies: tuple[int, ...] | None = None
    verify: bool = True
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Extract:
    source: str
    target: str
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Apply:
    base: str
    delta: str
    target: str
    verify: bool = True
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Merge:
    a: str
    b: str
    target: str
    weights: tuple[float, ...] = (0.5, 0.5)
    how: str = "average"
    verify: bool = True
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Dial:
    source: str
    target: str
    alpha: float
    verify: bool = True
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Action:
    """One action. function: its name in adept_fast. proven: the statement that it verifies of the result."""

    function: str
    keys: type
    what: str
    example: str
    proven: str = "its base is in it bit for bit"


ACTIONS = {
    "remove": Action("remove_copies", Remove, "take copies out again; without any it is the original", "source=out/tuned target=plain"),
    "extract": Action("extract_copies", Extract, "write the copies alone, a small checkpoint", "source=out/tuned target=delta"),
    "apply": Action("apply_copies", Apply, "put extracted copies into the base they belong to", "base=MODEL delta=delta target=tuned"),
    "merge": Action(
        "merge_copies",
        Merge,
        "average or stack the copies of two models made on one base",
        "a=law/tuned b=medicine/tuned target=both how=stack",
        "the base is in it bit for bit, its logits are finite",
    ),
    "dial": Action("dial", Dial, "the share alpha of what training made of the copies", "source=out/tuned target=half alpha=0.5"),
}


def run(action: str, given: Sequence[str]) -> str:
    """Run an action, and return the line that states what was written and what was verified. Raises InputError."""
    import adept_fast
    from adept_fast.checkpoints import checkpoint
    from adept_fast.checkpoints.adept_config import AdeptConfig

    chosen = ACTIONS[action]
    settings = vars(key_value.settings(chosen.keys, given))
    folders = {key: require_path(key, settings[key]) for key in ("target", "delta") if key in settings}
    target = folders["target"]
    if target.exists():
        raise InputError(f"target: {target} exists already: remove it or choose another target")
    saved_again = action == "remove" and AdeptConfig.load(checkpoint.resolve(settings["source"]).path).source.get("saved_again")
    record = getattr(adept_fast, chosen.function)(**{**settings, **folders})
    if record is None:
        written, proven = "the original without copies", f"it is the original{' as it was saved again' if saved_again else ''} bit for bit"
    else:
        written, proven = f"copies at layers {', '.join(map(str, record.copies))}", chosen.proven
    if record is not None and action == "extract":
        return f"{target}: {written}, alone; of base {record.source['name_or_path']}, which apply checks and proves"
    return f"{target}: {written}; " + (f"proven: {proven}" if settings["verify"] else "not compared (verify=false)")
