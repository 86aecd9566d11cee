"""Next-token losses of a corpus of items: -log p(token t | tokens before t) in nats, fp32, on supervised tokens only.

Items are batched by length and padded on the right; a causal model never looks there, so padding changes no value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adept_fast.data.items import IGNORE, Item
from adept_fast.models import device_of, evaluating, head_logits, last_hidden
from adept_fast.models.finite import require_finite
from adept_fast.models.lm_head import token_losses, token_predictions
from adept_fast.runtime.dtensor import in_shards
from adept_fast.runtime.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 2048  # padded tokens of one forward


@dataclass(frozen=True)
class CorpusLoss:
    """Per item: the summed loss in nats [n], the number of supervised tokens [n]; the argmax at every position, and which candidate
    token was likeliest, where asked for."""

    sums: Tensor
    tokens: Tensor
    argmax: tuple[Tensor, ...] = ()
    picked: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """Token-weighted mean loss, nats per supervised token."""
        return float(self.sums.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Candidates:
    """Tokens to compare at one supervised position of an item (the position that predicts them)."""

    position: int
    tokens: tuple[int, ...]


def item_tensors(item: Item, device: torch.device) -> tuple[Tensor, Tensor]:
    """input_ids and the label that each position predicts (the next one; -100 at the end), int64 [tokens]; one token at least."""
    ids = torch.tensor(item.input_ids, dtype=torch.int64, device=device)
    targets = torch.tensor((*item.labels[1:], IGNORE), dtype=torch.int64, device=device)
    return ids, targets


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


@torch.no_grad()
def corpus_loss(
    model: PreTrainedModel,
    items: Sequence[Item],
    argmax: bool = False,
    candidates: Sequence[Candidates] = (),
    title: str = "loss",
) -> CorpusLoss:
    """Loss of each item under `model` in eval mode; every module's mode is left as it was. candidates: none, or one per item.

    Of a sharded (FSDP2) model the losses alone; every process must be given the same items. Raises InputError for a loss that is not
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
            pairs = [item_tensors(items[index], device) for index in batch]
            ids = torch.nn.utils.rnn.pad_sequence([pair[0] for pair in pairs], batch_first=True)
            hidden = last_hidden(model, ids)
            rows = [torch.arange(len(pair[0]), device=device) if argmax else (pair[1] != IGNORE).nonzero()[:, 0] for pair in pairs]
            targets = torch.cat([pair[1][row] for pair, row in zip(pairs, rows, strict=True)])
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
    """Summed loss of items in one forward, differentiable: the negative log-likelihood of their supervised tokens, 0 of none."""
    length = max(1, *(len(item.input_ids) for item in items))
    ids = [[*item.input_ids, *[0] * (length - len(item.input_ids))] for item in items]
    labels = [(row, at, label) for row, item in enumerate(items) for at, label in enumerate(item.labels[1:]) if label != IGNORE]
    device = device_of(model)
    placed = torch.tensor(labels, dtype=torch.int64, device=device).view(-1, 3)
    rows, positions, targets = placed.unbind(1)  # found on the host: a mask would wait for the device
    if in_shards(model):  # only a call of the whole model gathers them
        logits = model(input_ids=torch.tensor(ids, device=device), use_cache=False).logits[rows, positions]
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return token_losses(model, last_hidden(model, torch.tensor(ids, device=device))[rows, positions], targets).sum()
