"""Write a plan as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from tqdm import tqdm

from adept_fast.pipeline.planning.planned_stages import DUE, Plan, StageEstimate

GB, MB = 1e9, 1e6


def lines(plan: Plan) -> list[str]:
    """Return the plan, a line each; what was read, samples and steps are logged while they are made."""
    return [*_beginning(plan), *_table(plan), *_end(plan)]


def clock(seconds: float | None) -> str:
    """Write seconds as 1:05 or 2:01:05."""
    return "?" if seconds is None else str(tqdm.format_interval(max(1, round(seconds)))).removeprefix("0")


def shown(size: float | None) -> str:
    """Write bytes as GB, or MB below a tenth of one."""
    return "?" if size is None else f"{size / GB:.2f} GB" if size >= GB / 10 else f"{size / MB:.1f} MB"


def _beginning(plan: Plan) -> Iterator[str]:
    yield f"model: {plan.model}, {plan.parameters:,} parameters in {plan.dtype}, timed on {plan.device}"
    if plan.held_out:
        yield f"held out: {plan.held_out}"
    if plan.training is not None and plan.training.one_per_row:
        yield f"this model leaks across packed documents, so it trains one document a row; {plan.training}"
    if plan.layers:
        where = "not scored yet, so evenly spaced ones stand in for them: " if plan.assumed else ""
        yield f"copies: of {len(plan.layers)} layers ({where}{', '.join(map(str, plan.layers))})"


def _table(plan: Plan) -> Iterator[str]:
    yield f"{'stage':<8}{'state':<12}{'time':>9}{'peak memory':>14}   of which"
    for stage in plan.stages:
        yield f"{stage.name:<8}{stage.state:<12}{_time(stage):>9}{_peak(stage):>14}   {_parts(stage)}".rstrip()
    yield f"{'all':<20}{clock(plan.seconds):>9}{shown(plan.peak):>14}   of {shown(plan.capacity)} there"


def _time(stage: StageEstimate) -> str:
    return clock(stage.seconds) if stage.state in DUE else "-"


def _peak(stage: StageEstimate) -> str:
    return "-" if stage.state not in DUE or stage.peak is None else shown(stage.peak)


def _parts(stage: StageEstimate) -> str:
    return ", ".join(f"{name} {clock(seconds)}" for name, seconds in (stage.parts or {}).items() if round(seconds))


def _end(plan: Plan) -> Iterator[str]:
    if plan.shares is not None:
        shares = f"parameters {plan.shares['parameters']:.1%}, time {plan.shares['time']:.0%}"
        yield f"share of full training: {shares} (modelled); the same tokens would take it {clock(plan.full_seconds)}"
    yield f"disk: {shown(plan.written)} to write, {shown(plan.free)} free"
    if plan.counted is not None:
        parts = ", ".join(f"{name} {shown(getattr(plan.counted, name))}" for name in ("weights", "gradients", "states", "activations"))
        yield f"tuning on a GPU: {shown(plan.counted.total)} of its memory, counted from shapes and not tried there ({parts})"
    for warning in plan.warnings:
        yield f"warning: {warning}"
    if plan.suggestions:
        yield "suggested, to be pasted behind the command:"
        width = max(len(str(suggestion)) for suggestion in plan.suggestions)
        yield from (f"  {suggestion!s:<{width}}   # {suggestion.reason}" for suggestion in plan.suggestions)
