"""Find the largest strength alpha of the tuned copies at which general loss rises by no more than a limit (see expansion/dial.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from adept_fast.evaluation.evaluation_corpus import EvaluationCorpus
from adept_fast.evaluation.results import Dial, Tried
from adept_fast.evaluation.settings import Eval
from adept_fast.expansion.dial import dialled_model
from adept_fast.models.losses import CorpusLoss, corpus_loss
from adept_fast.models.unwrap import unwrapped
from adept_fast.runtime.bootstrap import bootstrap
from adept_fast.settings.validation import check

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COARSE, FINE = 8, 64  # steps of alpha: from 1 down by eighths, then halved to sixty-fourths


def largest_alpha(model: PreTrainedModel, general: EvaluationCorpus, domain: EvaluationCorpus | None, limit: float) -> Dial:
    """Search the largest of 0, 1/64, ..., 1 at which the whole interval of the rise is within `limit` (nats per token).

    Loss need not rise evenly with alpha, so eighths are tried from 1 down to the first within the limit, then the steps above it by
    halving. The model is scaled in memory and restored. Raises InputError for a wrong limit or a model without copies.
    """
    check(Eval, "general_", needed=True, limit=limit)
    model = unwrapped(model)
    base = _measured(model, general, 0)
    tried: dict[int, Tried] = {}

    def within(step: int) -> bool:
        if step not in tried:
            tried[step] = _compared(_measured(model, general, step), base, step) if step else _compared(base, base, 0)
        return tried[step].high <= limit

    inside = next(step for step in range(FINE, -1, -FINE // COARSE) if within(step))
    outside = inside + FINE // COARSE
    while inside < FINE and outside - inside > 1:
        middle = (inside + outside) // 2
        inside, outside = (middle, outside) if within(middle) else (inside, middle)
    domain_loss = None if domain is None else _measured(model, domain, inside).mean
    return Dial(**vars(tried[inside]), limit=limit, tried=tuple(tried[step] for step in sorted(tried)), domain_loss=domain_loss)


def _measured(model: PreTrainedModel, corpus: EvaluationCorpus, step: int) -> CorpusLoss:
    with dialled_model(model, step / FINE):
        return corpus_loss(model, corpus.items, title=f"alpha {step / FINE:g}: {corpus.name}")


def _compared(measured: CorpusLoss, base: CorpusLoss, step: int) -> Tried:
    change: tuple[Tensor, ...] = bootstrap(measured.sums - base.sums, measured.tokens)
    return Tried(step / FINE, measured.mean, *map(float, change))
