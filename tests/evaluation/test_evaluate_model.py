"""Loss, accuracy and shifted tokens against their definitions, from the logits of each sequence by itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adept_fast.data.sources import Record
from adept_fast.errors import InputError
from adept_fast.evaluation.evaluate_model import evaluate
from adept_fast.evaluation.evaluation_corpus import corpus
from tests.support import tiny_models

LETTERS = "ABCD"
QUESTIONS = [
    Record(
        {"question": sentence[: 20 + 3 * number], "choices": sentence.split()[: 2 + number % 3], "answer": LETTERS[number % 2]},
        f"q:{number}",
    )
    for number, sentence in enumerate(tiny_models.SENTENCES[:14])
]
TEXTS = [Record({"text": sentence}, f"t:{number}") for number, sentence in enumerate(tiny_models.SENTENCES[20:29])]


def logits(model: torch.nn.Module, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def test_questions_and_texts() -> None:
    model, base, tokenizer = tiny_models.model(seed=1), tiny_models.model(), tiny_models.tokenizer()
    right, sums, tokens, shifted, positions = 0, 0.0, 0, 0, 0
    for record in QUESTIONS:
        asked, choices, answer = (record.content[key] for key in ("question", "choices", "answer"))
        listed = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        prompt = "\n".join([asked, *listed, "Answer:"])
        whole = [tokenizer(f"{prompt} {line}")["input_ids"] for line in listed]
        head = next(at for at in range(len(whole[0])) if len({ids[at] for ids in whole}) > 1)  # the letter
        right += int(logits(model, whole[0])[head - 1, [ids[head] for ids in whole]].argmax()) == LETTERS.index(answer)
        ids = whole[LETTERS.index(answer)]
        first = len(tokenizer(prompt)["input_ids"])
        losses = functional.cross_entropy(logits(model, ids)[:-1], torch.tensor(ids[1:]), reduction="none")[first - 1 :]
        sums, tokens = sums + float(losses.sum()), tokens + len(losses)
        shifted += int((logits(model, ids).argmax(-1) != logits(base, ids).argmax(-1)).sum())
        positions += len(ids)
    general, domain = corpus("general", QUESTIONS, tokenizer, 128), corpus("domain", TEXTS, tokenizer, 128)
    plain = evaluate(base, general, domain)
    evaluated = evaluate(model, general, domain, plain.argmax)
    found = evaluated.result.general
    assert 0 < right < len(QUESTIONS) and found.accuracy == pytest.approx(right / len(QUESTIONS))
    assert found.accuracy_low <= found.accuracy <= found.accuracy_high
    assert (found.items, found.tokens) == (len(QUESTIONS), tokens)
    assert found.loss == pytest.approx(sums / tokens, rel=1e-5)
    assert 0 < shifted < positions and evaluated.result.shifted_tokens == pytest.approx(shifted / positions)
    change = evaluated.change(plain)
    assert change.general.loss.value == pytest.approx(found.loss - plain.result.general.loss)
    assert change.general.accuracy.value == pytest.approx(found.accuracy - plain.result.general.accuracy)
    assert change.domain.accuracy is None and change.domain.loss.low < change.domain.loss.value < change.domain.loss.high
    texts = [tokenizer(record.content["text"])["input_ids"] for record in TEXTS]
    losses = torch.cat([functional.cross_entropy(logits(model, ids)[:-1], torch.tensor(ids[1:]), reduction="none") for ids in texts])
    found = evaluated.result.domain
    assert found.loss == pytest.approx(float(losses.mean()), rel=1e-5) and found.accuracy is None
    assert found.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5) and found.tokens == len(losses)


def test_texts_are_cut_and_long_questions_left_out_and_both_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_models.tokenizer()
    lengths = sorted(max(len(option.input_ids) for option in [*corpus("q", [record], tokenizer, 999).items]) for record in QUESTIONS)
    some = corpus("general", QUESTIONS, tokenizer, lengths[5])
    left, count = len(QUESTIONS) - len(some.items), len(QUESTIONS)
    assert 0 < left < count
    assert caplog.messages == [f"general: {left} of {count} questions do not fit in {lengths[5]} tokens: they are left out"]
    caplog.clear()
    cut = corpus("domain", TEXTS, tokenizer, 9)
    assert {len(item.input_ids) for item in cut.items} == {9}
    longer = f"{len(TEXTS)} of {len(TEXTS)} texts are longer than 9 tokens: the loss is taken on their first 9"
    assert len(corpus("domain", TEXTS, tokenizer, 128).items) == len(TEXTS) and caplog.messages == [f"domain: {longer}"]
    prompted = Record({"instruction": "The fox counts nine stones and", "output": " sleeps."}, "t:1")
    corpus("domain", [*TEXTS, prompted], tokenizer, 9)
    assert caplog.messages[2] == f"domain: 1 of {len(TEXTS) + 1} texts have no supervised token in their first 9: they are left out"
    with pytest.raises(InputError, match="no question fits"):
        corpus("general", QUESTIONS, tokenizer, 3)
    with pytest.raises(InputError, match="^t:0: no 'choices'"):
        corpus("general", [*QUESTIONS, *TEXTS], tokenizer, 128)
