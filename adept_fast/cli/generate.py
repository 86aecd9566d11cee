"""`adept-fast generate`: let a model answer prompts, and its base beside it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from adept_fast.checkpoints.settings import DTYPES
from adept_fast.errors import InputError
from adept_fast.evaluation.settings import PromptText
from adept_fast.settings import key_value
from adept_fast.settings.validation import COUNT, SEEDS, Range, declare


@dataclass(frozen=True, kw_only=True)
class Generate:
    source: str = declare(meaning="a model, expanded and tuned or not: folder or hub name")
    prompt: tuple[PromptText, ...] = declare(meaning='a text, or several: ["What is a heron?", "What is a fox?"]')
    max_new_tokens: int = declare(128, COUNT, "of each answer, at most")
    temperature: float = declare(0.0, Range(0, 100), "0 takes the likeliest token each time; above, tokens are drawn")
    seed: int = declare(0, SEEDS, "of the draws")
    chat: bool | None = declare(None, meaning="ask in the tokenizer's chat template; null: where it has one")
    base: bool = declare(False, meaning="answer by the base too: by the model with the copies of its last expansion bypassed")
    dtype: str | None = declare(None, DTYPES, "of the weights; null: the checkpoint's")
    trust_remote_code: bool = declare(False, meaning="run the Python code that comes with a model")


def run(name: str, words: Sequence[str]) -> str:
    """Return the answer to a prompt; with several prompts or the base, each answer below its prompt. Raises InputError."""
    from adept_fast.checkpoints import checkpoint
    from adept_fast.data.encoding import Encoder
    from adept_fast.evaluation.answers import given_prompts
    from adept_fast.evaluation.generation import generate
    from adept_fast.expansion.bypass import bypassed

    given = key_value.settings(Generate, words)
    if not given.prompt:
        raise InputError("prompt is an empty list: give a text")
    folder = checkpoint.resolve(given.source, name="source")
    if given.base and folder.record is None:
        raise InputError(f"base: {given.source} has no record of copies, so no base is in it: generate from its base itself")
    encoder = Encoder(checkpoint.load_tokenizer(folder, given.trust_remote_code))
    prompts = given_prompts(given.prompt, encoder, given.chat, folder.positions - given.max_new_tokens, "prompt")
    model = checkpoint.load_model(folder, given.dtype, trust_remote_code=given.trust_remote_code)
    ids = [prompt.ids for prompt in prompts]
    ask = partial(generate, model, encoder.tokenizer, ids, given.max_new_tokens, given.temperature, given.seed)
    answers = {}
    if given.base:
        with bypassed(model):
            answers["base"] = ask(title="base")
    answers[given.source] = ask(title=given.source)
    if len(prompts) == len(answers) == 1:
        return _printable(answers[given.source][0])
    return "\n\n".join(_beside(prompt.text, {who: said[number] for who, said in answers.items()}) for number, prompt in enumerate(prompts))


def _beside(prompt: str, answers: Mapping[str, str]) -> str:
    parts = {"prompt": prompt, **answers}
    return "\n".join(f"{who}:\n{textwrap.indent(_printable(text.strip()), '  ')}" for who, text in parts.items())


def _printable(text: str) -> str:
    """Escape what would steer a terminal."""
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)
