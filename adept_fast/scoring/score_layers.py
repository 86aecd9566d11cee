"""Score the importance of each layer for a probe corpus."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.data.items import Item, load_items
from adept_fast.data.sources import Source
from adept_fast.errors import InputError
from adept_fast.models.decoder_layers import decoder_layers, evaluating, vocabulary_of
from adept_fast.models.unwrap import unwrapped
from adept_fast.scoring.budget import LayerCosts
from adept_fast.scoring.cheap_scores import cheap_scores
from adept_fast.scoring.item_losses import Measuring, require_losses
from adept_fast.scoring.layer_masking import LayerMasks
from adept_fast.scoring.race import Race, certificate, run
from adept_fast.scoring.scores import ItemScores, LayerScores
from adept_fast.scoring.settings import CHEAP, LOSSES, Score
from adept_fast.scoring.sweep import plan
from adept_fast.settings.validation import check, require_made, require_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LayerMethod = Callable[["PreTrainedModel", list[Item]], Tensor]
OWN = "own"  # the profile of a callable method


def score_layers(
    model: PreTrainedModel,
    probe: str | Source | Iterable[Mapping[str, Any] | Item],
    method: str | LayerMethod = Score.method,
    loss: str = "answer",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    losses: Collection[str] = (),
    domain: Iterable[Item] = (),
    race: Race | None = None,
    sweep_tokens: int | None = None,
    seed: int = Score.seed,
    journal: Path | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> LayerScores:
    """Score each decoder layer, by default as the loss without it minus the loss with it.

    If torch.distributed is initialised, each process holds a whole model and measures a part of the items; all return the same scores.

    Args:
        model: a causal language model of transformers
        probe: records, a path or dataset name (with `tokenizer`), or tokenised items {"input_ids", "labels"}
        method: "masking" (exact), one of "gate", "cumulative", "rank", "fisher", "block_influence" (cheap_scores.py), or a callable
            (model, items) -> [items, layers], the score of each layer on each item; a layer's value is the mean over items
        loss: the primary profile, by which layers are selected
            answer: cross-entropy of the supervised tokens
            kl: KL(base || masked) on them, never negative
            all: cross-entropy of all tokens
        tokenizer: needed for a probe that is not tokenised
        losses: further profiles to measure in the same pass; "all" runs the head on every token
        domain: items of another corpus; the loss on all their tokens becomes the profile "domain"
        race: stop early, once the k lowest layers are certain. It works with masking and the primary loss alone; layers that were dropped
            early, and copies, are then measured on fewer items
        sweep_tokens: bound on variants times tokens of one layer call, and so on memory; None: 2,048 on a CPU, 16,384 on a GPU
        seed: of the bootstrap and of the race's order
        journal: a file that lets a killed call resume; the caller removes it
        inputs: stored in the result, to tell later what it was made from

    Returns:
        LayerScores: values, low and high, each [layers], nats per supervised token, with 95 % bootstrap intervals over items; with `race`
            also a certificate

    Raises:
        InputError: an unknown method or loss, a probe with nothing supervised, or a loss that is not finite

    >>> scores = score_layers(model, probe)
    >>> len(scores.values), scores.items
    (4, 12)

    Source: ADEPT (arXiv 2510.10071), stage 1.
    """
    model = unwrapped(model)
    named: dict[str, Any] = {} if callable(method) else {"method": method}
    check(Score, sweep_tokens=sweep_tokens, seed=seed, **named)
    require_losses(loss, losses)
    if race is not None:
        require_made("race", race, Race, "Race(k=..., regret=...)")
    wanted, journal = {loss, *losses}, journal and require_path("journal", journal)
    if race and (method != "masking" or wanted != {loss}):
        raise InputError("a race measures masking by its one loss: give no other method or losses")
    items = [item for item in load_items(probe, tokenizer, vocabulary=vocabulary_of(model)) if item.supervised]
    domain = _all_tokens(model, domain)
    copies = record.copies if (record := AdeptConfig.of(model)) else ()
    started, proof = time.perf_counter(), None
    notes: tuple[str, ...] = ()
    if callable(method):
        if losses or domain:
            raise InputError("a callable method measures what it returns, on the probe: give no losses and no domain")
        loss, per_item, method = OWN, {OWN: _own(model, items, method)}, f"{getattr(method, '__name__', type(method).__name__)}()"
    elif method in CHEAP:
        loss, per_item = _cheap(model, items, method, loss, wanted)
        if domain:
            per_item["domain"] = cheap_scores(model, domain, method, "all")
    else:
        with evaluating(model):
            masks = LayerMasks(model, plan(model, [*items, *domain], sweep_tokens))
            if not masks.plan.swept:
                notes = ("this model's layers cannot be run on a batch of variants: scored with one forward a layer",)
            with Measuring(masks, items, wanted, journal, inputs) as measuring:
                if race:
                    proof = _raced(measuring, race, loss, seed, copies)
                else:
                    measuring.measure("scoring")
                per_item = {name: measuring.item_scores(name) for name in measuring.names}
            notes += _infinite_loss_notes(per_item)
            if domain:
                beside = journal and journal.with_name(f"{journal.name}.domain")
                with Measuring(masks, domain, ["all"], beside, inputs) as measuring:
                    measuring.measure("scoring the domain")
                    per_item["domain"] = measuring.item_scores("all")
    for note in notes:
        logger.warning(note)
    return LayerScores(
        method=method,
        loss=loss,
        profiles={name: scores.profile(method, seed) for name, scores in per_item.items()},
        items=len(items),
        tokens=sum(item.supervised for item in items),
        seconds=time.perf_counter() - started,
        model=model.config.name_or_path or "",
        notes=notes,
        inputs=dict(inputs or {}),
        certificate=proof,
        costs=LayerCosts.of(model),
        copies=copies,
        per_item=per_item,
    )


def _infinite_loss_notes(per_item: Mapping[str, ItemScores]) -> tuple[str, ...]:
    """Name each layer without which the loss of some items is not finite."""
    found = {name: scores.sums.isinf().sum(0) for name, scores in per_item.items()}
    return tuple(
        f"without layer {layer} the loss ({name}) of {items} of {len(per_item[name].sums)} items is not finite: it counts as above all "
        "others; a dtype of more range than float16 may give it a number"
        for name, counts in found.items()
        for layer, items in enumerate(counts.tolist())
        if items
    )


def _all_tokens(model: PreTrainedModel, domain: Iterable[Item]) -> list[Item]:
    """Supervise the items of a domain on all their tokens. Items of one token, which nothing predicts, are left out."""
    require_made("domain", domain, Iterable, "give items, load_items(texts, tokenizer) say")
    given = list(domain)
    for item in given:
        require_made("an item of domain", item, Item, "load_items(texts, tokenizer) makes them of texts and records")
    items = [Item(item.input_ids, item.input_ids) for item in given if len(item.input_ids) > 1]
    if given and not items:
        raise InputError("domain: no item of two tokens or more, so nothing to predict")
    return load_items(items, vocabulary=vocabulary_of(model)) if items else []


def _own(model: PreTrainedModel, items: list[Item], method: LayerMethod) -> ItemScores:
    with evaluating(model):
        found = torch.as_tensor(method(model, items)).detach().double().cpu()
    wanted = (len(items), len(decoder_layers(model)))
    if found.shape != wanted or bool(found.isnan().any()):
        raise InputError(f"method must return a score of each item and layer, {list(wanted)} without NaN, found {list(found.shape)}")
    return ItemScores(found, torch.ones(len(items), dtype=torch.float64))


def _cheap(model: PreTrainedModel, items: list[Item], method: str, loss: str, wanted: Collection[str]) -> tuple[str, dict[str, ItemScores]]:
    """Return the primary profile and the scores of items by profile. Block influence needs no loss: its one profile is "hidden"."""
    if method == "block_influence":
        return "hidden", {"hidden": cheap_scores(model, items, method, "hidden")}
    if "kl" in wanted:
        raise InputError(f"{method} has no profile by kl: the gradient of KL(base || base) is 0; give loss answer or all")
    return loss, {name: cheap_scores(model, items, method, name) for name in LOSSES if name in wanted}


def _raced(measuring: Measuring, race: Race, loss: str, seed: int, copies: Collection[int]) -> dict[str, Any]:
    tokens = measuring.item_scores(loss).weights

    def measure(items: Sequence[int], layers: Sequence[int]) -> torch.Tensor:
        measuring.measure(f"racing {len(layers)} layers", items, layers)
        return measuring.item_scores(loss).sums[list(items)]

    outcome = run(race, tokens, measuring.masks.count, measure, seed, copies)
    return certificate(race, outcome, tokens, seed, measuring.cost / measuring.whole_cost())
