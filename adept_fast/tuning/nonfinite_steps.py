"""Stop the run at a step whose loss or gradient is not finite, or skip as many of them as the user allows.

A skipped step loses its gradients, so the optimizer does nothing: parameters, moments and rates keep their bits, while schedule, data and
step number go on. Infinite gradients under a loss scaler are left to it, because they are how it finds a scale.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.models.finite import likely_cause
from adept_fast.runtime import distributed
from adept_fast.runtime.dtensor import local

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

SHOWN = 3  # documents of a step in a message
WIDTH = 60  # characters of each


class NonFiniteSteps:
    """Counts the skipped steps of a run.

    limit: how many may be skipped; 0 stops at the first. decode: token ids -> text, for messages.
    """

    def __init__(self, limit: int = 0, decode: Callable[[list[int]], str] | None = None) -> None:
        self.limit, self.decode = limit, decode
        self.skipped = 0
        self._losses: list[Tensor] = []
        self._batches: list[dict[str, Any]] = []

    def add_batch(self, inputs: dict[str, Any], loss: Tensor) -> None:
        """Store a batch of the step and its loss, without waiting for the device."""
        self._losses.append(loss.detach())
        self._batches.append(inputs)

    @torch.no_grad()
    def skips(self, model: PreTrainedModel, step: int, scaled: bool = False) -> bool:
        """Return whether step `step` is skipped. Call it when the gradients are complete, before the optimizer's step.

        Raises InputError, which names the step and its documents, where `limit` steps were skipped before. All processes agree.
        """
        losses, batches, self._losses, self._batches = self._losses, self._batches, [], []
        whole = all(bool(loss.isfinite().all()) for loss in losses)
        finite = whole and (scaled or _finite([local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]))
        if not float(distributed.total(torch.tensor(float(not finite)))):
            return False
        what = "gradients are" if whole else "loss is"
        found = f"step {step}: its {what} not finite; {self._documents(batches)}"
        if self.skipped >= self.limit:
            many = f"{self.skipped} steps were skipped before; " if self.skipped else ""
            way_out = f"mend the documents, lower the learning rate, or set skip_nonfinite above {self.limit} to go on without such steps"
            raise InputError(f"{found}; {many}{likely_cause(model)}; {way_out}")
        self.skipped += 1
        if not scaled:
            for parameter in model.parameters():
                parameter.grad = None
        logger.warning(f"{found}: skipped, {self.skipped} of {self.limit} that may be")
        return True

    def _documents(self, batches: Sequence[dict[str, Any]]) -> str:
        """Show how the documents of some batches begin, as text where there is a tokenizer."""
        found = [document for batch in batches for document in _split_documents(batch)]
        shown = [repr(self.decode(ids)[:WIDTH]) if self.decode else f"tokens {ids[:10]}" for ids in found[:SHOWN]]
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        return f"its documents begin {', '.join(shown)}{more}" if shown else "its documents are not known"


def _finite(gradients: Sequence[Tensor]) -> bool:
    """Return whether all gradients are finite, with one synchronisation for all of them."""
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return True
    norms = torch._foreach_norm(gradients, float("inf"))
    return bool(torch.stack([norm.float().to(norms[0].device) for norm in norms]).isfinite().all())


def _split_documents(batch: dict[str, Any]) -> list[list[int]]:
    """Return the token ids of each document: a row, or a part of a row from one position 0 to the next."""
    ids, positions = batch.get("input_ids"), batch.get("position_ids")
    if not isinstance(ids, Tensor):
        return []
    found = []
    for row, tokens in enumerate(ids.reshape(-1, ids.shape[-1]).tolist()):
        starts = [0]
        if isinstance(positions, Tensor) and positions.shape == ids.shape:
            starts += [at for at in (positions.reshape(-1, ids.shape[-1])[row] == 0).nonzero()[:, 0].tolist() if at]
        found += [tokens[start:stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)]
    return found

