"""One item, one purpose: splits by content hash, so that the same record gets the same purpose whatever file or order it comes in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from adept_fast.data.items import content_hash
from adept_fast.data.sources import Record
from adept_fast.errors import InputError

HELD_OUT = 0.02
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
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def hold_out(texts: Sequence[str], name: str, share: float = HELD_OUT) -> set[str]:
    """The texts to hold out: a share of the different ones, by hash, so that every copy falls on one side. At least one is, one is not."""
    ordered = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(ordered) < 2:
        found = "one document only, none to hold out" if ordered else "no document: all its records are empty"
        raise InputError(f"{name}: {found}: add documents (in a .txt a blank line parts them)")
    return set(ordered[: max(1, min(round(len(ordered) * share), len(ordered) - 1))])
