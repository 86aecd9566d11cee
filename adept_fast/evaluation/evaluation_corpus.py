"""What a model is evaluated on: texts and instructions (loss) and multiple-choice questions (loss of the right answer, and accuracy)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adept_fast.data.items import Choices, Item, is_choice, tokenize_choices, tokenize_item
from adept_fast.data.sources import Record
from adept_fast.errors import InputError
from adept_fast.models.losses import Candidates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvaluationCorpus:
    """items: what the loss is taken on. candidates and answers: for questions, one an item; else empty."""

    name: str
    items: tuple[Item, ...]
    candidates: tuple[Candidates, ...] = ()
    answers: tuple[int, ...] = ()


def corpus(
    name: str, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int, vocabulary: int | None = None
) -> EvaluationCorpus:
    """Tokenise records, all questions or none. Texts are cut to `max_length` tokens; questions that are longer are left out.

    vocabulary: what the tokens of records that are tokenised already must be below.
    """
    questions = [record for record in records if is_choice(record)]
    if questions and len(questions) < len(records):
        other = next(record for record in records if not is_choice(record))
        raise InputError(f"{other.where}: no 'choices', as other records of {name} have: keep questions and texts in separate files")
    if not questions:
        items = [_cut(tokenize_item(record, tokenizer, vocabulary=vocabulary), max_length) for record in records]
        items = [item for item in items if item.supervised]
        if not items:
            raise InputError(f"{name}: no supervised token within the model's {max_length} positions")
        return EvaluationCorpus(name, tuple(items))
    asked = [tokenize_choices(record, tokenizer) for record in questions]
    asked = [choices for choices in asked if max(len(option.input_ids) for option in choices.options) <= max_length]
    if not asked:
        raise InputError(f"{name}: no question fits the model's {max_length} positions")
    return EvaluationCorpus(
        name,
        tuple(choices.options[choices.answer] for choices in asked),
        tuple(map(_first_difference, asked)),
        tuple(choices.answer for choices in asked),
    )


def _cut(item: Item, length: int) -> Item:
    return Item(item.input_ids[:length], item.labels[:length])


def _first_difference(choices: Choices) -> Candidates:
    """The options share their prompt; the first token in which they differ is the letter, and its likelihood decides."""
    options = [option.input_ids for option in choices.options]
    at = next((at for at in range(min(map(len, options))) if len({option[at] for option in options}) > 1), None)
    if at is None:
        raise InputError(f"a question of {len(options)} choices: the tokenizer gives some of their letters the same tokens")
    return Candidates(at - 1, tuple(option[at] for option in options))
