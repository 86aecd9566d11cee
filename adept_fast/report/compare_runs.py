"""Compare runs: what each recipe gained and lost against the base and against the first, in compare.html and compare.json."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from adept_fast.errors import InputError
from adept_fast.evaluation.results import Change, CorpusChange
from adept_fast.report.compare_charts import trade_off, trajectories
from adept_fast.report.differences import tone
from adept_fast.report.drawing import to_svg
from adept_fast.report.evaluated_runs import MEASURES, Group, Spread, grouped, load_run, measures
from adept_fast.report.numbers import interval, number, signed
from adept_fast.report.page_templates import render
from adept_fast.runtime.atomic_files import write_json, write_text
from adept_fast.settings.typed_json import as_json
from adept_fast.settings.validation import require_path

logger = logging.getLogger(__name__)


def compare(folders: Sequence[str | Path], target: str | Path) -> Path:
    """Write compare.json and compare.html of evaluated output_dirs to the folder `target`, and return the page's path.

    Runs whose recipes differ only in the seed are one group. Differences are paired: each item with itself, averaged over the seeds. The
    losses of each group are logged. Raises InputError for a folder without a result, fewer than two runs, and runs that were measured on
    different items.
    """
    runs = [load_run(Path(os.path.expanduser(folder))) for folder in dict.fromkeys(map(str, folders))]
    if len(runs) < 2:
        raise InputError("compare needs two output_dirs or more: adept-fast compare out/a out/b")
    groups, base = grouped(runs), measures([runs[0].results.base])
    for name, row in [("base", base), *((group.name, group.measures) for group in groups)]:
        losses = (" ".join(filter(None, (measure.title, *_cell(row.get(measure.title), measure.digits)))) for measure in MEASURES[:2])
        logger.info(f"{name}: {', '.join(losses)} nats per token")
    target = require_path("target", target)
    page, rows = target / "compare.html", {"base": _row(base), **{group.name: _entry(group, groups) for group in groups}}
    text = render("compare.html", _context(base, groups))
    write_json(target / "compare.json", {"schema": 2, "rows": rows})
    write_text(page, text)
    return page


def _row(row: dict[str, Spread]) -> dict[str, object]:
    return {title: spread.as_dict() for title, spread in row.items()}


def _entry(group: Group, groups: Sequence[Group]) -> dict[str, object]:
    """Return the content of compare.json on one group."""
    return {
        "seeds": [run.seed for run in group.runs],
        "folders": [str(run.folder) for run in group.runs],
        "tokens": group.tokens,
        "tokens_per_second": group.speed,
        "pareto": group in front(groups),
        "against base": as_json(group.against_base),
        "against first": as_json(group.against(groups[0])) if group is not groups[0] else None,
        **_row(group.measures),
    }


def front(groups: Sequence[Group]) -> list[Group]:
    """Return the groups on the Pareto front: no other has both a lower domain and a lower general loss. Sorted by domain loss."""

    def ahead(one: Group, other: Group) -> bool:
        return one.place != other.place and all(ours <= theirs for ours, theirs in zip(one.place, other.place, strict=True))

    return sorted((group for group in groups if not any(ahead(other, group) for other in groups)), key=lambda group: group.place)


def _cell(spread: Spread | None, digits: int) -> tuple[str, str]:
    if spread is None:
        return number(None), ""
    return number(spread.mean, digits), "" if spread.spread is None else f"\N{PLUS-MINUS SIGN} {number(spread.spread, digits)}"


def _context(base: dict[str, Spread], groups: Sequence[Group]) -> dict[str, object]:
    first, best = groups[0], front(groups)
    rows = [("base", base), *((group.name, group.measures) for group in groups)]
    shown = [measure for measure in MEASURES if any(measure.title in row for _, row in rows)]
    learnt, kept = (min(groups, key=lambda group: group.against_base[corpus].loss.value) for corpus in ("domain", "general"))
    course = trajectories(groups)
    return {
        "titles": [measure.title for measure in shown],
        "rows": [(name, [_cell(row.get(measure.title), measure.digits) for measure in shown]) for name, row in rows],
        "groups": groups,
        "front": [group.name for group in best],
        "learnt": (learnt.name, _short(learnt.against_base["domain"].loss)),
        "kept": (kept.name, _short(kept.against_base["general"].loss)),
        "trade_off": to_svg(trade_off(groups, best)),
        "trajectories": None if course is None else to_svg(course),
        "against": [
            ("the base", _table([(group.name, group.against_base) for group in groups])),
            (first.name, _table([(group.name, group.against(first)) for group in groups[1:]])),
        ],
        "several_seeds": any(len(group.runs) > 1 for group in groups),
        "tokens": sorted({group.tokens for group in groups if group.tokens}),
    }


def _short(change: Change) -> str:
    return f"{signed(change.value)} nats per token {interval(change.low, change.high)}"


def _table(changes: Sequence[tuple[str, Mapping[str, CorpusChange]]]) -> dict[str, object]:
    """Lay out changes: a row a recipe, a column for the loss of each corpus and for the accuracy on its questions."""
    corpora = list(dict.fromkeys(corpus for _, found in changes for corpus in found))
    asked = [corpus for corpus in corpora if any(corpus in found and found[corpus].accuracy for _, found in changes)]

    def cell(change: Change | None, factor: int, digits: int) -> dict[str, str]:
        if change is None:
            return {"value": number(None), "interval": "", "tone": ""}
        bounds = interval(factor * change.low, factor * change.high, digits)
        return {"value": signed(factor * change.value, digits), "interval": bounds, "tone": tone(change, factor > 1)}

    def cells(found: Mapping[str, CorpusChange]) -> Iterator[dict[str, str]]:
        for corpus in corpora:
            yield cell(found[corpus].loss if corpus in found else None, 1, 3)
        for corpus in asked:
            yield cell(found[corpus].accuracy if corpus in found else None, 100, 1)

    titles = [*(f"{corpus} loss" for corpus in corpora), *(f"{corpus} accuracy (points)" for corpus in asked)]
    return {"titles": titles, "rows": [(name, list(cells(found))) for name, found in changes]}
