"""One item, one purpose: splits by content hash, so that the same record gets the same purpose whatever file or order it comes in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adept_fast.data.items import content_hash
from adept_fast.data.sources import Record
from adept_fast.errors import InputError

HELD_OUT = 0.02
FEW = 75  # documents; of fewer HELD_OUT rounds to one
SCORING, STEERING = 0.6, 0.2  # the rest reports


@dataclass(frozen=True)
class ProbeParts:
    """The parts that score layers, steer unit rates, and report general loss. Only the last is shown as a result."""

    scoring: list[Record]
    steering: list[Record]
    reporting: list[Record]


def by_hash(records: Sequence[Record], seed: int = 0) -> list[Record]:
    """Records in the order of their content hash (with `seed` mixed in); a copy of an earlier record is left out."""
    unique = {content_hash({"seed": seed, "record": record.content}): record for record in records}
    return [unique[key] for key in sorted(unique)]


def split_probe(records: Sequence[Record], name: str) -> ProbeParts:
    """60 % scoring, 20 % steering, 20 % reporting, each at least one."""
    ordered = by_hash(records)
    if len(ordered) < 3:
        raise InputError(f"{name}: a probe needs at least 3 different items (to score, to steer, to report), found {len(ordered)}")
    scoring = min(round(len(ordered) * SCORING), len(ordered) - 2)
    steering = scoring + round(len(ordered) * STEERING)
    return ProbeParts(ordered[:scoring], ordered[scoring:steering], ordered[steering:])


def falls_out(text: str, share: float = HELD_OUT) -> bool:
    """Whether a text's hash is among the lowest `share` of all hashes: what can be told of one text without the others."""
    return int.from_bytes(_hash(text)[:8], "big") < share * 2**64


def hold_out_of_streams(streams: Iterable[Iterable[str]], name: str, most: int) -> tuple[set[str], float]:
    """(texts to measure on, share): of each stream the first `most` that fall out; whatever falls out by `share` is not trained on.

    Fewer documents than FEW are read whole: one is held out then, the one that `hold_out` takes, and the share is 0. At least one is held
    out of more, too.
    """
    held: set[str] = set()
    few: set[str] = set()
    lowest: str | None = None
    for texts in streams:
        fallen = 0
        for text in texts:
            if len(few) < FEW:
                few.add(text)
            if falls_out(text):
                held.add(text)
                fallen += 1
                if fallen >= most and len(few) == FEW:
                    break
            elif lowest is None or _hash(text) < _hash(lowest):
                lowest = text
    if len(few) < FEW:
        return hold_out(sorted(few), name), 0.0
    return held or {str(lowest)}, HELD_OUT


def hold_out(texts: Sequence[str], name: str, share: float = HELD_OUT) -> set[str]:
    """The texts to hold out: a share of the different ones, by hash, so that every copy falls on one side. At least one is, one is not."""
    ordered = sorted(set(texts), key=_hash)
    if len(ordered) < 2:
        found = "one document only, none to hold out" if ordered else "no document: all its records are empty"
        raise InputError(f"{name}: {found}: add documents (in a .txt a blank line parts them)")
    return set(ordered[: max(1, min(round(len(ordered) * share), len(ordered) - 1))])


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
