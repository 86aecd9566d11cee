"""Evaluate one model: loss and perplexity, accuracy on questions, and the share of general tokens whose argmax differs from the base's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adept_fast.evaluation.evaluation_corpus import EvaluationCorpus
from adept_fast.evaluation.paired_items import ItemLosses
from adept_fast.evaluation.results import Measured, ModelChange, ModelResult
from adept_fast.models.losses import corpus_loss
from adept_fast.models.unwrap import unwrapped
from adept_fast.runtime.bootstrap import bootstrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Evaluated:
    """An evaluated model.

    items: losses of single items, by corpus
    argmax: at each position of the general corpus, int64, a tensor an item
    answers: to the prompts; None where it could not generate
    tasks: results of lm-eval
    """

    result: ModelResult
    items: Mapping[str, ItemLosses]
    argmax: tuple[Tensor, ...]
    answers: Sequence[str | None] = ()
    tasks: Mapping[str, Any] = field(default_factory=dict)

    def change(self, base: Evaluated) -> ModelChange:
        """Return the change against the base on the same items."""
        changes = {name: losses.change(base.items[name]) for name, losses in self.items.items()}
        return ModelChange(changes.pop("general"), changes.pop("domain", None), changes)


def evaluate(
    model: PreTrainedModel,
    general: EvaluationCorpus,
    domain: EvaluationCorpus | None,
    base_argmax: Sequence[Tensor] = (),
    title: str = "model",
    also: Mapping[str, EvaluationCorpus] | None = None,
) -> Evaluated:
    """Evaluate a model on a general corpus, and on a domain corpus and others where given.

    base_argmax: of the evaluated base, to count shifted tokens.
    """
    model = unwrapped(model)
    corpora = {"general": general, **({} if domain is None else {"domain": domain}), **(also or {})}
    items: dict[str, ItemLosses] = {}
    measured: dict[str, Measured] = {}
    argmax: tuple[Tensor, ...] = ()
    for name, corpus in corpora.items():
        losses = corpus_loss(model, corpus.items, name == "general", corpus.candidates, f"{title}: {name}")
        argmax = argmax or losses.argmax
        right = None
        if corpus.answers:
            right = torch.tensor([pick == answer for pick, answer in zip(losses.picked, corpus.answers, strict=True)], dtype=torch.float64)
        items[name] = ItemLosses(losses.sums, losses.tokens, right)
        measured[name] = _measured(items[name])
    shifted = None
    if base_argmax:
        moved = sum(int((ours != theirs).sum()) for ours, theirs in zip(argmax, base_argmax, strict=True))
        shifted = moved / sum(map(len, base_argmax))
    return Evaluated(ModelResult(measured.pop("general"), shifted, measured.pop("domain", None), measured), items, argmax)


def _measured(items: ItemLosses) -> Measured:
    loss, low, high = (float(value) for value in bootstrap(items.sums, items.tokens))
    accuracy = (None,) * 3 if items.right is None else tuple(map(float, bootstrap(items.right, torch.ones_like(items.right))))
    perplexity = math.exp(loss) if loss < 700 else None  # exp overflows above
    return Measured(loss, low, high, perplexity, int(items.tokens.sum()), len(items.tokens), *accuracy)
