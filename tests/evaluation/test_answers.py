"""Answers: greedy ones against the definition, token by token; prompts from the corpora; a model that cannot generate."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from adept_fast.data.encoding import Encoder
from adept_fast.data.sources import Record
from adept_fast.errors import InputError
from adept_fast.evaluation.answers import OPENING, answers, drawn_prompts, given_prompts
from adept_fast.evaluation.evaluation_corpus import corpus
from adept_fast.evaluation.generation import GenerationFailed, generate
from adept_fast.expansion.expand_model import expand_model
from tests.support import tiny_models

TURNS = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
TOKENS = 6


def encoder(template: str | None = None) -> Encoder:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_models.tokenizer().backend_tokenizer, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    return Encoder(tokenizer)


def likeliest(model: torch.nn.Module, ids: list[int], count: int) -> list[int]:
    """Take the likeliest next token `count` times, each from a forward over all tokens, up to the end token."""
    ids, first = list(ids), len(ids)
    while len(ids) < first + count and ids[-1:] != [2]:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[first:]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_greedy_answers_of_base_and_expanded_model(family: str) -> None:
    changes = {} if family == "llama" else {"n_layer": 4, "n_head": 4, "n_embd": 32} if family == "gpt2" else {"n_layer": 4, "n_head": 4}
    model, tokenizer = tiny_models.model(family, **changes), tiny_models.tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("The", tiny_models.SENTENCES[0], "The fox counts")]
    expected = [tokenizer.decode(likeliest(model, prompt, TOKENS), skip_special_tokens=True) for prompt in prompts]
    assert generate(model, tokenizer, prompts, TOKENS) == expected, "prompts of unequal length in one batch"
    expanded = expand_model(model, [1, 2])
    assert generate(expanded, tokenizer, prompts, TOKENS) == expected
    written = expanded.generate(torch.tensor([prompts[1]]), do_sample=False, max_new_tokens=TOKENS)[0, len(prompts[1]) :]
    assert tokenizer.decode(written, skip_special_tokens=True) == expected[1], "by transformers alone"


def test_drawn_answers_depend_on_the_seed_alone() -> None:
    model, tokenizer = tiny_models.model(), tiny_models.tokenizer()
    prompts = [[5, 6, 7], [8, 9]]
    torch.manual_seed(4)
    before = torch.get_rng_state()
    first = generate(model, tokenizer, prompts, 12, temperature=1.5, seed=1)
    assert torch.get_rng_state().equal(before) and not model.training
    assert first == generate(model, tokenizer, prompts, 12, temperature=1.5, seed=1)
    assert first != generate(model, tokenizer, prompts, 12, temperature=1.5, seed=2)


def test_openings_of_documents_and_questions() -> None:
    long, short = " ".join(tiny_models.SENTENCES[:3]), "The otter sleeps by the lake."
    asked = [{"instruction": f"How many stones does fox {number} count?", "output": f"It counts {number}."} for number in range(3)]
    records = [Record(row, "q") for row in asked]
    plain = encoder()
    general = corpus("general", records, plain, 128)
    domain = corpus("domain", [Record({"text": text}, "d") for text in (short, long)], plain, 128)
    found = drawn_prompts(general, records, domain, plain, TOKENS, 100)
    assert [prompt.from_ for prompt in found] == ["domain", "domain", "general", "general"]
    ids = plain.texts([long])[0]
    assert found[0].ids == tuple(ids[:OPENING]) and long.startswith(found[0].text), "the longer document first"
    assert long[len(found[0].text) :].startswith(found[0].reference or "?")
    assert short.startswith(found[1].text + (found[1].reference or "?")), "half of a short one"
    assert found[2].text == asked[0]["instruction"] and asked[0]["output"].startswith((found[2].reference or "?").strip())
    chat = encoder(TEMPLATE)
    question = drawn_prompts(general, records, None, chat, TOKENS, 100)[0]
    assert (question.text, question.reference) == (asked[0]["instruction"], asked[0]["output"])
    assert chat.tokenizer.decode(list(question.ids)) == f"<user>{asked[0]['instruction']}\n<assistant>"
    assert drawn_prompts(general, records, domain, plain, TOKENS, 3) == [], "no room"
    choice = Record({"question": "Which?", "choices": ["this", "that"], "answer": 1}, "q")
    for each in (plain, chat):
        (prompt,) = drawn_prompts(corpus("general", [choice], each, 128), [choice], None, each, TOKENS, 100)
        assert prompt.text == "Which?\nA. this\nB. that\nAnswer:" and "B. that".startswith((prompt.reference or "?").strip())


def test_given_prompts_take_the_chat_template_where_there_is_one() -> None:
    plain, chat = encoder(), encoder(TEMPLATE)
    assert [prompt.ids for prompt in given_prompts(["The fox"], plain, None, 9, "prompt")] == [tuple(plain.texts(["The fox"])[0])]
    (prompt,) = given_prompts(["The </s> fox"], chat, None, 99, "prompt")
    assert chat.tokenizer.decode(list(prompt.ids)) == "<user>The </s> fox\n<assistant>" and 2 not in prompt.ids
    assert given_prompts(["The fox"], chat, False, 9, "prompt") == given_prompts(["The fox"], plain, False, 9, "prompt")
    with pytest.raises(InputError, match=r"^eval.prompts\[1\] has \d+ tokens, and the model takes 2 before its answer"):
        given_prompts(["T", "The fox counts stones"], plain, None, 2, "eval.prompts")
    with pytest.raises(InputError, match="no chat template"):
        given_prompts(["The fox"], plain, True, 9, "prompt")
    with pytest.raises(InputError, match="chat template refuses a prompt"):
        given_prompts(["The fox"], encoder("{{ raise_exception('no') }}"), None, 9, "prompt")


def test_a_model_that_cannot_generate_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, plain = tiny_models.model(), encoder()

    def broken(**_: object) -> None:
        raise NotImplementedError("no cache\nof this kind")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(GenerationFailed, match=r"^tuned: generation failed \(no cache of this kind\)$"):
        generate(model, plain.tokenizer, [[3]], 2, title="tuned")
    prompts = given_prompts(["The", "fox"], plain, None, 9, "eval.prompts")
    with caplog.at_level(logging.WARNING):
        assert answers(model, prompts, plain, TOKENS, "out/tuned") == [None, None]
    assert caplog.messages == ["out/tuned: answers: generation failed (no cache of this kind): its answers are left out"]
