"""Tokenise records into items. A text is supervised on all its tokens; a record with answers on the tokens of its answers only.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from adept_fast.data.encoding import Encoder
from adept_fast.data.readers import read
from adept_fast.data.records import IGNORE, Chat, Item, MalformedRecord, PromptAnswer, Question, Text, parse_record
from adept_fast.data.source_files import source_files
from adept_fast.data.source_summary import SourceSummary
from adept_fast.data.sources import TEMPLATES, Record, Source
from adept_fast.data.templates import as_chat, prompt_and_answer, question_prompt, rendered
from adept_fast.errors import InputError
from adept_fast.settings.validation import require, require_made

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES = TEMPLATES
OVERLONG = ("drop", "cut")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokenized:
    """Result of `tokenize`.

    items: items with at least one supervised token
    overlong: how many records were longer than the limit
    unsupervised: how many others have no supervised token, or none left after cutting
    """

    items: list[Item]
    overlong: int
    unsupervised: int


@dataclass(frozen=True)
class Choices:
    """A multiple-choice question: one sequence per choice, all with the same prompt. answer: the index of the right one."""

    options: tuple[Item, ...]
    answer: int


def content_hash(content: Mapping[str, Any]) -> str:
    """Return the sha256 of a record's content, which determines its part of a split, independent of its file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str).encode(errors="surrogatepass")).hexdigest()


def is_choice(record: Record) -> bool:
    return isinstance(parse_record(record), Question)


def is_tokenised(record: Record) -> bool:
    return isinstance(parse_record(record), Item)


def tokenize(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase | Encoder,
    *,
    limit: int,
    overlong: str,
    style: str = "plain",
    vocabulary: int | None = None,
) -> Tokenized:
    """Tokenise records to measure on: probe items, held-out documents, evaluation texts.

    limit: tokens
    overlong: "drop" leaves out longer records, "cut" keeps their first tokens
    style, vocabulary: as of tokenize_item
    """
    require("overlong", overlong, str, OVERLONG)
    whole = [tokenize_item(record, tokenizer, style, vocabulary) for record in records]
    fitting = [item for item in whole if len(item.input_ids) <= limit]
    within = fitting if overlong == "drop" else [Item(item.input_ids[:limit], item.labels[:limit]) for item in whole]
    items = [item for item in within if item.supervised]
    return Tokenized(items, len(whole) - len(fitting), len(within) - len(items))


def tokenize_item(
    record: Record, tokenizer: PreTrainedTokenizerBase | Encoder | None, style: str = "plain", vocabulary: int | None = None
) -> Item:
    """Tokenise a record that is not empty.

    style: template for instruction and output, one of STYLES; "plain" means the template of the record's source
    vocabulary: bound on token ids of tokenised records

    Raises MalformedRecord for a record that cannot be read, and InputError without a tokenizer.
    """
    require("style", style, str, STYLES)
    found, template = parse_record(record), record.template if style == "plain" else style
    if found is None:
        raise MalformedRecord(f"{record.where}: is empty")
    if isinstance(found, Item):
        return _checked(found, record.where, vocabulary)
    if tokenizer is None:
        raise InputError(f"{record.where}: a tokenizer is needed for items that are not tokenised: pass tokenizer=")
    encoder = Encoder.of(tokenizer)
    if isinstance(found, Text):
        ids = tuple(encoder.texts([found.text])[0])
        return Item(ids, ids)
    if isinstance(found, PromptAnswer) and template == "chat":
        found = as_chat(found)
    if isinstance(found, Chat):
        return _chat_item(found, encoder, record.where)
    return _answer_item(*prompt_and_answer(found, template), encoder)


def _checked(item: Item, where: str, vocabulary: int | None) -> Item:
    """Return the item. Raises InputError for a token id of `vocabulary` or above."""
    highest = max(item.input_ids, default=0)
    if vocabulary is not None and highest >= vocabulary:
        raise InputError(f"{where}: token {highest}, but the model has {vocabulary}: tokenise it with the model's own tokenizer")
    return item


def _answer_item(prompt: str, answer: str, encoder: Encoder) -> Item:
    """Tokenise prompt and answer together. A token belongs to the answer if it ends inside it."""
    ids, parts = encoder.parts([prompt, answer])
    return Item(tuple(ids), tuple(token if part else IGNORE for token, part in zip(ids, parts, strict=True)))


def _chat_item(chat: Chat, encoder: Encoder, where: str) -> Item:
    """Tokenise a chat, supervised on the assistant's messages and their end tokens, as TRL, Axolotl and LLaMA-Factory do."""
    ids = encoder.texts([rendered(chat, encoder.tokenizer, where)])[0]
    labels = [IGNORE] * len(ids)
    for number, message in enumerate(chat.messages):
        if message["role"] == "assistant" and number >= chat.answers_from:
            begin, end = _span(chat, number, ids, encoder, where)
            labels[begin:end] = ids[begin:end]
    return Item(tuple(ids), tuple(labels))


def _span(chat: Chat, number: int, ids: list[int], encoder: Encoder, where: str) -> tuple[int, int]:
    """Find start and end of message `number`, an answer, in the chat's tokens.

    Templates may insert more before the last message than before an earlier one, such as an empty thought. The answer starts behind it.
    """
    try:
        upto, parts = encoder.chat(chat.messages[: number + 1], prompt=number, **chat.options)
        begin = len(parts) - sum(parts)
        for more in range(sum(parts)) if ids[:begin] == upto[:begin] else ():
            end = len(upto) - more
            if ids[begin:end] == upto[begin + more :]:
                return begin, end
    except InputError as error:
        raise MalformedRecord(f"{where}: {error}") from None
    raise MalformedRecord(f"{where}: this chat template rewrites earlier messages: give prompt and completion as texts")


def tokenize_choices(record: Record, tokenizer: PreTrainedTokenizerBase | Encoder) -> Choices:
    """Tokenise each option of a question behind the same prompt."""
    question = parse_record(record)
    if not isinstance(question, Question):
        raise MalformedRecord(f"{record.where}: a multiple-choice item is 'question', 'choices' and 'answer'")
    prompt, options = question_prompt(question)
    encoder = Encoder.of(tokenizer)
    return Choices(tuple(_answer_item(prompt, option, encoder) for option in options), question.answer)


def load_items(
    probe: str | PathLike[str] | Source | Mapping[str, Any] | Iterable[Mapping[str, Any] | Item],
    tokenizer: PreTrainedTokenizerBase | Encoder | None = None,
    style: str = "plain",
    vocabulary: int | None = None,
) -> list[Item]:
    """Load the items of a probe, given as a path, dataset name, source, or list of records or Items.

    Empty records are left out; a warning names them and the keys that are not read. Raises InputError if nothing is supervised, and for
    token ids of `vocabulary` or above.
    """
    tokenizer = tokenizer and Encoder.of(tokenizer)
    entries: Iterable[Item | Record]
    if isinstance(probe, (str, PathLike, Mapping, Source)):
        source = Source.of(str(probe) if isinstance(probe, PathLike) else probe)
        summary, entries = SourceSummary(source, files=source_files(source)), read(source)
    else:
        require_made("probe", probe, Iterable, "give a path, or a list of records such as {'text': ...}")
        summary = SourceSummary(Source("probe"))
        numbered = [(entry, f"probe item {number}") for number, entry in enumerate(probe, 1)]
        entries = [_checked(entry, where, vocabulary) if isinstance(entry, Item) else Record(entry, where) for entry, where in numbered]
    items = [
        entry if isinstance(entry, Item) else tokenize_item(entry, tokenizer, style, vocabulary)
        for entry in entries
        if isinstance(entry, Item) or summary.take(entry, parse_record) is not None
    ]
    for line in summary.notes():
        logger.warning(line)
    if not any(item.supervised for item in items):
        raise InputError("the probe holds no supervised token: give items with text, or with instruction and output")
    return items
