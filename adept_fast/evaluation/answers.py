"""Prompts that base and tuned model answer side by side: openings of documents, questions, and prompts of the recipe."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adept_fast.data.encoding import Encoder
from adept_fast.data.items import IGNORE
from adept_fast.data.records import PromptAnswer, Question, parse_record
from adept_fast.data.sources import Record
from adept_fast.data.templates import as_chat, question_prompt
from adept_fast.errors import InputError
from adept_fast.evaluation.evaluation_corpus import EvaluationCorpus
from adept_fast.evaluation.generation import GenerationFailed, generate
from adept_fast.evaluation.results import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPENINGS, QUESTIONS = 3, 2
OPENING = 32  # tokens of a document to go on from

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """text: as a reader sees it. ids: as the model does. from_, reference: as of Answer."""

    text: str
    ids: tuple[int, ...]
    from_: str
    reference: str | None = None

    def answered(self, base: str | None, tuned: str | None) -> Answer:
        return Answer(self.text, self.from_, self.reference, base, tuned)


def given_prompts(texts: Sequence[str], encoder: Encoder, chat: bool | None, room: int, name: str) -> list[Prompt]:
    """Encode prompts.

    chat: by the tokenizer's chat template; None: if it has one
    room: the most tokens a prompt may have
    name: of the argument, for the InputError about a prompt that is longer
    """
    found = []
    for number, text in enumerate(texts):
        ids = _chat(text, encoder) if (bool(encoder.tokenizer.chat_template) if chat is None else chat) else encoder.texts([text])[0]
        if len(ids) > room:
            raise InputError(f"{name}[{number}] has {len(ids):,} tokens, and the model takes {room:,} before its answer: shorten it")
        found.append(Prompt(text, tuple(ids), name))
    return found


def drawn_prompts(
    general: EvaluationCorpus, records: Sequence[Record], domain: EvaluationCorpus | None, encoder: Encoder, tokens: int, room: int
) -> list[Prompt]:
    """Draw three openings of domain documents and two general questions, by the corpora's own order.

    records: of the general corpus; a chat model is asked in its chat template
    tokens: of an answer, and so of the reference that an opening has
    room: the most tokens a prompt may have
    """
    asked = _questions(records, encoder) if encoder.tokenizer.chat_template else iter(())
    drawn = []
    for name, prompts, count in (("domain", iter(()), OPENINGS), ("general", asked, QUESTIONS)):
        corpus = {"domain": domain, "general": general}[name]
        found = [prompt for prompt in prompts if len(prompt.ids) <= room][:count]
        drawn += found or [prompt for prompt in _beginnings(corpus, name, encoder, tokens) if len(prompt.ids) <= room][:count]
    return drawn


def answers(model: PreTrainedModel, prompts: Sequence[Prompt], encoder: Encoder, tokens: int, title: str) -> Sequence[str | None]:
    """Return the greedy answer to each prompt; None, with a warning, where the model cannot generate."""
    if not prompts:
        return []
    try:
        return generate(model, encoder.tokenizer, [prompt.ids for prompt in prompts], tokens, title=f"{title}: answers")
    except GenerationFailed as error:
        logger.warning(f"{error}: its answers are left out")
        return [None] * len(prompts)


def _chat(text: str, encoder: Encoder) -> list[int]:
    from jinja2 import TemplateError

    try:
        return encoder.chat([{"role": "user", "content": text}], add_generation_prompt=True)[0]
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise InputError(f"the tokenizer's chat template refuses a prompt ({' '.join(str(error).split())})") from None


def _questions(records: Sequence[Record], encoder: Encoder) -> Iterator[Prompt]:
    for record in records:
        found = parse_record(record)
        if isinstance(found, Question):
            text, options = question_prompt(found)
            yield Prompt(text, tuple(_chat(text, encoder)), "general", options[found.answer].strip())
        elif isinstance(found, PromptAnswer):
            *messages, answer = as_chat(found).messages
            ids = encoder.chat(messages, add_generation_prompt=True)[0]
            yield Prompt(messages[-1]["content"], tuple(ids), "general", answer["content"])


def _beginnings(corpus: EvaluationCorpus | None, name: str, encoder: Encoder, tokens: int) -> list[Prompt]:
    """Cut items before what is supervised, or behind their opening if all is. Documents long enough for the reference come first."""
    ordered = sorted(corpus.items if corpus else (), key=lambda item: len(item.input_ids) < OPENING + tokens)
    found = []
    for item in ordered:
        ids = item.input_ids
        asked = next(at for at, label in enumerate(item.labels) if label != IGNORE)
        at = asked or min(OPENING, len(ids) // 2)
        if at > 0:
            parts = ids[:at], ids[at : at + tokens]
            text, reference = (str(encoder.tokenizer.decode(list(part), skip_special_tokens=True)) for part in parts)
            found.append(Prompt(text, ids[:at], name, reference))
    return found
