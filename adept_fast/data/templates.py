"""Write records as text: end to end, by Alpaca's template, or by the tokenizer's chat template.

    plain    system, history, instruction, input and output in a row, with a line break if neither side has white space; a base model has no
             other format
    alpaca   the template that Alpaca was trained with, and that LLaMA-Factory and Axolotl have under that name
    chat     the tokenizer's chat template; messages always use it
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

from adept_fast.data.records import LETTERS, Chat, Item, MalformedRecord, PromptAnswer, Question, Text, parse_record
from adept_fast.data.sources import Record
from adept_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEFORE = {
    False: "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    True: "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
}
"""Whether there is an input -> the first line of Alpaca's template."""


class Rendered(str):
    """A text written by a chat template, with its chat. Its control tokens are intended, and it has its own begin and end."""

    chat: Chat


def document_text(record: Record, tokenizer: PreTrainedTokenizerBase | None = None) -> str | None:
    """Return the text of a record to train on; None if it is empty. tokenizer: provides the chat template for messages.

    Raises MalformedRecord for a record that cannot be read, and InputError for a tokenizer without a chat template.
    """
    found = parse_record(record)
    if found is None:
        return None
    if isinstance(found, Item):
        raise MalformedRecord(f"{record.where}: holds input_ids; documents are packed from text: give text, or messages")
    if isinstance(found, Text):
        return found.text
    if isinstance(found, PromptAnswer) and record.template == "chat":
        found = as_chat(found)
    if isinstance(found, Chat):
        return rendered(found, tokenizer, record.where)
    return "".join(prompt_and_answer(found, record.template))


def prompt_and_answer(found: PromptAnswer | Question, template: str = "plain") -> tuple[str, str]:
    """Return prompt and answer as texts that follow each other without anything in between."""
    if isinstance(found, Question):
        prompt, options = question_prompt(found)
        return prompt, options[found.answer]
    if template == "alpaca":
        return _alpaca(found), found.answer
    history = [text for pair in found.history for text in pair]
    prompt = reduce(_joined, filter(str.strip, [found.system, *history, found.prompt, found.context]), "")
    return prompt, _joined(prompt, found.answer)[len(prompt) :] if found.apart else found.answer


def question_prompt(question: Question) -> tuple[str, list[str]]:
    """Return the prompt, question, lettered choices and "Answer:", and its continuation for each option: " A. text", " B. text", ..."""
    listed = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
    return "\n".join([question.question, *listed, "Answer:"]), [f" {line}" for line in listed]


def _joined(before: str, after: str) -> str:
    return before + after if not before or before[-1:].isspace() or after[:1].isspace() else f"{before}\n{after}"


def _alpaca(found: PromptAnswer) -> str:
    first = found.system.strip() or BEFORE[bool(found.context)]
    turns = [f"### Instruction:\n{asked.strip()}\n\n### Response:\n{answered.strip()}\n\n" for asked, answered in found.history]
    context = f"\n\n### Input:\n{found.context.strip()}" if found.context else ""
    return f"{first}\n\n{''.join(turns)}### Instruction:\n{found.prompt.strip()}{context}\n\n### Response:\n"


def as_chat(found: PromptAnswer) -> Chat:
    """Convert to messages. Only the last one is the answer."""
    system = [("system", found.system)] if found.system.strip() else []
    history = [turn for asked, answered in found.history for turn in (("user", asked), ("assistant", answered))]
    asked = _joined(found.prompt, found.context) if found.context else found.prompt
    turns = [*system, *history, ("user", asked), ("assistant", found.answer)]
    return Chat(tuple({"role": role, "content": content.strip()} for role, content in turns), len(turns) - 1)


def rendered(chat: Chat, tokenizer: PreTrainedTokenizerBase | None, where: str) -> Rendered:
    """Write a chat by the tokenizer's chat template."""
    if tokenizer is None:
        raise InputError(f"{where}: a tokenizer is needed for messages: pass tokenizer=")
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: messages need a chat template, and this tokenizer has none: put a chat_template.jinja into the model's folder, "
            "or give prompt and completion as texts"
        )
    from jinja2 import TemplateError

    try:
        text = Rendered(tokenizer.apply_chat_template([dict(message) for message in chat.messages], tokenize=False, **chat.options))
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise MalformedRecord(f"{where}: the chat template refuses these messages ({error})") from None
    text.chat = chat
    return text
