"""Evaluate one model: loss and perplexity, accuracy on questions, and the share of general tokens whose argmax differs from the base's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adept_fast.evaluation.evaluation_corpus import EvaluationCorpus
from adept_fast.models.losses import corpus_loss
from adept_fast.models.unwrap import unwrapped
from adept_fast.runtime.bootstrap import bootstrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate(
    model: PreTrainedModel,
    general: EvaluationCorpus,
    domain: EvaluationCorpus | None,
    base_argmax: Sequence[Tensor] = (),
    title: str = "model",
) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """Evaluate a model on a general corpus and, where given, on a domain corpus.

    base_argmax: the second result of this function for the base model. Returns the model's entry of eval.json, and the argmax at each
    position of the general corpus, one int64 tensor an item. The entry holds:

    - loss: nats per supervised token, with a 95 % bootstrap interval over items (low, high)
    - perplexity: exp(loss)
    - accuracy: the share of questions whose right letter is the likeliest
    - shifted_tokens: the share of general positions whose argmax differs from `base_argmax`; None without it
    """
    model = unwrapped(model)
    result, argmax = _evaluate(model, general, True, f"{title}: general")
    shifted = None
    if base_argmax:
        moved = sum(int((ours != theirs).sum()) for ours, theirs in zip(argmax, base_argmax, strict=True))
        shifted = moved / sum(map(len, base_argmax))
    results = {"general": result, "shifted_tokens": shifted}
    if domain is not None:
        results["domain"], _ = _evaluate(model, domain, False, f"{title}: domain")
    return results, argmax


def _evaluate(model: PreTrainedModel, corpus: EvaluationCorpus, argmax: bool, title: str) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    measured = corpus_loss(model, corpus.items, argmax, corpus.candidates, title)
    loss, low, high = (float(value) for value in bootstrap(measured.sums, measured.tokens))
    result: dict[str, Any] = {
        "loss": loss,
        "low": low,
        "high": high,
        "perplexity": math.exp(loss) if loss < 700 else None,  # exp overflows above
        "tokens": int(measured.tokens.sum()),
        "items": len(corpus.items),
        "accuracy": None,
    }
    if corpus.answers:
        right = torch.tensor([pick == answer for pick, answer in zip(measured.picked, corpus.answers, strict=True)], dtype=torch.float64)
        accuracy = bootstrap(right, torch.ones_like(right))
        result |= dict(zip(("accuracy", "accuracy_low", "accuracy_high"), map(float, accuracy), strict=True))
    return result, measured.argmax
