"""Layer importance by masking out, exact: I(l) = loss(model without layer l) - loss(model), in nats per supervised token.

With layer l bypassed the residual stream passes through it unchanged. One sweep down the network measures all layers of an item: at
layer l the baseline and the variants that bypass an earlier layer run as one batch, and the baseline's input joins it as the variant
that bypasses l. So each prefix is computed once, nothing is padded, and the head runs on supervised tokens only. The sweep rides on
the model's own forward: masks, positions, scaling and soft-capping are the family's.

Cost: L + L (L - 1) / 2 layers an item instead of L (L + 1). Source: ADEPT (arXiv 2510.10071), stage 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adept_fast.data.items import IGNORE, Item
from adept_fast.families import decoder_layers, device_of, head_logits, hidden_of, last_hidden, replaced_forward, with_hidden
from adept_fast.losses import item_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SWEEP_TOKENS = 16384  # hidden states of one layer call: variants times tokens
HEAD_ROWS = 512  # rows of logits held at once


def _wrapped(module: nn.Module, wrapper: Any) -> AbstractContextManager[None]:
    """Replace module.forward by wrapper(original forward, hidden, args, kwargs) for the time being."""
    forward = module.forward

    def replaced(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return wrapper(forward, hidden, args, kwargs)

    return replaced_forward(module, replaced)


def _fork(forward: Any, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run a layer on all variants, and let the baseline's input (row 0) join them as the one that bypasses it."""
    at_once = max(1, SWEEP_TOKENS // hidden.shape[1])
    outputs = [forward(part, *args, **kwargs) for part in hidden.split(at_once)]
    return with_hidden(outputs[0], torch.cat([*map(hidden_of, outputs), hidden[:1]]))


def _bypass(forward: Any, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    return with_hidden(forward(hidden, *args, **kwargs), hidden)


def sweep(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Last hidden states of the baseline (row 0) and of the model without layer l (row l + 1): [layers + 1, tokens, hidden]."""
    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.enter_context(_wrapped(layer, _fork))
        return last_hidden(model, ids[None])


def one_by_one(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The same from one forward a layer, each with that layer bypassed: for models whose layers cannot be run on a batch of variants."""
    rows = [last_hidden(model, ids[None])]
    for layer in decoder_layers(model):
        with _wrapped(layer, _bypass):
            rows.append(last_hidden(model, ids[None]))
    return torch.cat(rows)


@torch.no_grad()
def sweeps_exactly(model: PreTrainedModel, item: Item) -> bool:
    """Whether the sweep gives what one forward a layer gives, on the first tokens of an item."""
    ids = torch.tensor(item.input_ids[:16], device=device_of(model))
    expected = one_by_one(model, ids)
    try:
        found = sweep(model, ids)
    except RuntimeError:  # shapes that do not broadcast over variants
        return False
    tolerance = 1e-4 if expected.dtype == torch.float32 else 0.05
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@torch.no_grad()
def measure(model: PreTrainedModel, item: Item, all_tokens: bool, swept: bool = True) -> dict[str, Any]:
    """Summed losses of one item: "answer" and "kl" on its supervised tokens, "all" on all tokens where asked for.

    Each is a list [layers + 1], the baseline first (whose KL is 0). KL is KL(base || masked), summed over supervised positions.
    """
    ids, targets = item_tensors(item, device_of(model))
    hidden = (sweep if swept else one_by_one)(model, ids)
    supervised = targets != IGNORE
    answer, kl = _losses(model, hidden[:, supervised], targets[supervised], with_kl=True)
    row: dict[str, Any] = {"tokens": int(supervised.sum()), "answer": answer, "kl": kl}
    if all_tokens:
        row["all_tokens"] = len(ids) - 1
        row["all"] = _losses(model, hidden[:, :-1], ids[1:], with_kl=False)[0]
    return row


def _losses(model: PreTrainedModel, hidden: Tensor, targets: Tensor, with_kl: bool) -> tuple[list[float], list[float]]:
    """Cross-entropy and KL to the first variant, summed over rows, of hidden [variants, rows, hidden]."""
    variants, rows = hidden.shape[:2]
    losses = torch.zeros(variants, dtype=torch.float64, device=hidden.device)
    divergences = torch.zeros_like(losses)
    for start in range(0, rows, HEAD_ROWS):
        part = slice(start, start + HEAD_ROWS)
        labels = targets[part]
        base = None
        for block in range(0, variants, at_once := max(1, HEAD_ROWS // len(labels))):
            chunk = hidden[block : block + at_once, part]
            logs = functional.log_softmax(head_logits(model, chunk.flatten(0, 1)).float(), -1).unflatten(0, chunk.shape[:2])
            picked = logs.gather(-1, labels.expand(len(chunk), -1)[..., None])[..., 0]
            losses[block : block + at_once] = losses[block : block + at_once] - picked.double().sum(1)
            if with_kl:
                base = logs[0].clone() if base is None else base
                terms = (base.exp() * (base - logs)).double().sum((1, 2))
                divergences[block : block + at_once] += terms
    return losses.tolist(), divergences.tolist()


def rows_of(items: Sequence[Item]) -> list[Item]:
    """The items with something supervised: the others cannot be scored."""
    return [item for item in items if item.supervised]
