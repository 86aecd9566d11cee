"""Split records and texts by content hash, so that a record serves one purpose, whatever file or order it comes in."""

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
    """The parts of a probe that score layers, steer unit rates, and report the general loss. Only the last is shown as a result."""

    scoring: list[Record]
    steering: list[Record]
    reporting: list[Record]


def by_hash(records: Sequence[Record], seed: int = 0) -> list[Record]:
    """Order records by their content hash, with `seed` mixed in, and drop duplicates."""
    unique = {content_hash({"seed": seed, "record": record.content}): record for record in records}
    return [unique[key] for key in sorted(unique)]


def split_probe(records: Sequence[Record], name: str) -> ProbeParts:
    """Split a probe into 60 % for scoring, 20 % for steering and 20 % for reporting, at least one each."""
    ordered = by_hash(records)
    if len(ordered) < 3:
        raise InputError(f"{name}: a probe needs at least 3 different items (to score, to steer, to report), found {len(ordered)}")
    scoring = min(round(len(ordered) * SCORING), len(ordered) - 2)
    steering = scoring + round(len(ordered) * STEERING)
    return ProbeParts(ordered[:scoring], ordered[scoring:steering], ordered[steering:])


def is_held_out(text: str, share: float = HELD_OUT) -> bool:
    """Whether a text's hash is among the lowest `share` of all hashes. Unlike `hold_out` this needs no other text."""
    return int.from_bytes(_hash(text)[:8], "big") < share * 2**64


def hold_out_of_streams(streams: Iterable[Iterable[str]], name: str, most: int) -> tuple[set[str], float]:
    """Return the texts to measure on, the first `most` of each stream that fall out, and the share of texts not to train on.

    With fewer documents than FEW, all are read, `hold_out` picks one, and the share is 0. At least one is held out in any case.
    """
    held: set[str] = set()
    few: set[str] = set()
    lowest: str | None = None
    for texts in streams:
        fallen = 0
        for text in texts:
            if len(few) < FEW:
                few.add(text)
            if is_held_out(text):
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
    """Select a share of the distinct texts to hold out, by hash, so that duplicates stay on one side. At least one is, and one is not."""
    ordered = sorted(set(texts), key=_hash)
    if len(ordered) < 2:
        found = "one document only, none to hold out" if ordered else "no document: all its records are empty"
        raise InputError(f"{name}: {found}: add documents (in a .txt a blank line parts them)")
    return set(ordered[: max(1, min(round(len(ordered) * share), len(ordered) - 1))])


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
