"""Compute next-token losses of items: -log p(token t | tokens before t) in nats, fp32, on supervised tokens only.

Items are batched by length and padded on the right. A causal model never attends there, so padding changes no value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adept_fast.data.items import IGNORE, Item
from adept_fast.models.decoder_layers import device_of, evaluating, head_logits, last_hidden
from adept_fast.models.finite import require_finite
from adept_fast.models.lm_head import token_losses, token_predictions
from adept_fast.runtime.dtensor import in_shards
from adept_fast.runtime.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 2048  # padded tokens of one forward


@dataclass(frozen=True)
class CorpusLoss:
    """Losses of n items.

    sums: summed loss, nats, fp64 [n]
    tokens: supervised tokens, [n]
    argmax: the most likely token at every position of each item, if asked for
    picked: the index of the most likely candidate of each item, if candidates were given
    """

    sums: Tensor
    tokens: Tensor
    argmax: tuple[Tensor, ...] = ()
    picked: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """Return the token-weighted mean loss, nats per supervised token."""
        return float(self.sums.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Candidates:
    """Tokens to compare at one supervised position of an item: the position that predicts them."""

    position: int
    tokens: tuple[int, ...]


def _batches(items: Sequence[Item]) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in sorted(range(len(items)), key=lambda index: len(items[index].input_ids)):
        if not items[index].input_ids:
            continue
        if batch and (len(batch) + 1) * len(items[index].input_ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded_tokens(items: Sequence[Item]) -> int:
    """Count the tokens that `corpus_loss` runs for these items, padding included."""
    return sum(len(batch) * max(len(items[index].input_ids) for index in batch) for batch in _batches(items))


@torch.no_grad()
def corpus_loss(
    model: PreTrainedModel,
    items: Sequence[Item],
    argmax: bool = False,
    candidates: Sequence[Candidates] = (),
    title: str = "loss",
) -> CorpusLoss:
    """Compute the loss of each item under `model` in eval mode, and restore every module's mode.

    candidates: empty, or one per item

    A sharded (FSDP2) model gives losses only, and every process must be given the same items. Raises InputError for a loss that is not
    finite.
    """
    device = device_of(model)
    sums, tokens = torch.zeros(len(items), dtype=torch.float64), torch.tensor([item.supervised for item in items])
    best: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(items)
    picked = [-1] * len(items)
    sharded = in_shards(model)
    with evaluating(model), Progress(total=len(items), desc=title, unit="item") as bar:
        for batch in _batches(items):
            if sharded:
                for index in batch:
                    sums[index] = batch_loss(model, [items[index]]).double().cpu()
                bar.update(len(batch))
                continue
            ids = [torch.tensor(items[index].input_ids, device=device) for index in batch]
            labels = [torch.tensor((*items[index].labels[1:], IGNORE), device=device) for index in batch]  # of the next token
            hidden = last_hidden(model, torch.nn.utils.rnn.pad_sequence(ids, batch_first=True))
            rows = [torch.arange(len(each), device=device) if argmax else (each != IGNORE).nonzero()[:, 0] for each in labels]
            targets = torch.cat([each[row] for each, row in zip(labels, rows, strict=True)])
            hidden = torch.cat([hidden[number, row] for number, row in enumerate(rows)])
            asked, at = {}, 0
            for index, row in zip(batch, rows, strict=True):
                if candidates:
                    asked[at + int((row == candidates[index].position).nonzero()[0, 0])] = candidates[index].tokens
                at += len(row)
            losses, choices = token_predictions(model, hidden, targets) if argmax else (token_losses(model, hidden, targets), targets)
            lengths = [len(row) for row in rows]
            for index, loss, choice in zip(batch, losses.split(lengths), choices.split(lengths), strict=True):
                sums[index], best[index] = loss.double().sum().cpu(), choice.cpu()
            if candidates:
                rivals = head_logits(model, hidden[list(asked)]).float()
                for index, letters, row in zip(batch, asked.values(), rivals, strict=True):
                    picked[index] = int(row[list(letters)].argmax())
            bar.update(len(batch))
    require_finite(model, sums, f"{title}: the loss of item")
    return CorpusLoss(sums, tokens, tuple(best) if argmax else (), tuple(picked) if candidates else ())


def batch_loss(model: PreTrainedModel, items: Sequence[Item]) -> Tensor:
    """Compute the summed loss of items in one forward, differentiable: the negative log-likelihood of their supervised tokens, or 0."""
    length = max(1, *(len(item.input_ids) for item in items))
    ids = [[*item.input_ids, *[0] * (length - len(item.input_ids))] for item in items]
    labels = [(row, at, label) for row, item in enumerate(items) for at, label in enumerate(item.labels[1:]) if label != IGNORE]
    device = device_of(model)
    placed = torch.tensor(labels, dtype=torch.int64, device=device).view(-1, 3)
    rows, positions, targets = placed.unbind(1)  # indices made on the host: a mask would wait for the device
    if in_shards(model):  # only a call of the whole model gathers its shards
        logits = model(input_ids=torch.tensor(ids, device=device), use_cache=False).logits[rows, positions]
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return token_losses(model, last_hidden(model, torch.tensor(ids, device=device))[rows, positions], targets).sum()
