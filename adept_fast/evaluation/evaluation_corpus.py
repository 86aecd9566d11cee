"""Tokenise an evaluation corpus: texts and instructions (loss), or multiple-choice questions (loss of the right answer, and accuracy)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adept_fast.data.encoding import Encoder
from adept_fast.data.items import Choices, Item, is_choice, tokenize, tokenize_choices
from adept_fast.data.sources import Record
from adept_fast.errors import InputError
from adept_fast.models.losses import Candidates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationCorpus:
    """A tokenised corpus.

    items: the sequences whose loss is measured. candidates, answers: for questions one an item, otherwise empty.
    """

    name: str
    items: tuple[Item, ...]
    candidates: tuple[Candidates, ...] = ()
    answers: tuple[int, ...] = ()


def corpus(
    name: str, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase | Encoder, max_length: int, vocabulary: int | None = None
) -> EvaluationCorpus:
    """Tokenise records, which are all questions or all texts.

    Texts are cut to `max_length` tokens; longer questions are left out; warnings count both. vocabulary: the bound on the ids of records
    that are tokenised already. Raises InputError for a mixture of both, and where nothing is left to evaluate.
    """
    questions = [record for record in records if is_choice(record)]
    if questions and len(questions) < len(records):
        other = next(record for record in records if not is_choice(record))
        raise InputError(f"{other.where}: no 'choices', as other records of {name} have: keep questions and texts in separate files")
    if not questions:
        found, total = tokenize(records, tokenizer, limit=max_length, overlong="cut", vocabulary=vocabulary), len(records)
        if not found.items:
            raise InputError(f"{name}: no supervised token within the first {max_length} tokens of its texts")
        cut = f"are longer than {max_length} tokens: the loss is taken on their first {max_length}"
        _warn(name, found.overlong, total, "texts", cut)
        _warn(name, found.unsupervised, total, "texts", f"have no supervised token in their first {max_length}: they are left out")
        return EvaluationCorpus(name, tuple(found.items))
    every = [tokenize_choices(record, tokenizer) for record in questions]
    asked = [choices for choices in every if max(len(option.input_ids) for option in choices.options) <= max_length]
    if not asked:
        raise InputError(f"{name}: no question fits in {max_length} tokens")
    _warn(name, len(every) - len(asked), len(every), "questions", f"do not fit in {max_length} tokens: they are left out")
    return EvaluationCorpus(
        name,
        tuple(choices.options[choices.answer] for choices in asked),
        tuple(map(_first_difference, asked)),
        tuple(choices.answer for choices in asked),
    )


def _warn(name: str, count: int, total: int, what: str, fate: str) -> None:
    if count:
        logger.warning(f"{name}: {count:,} of {total:,} {what} {fate}")


def _first_difference(choices: Choices) -> Candidates:
    """Return the letters of a question: the options share their prompt, and the first token in which they differ is the letter."""
    options = [option.input_ids for option in choices.options]
    at = next((at for at in range(min(map(len, options))) if len({option[at] for option in options}) > 1), None)
    if at is None:
        raise InputError(f"a question of {len(options)} choices: the tokenizer gives some of their letters the same tokens")
    return Candidates(at - 1, tuple(option[at] for option in options))
