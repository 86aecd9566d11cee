"""Show the answers of base and tuned model to one prompt side by side, with the words in which they differ marked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

from adept_fast.evaluation.results import Answer

WORD = re.compile(r"\s*\S+|\s+$")
SPACE = re.compile(r"(^\s+|\s*\n\s*)")
SOURCES = {
    "domain": "a domain document that was not trained on",
    "general": "the general probe",
    "eval.prompts": "eval.prompts",
}

Pieces = tuple[tuple[str, bool], ...]
"""A text in pieces, each with whether it differs from the other text."""


@dataclass(frozen=True)
class Pair:
    """What the page shows of an answer. base, tuned: empty where there is no such answer"""

    prompt: str
    source: str
    reference: str | None
    reference_is: str
    base: Pieces
    tuned: Pieces
    same: bool


def pair(answer: Answer) -> Pair:
    """Compare both answers word by word."""
    reference = "How the document goes on" if answer.from_ == "domain" else "The reference answer"
    about = answer.prompt.strip(), SOURCES.get(answer.from_, answer.from_), answer.reference and answer.reference.strip(), reference
    if answer.base is None or answer.tuned is None:
        return Pair(*about, _alone(answer.base), _alone(answer.tuned), False)
    ours, theirs = WORD.findall(answer.base.strip()), WORD.findall(answer.tuned.strip())
    kept: tuple[set[int], set[int]] = (set(), set())
    for block in SequenceMatcher(None, [*map(str.strip, ours)], [*map(str.strip, theirs)], autojunk=False).get_matching_blocks():
        kept[0].update(range(block.a, block.a + block.size))
        kept[1].update(range(block.b, block.b + block.size))
    base, tuned = _pieces(ours, kept[0]), _pieces(theirs, kept[1])
    return Pair(*about, base, tuned, answer.base == answer.tuned)


def _alone(text: str | None) -> Pieces:
    return () if text is None else ((text.strip(), False),)


def _pieces(words: Sequence[str], kept: set[int]) -> Pieces:
    """Join neighbours of a kind. Of a marked piece each line is marked, without the space before it."""
    joined: list[tuple[str, bool]] = []
    for marked, group in groupby(enumerate(words), key=lambda entry: entry[0] not in kept):
        text = "".join(word for _, word in group)
        joined += [(part, marked and not part.isspace()) for part in SPACE.split(text)] if marked else [(text, False)]
    return tuple(piece for piece in joined if piece[0])
