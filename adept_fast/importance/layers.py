"""score_layers: the importance of each layer for a probe corpus."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from adept_fast.data.items import Item, load_items
from adept_fast.data.sources import Source
from adept_fast.errors import InputError
from adept_fast.importance import masking
from adept_fast.importance.journal import Journal
from adept_fast.importance.scores import LayerScores, Profile
from adept_fast.inputs import digest
from adept_fast.intervals import bootstrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHODS = ("masking",)
LOSSES = ("answer", "kl", "all")


def score_layers(
    model: PreTrainedModel,
    probe: str | Source | Iterable[Mapping[str, Any] | Item],
    method: str = "masking",
    loss: str = "answer",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    all_tokens: bool | None = None,
    seed: int = 0,
    journal: Path | None = None,
    inputs: Mapping[str, Any] | None = None,
    quiet: bool | None = None,
) -> LayerScores:
    """Importance of each decoder layer, nats per supervised token, with 95 % bootstrap intervals over items.

    loss: the primary profile: "answer" (supervised tokens), "kl" (KL(base || masked) on them, never negative), "all" (all tokens).
    Answer and KL come from the same pass; the all-token profile costs the head on every token: all_tokens=True, or loss="all".
    probe: records, a path or a dataset name (with tokenizer), or tokenised items. journal: file that lets a killed call resume, which the
    caller removes.
    Raises InputError for an unknown method or loss, or a probe with nothing supervised.
    """
    for name, value, known in (("method", method, METHODS), ("loss", loss, LOSSES)):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, found {value!r}")
    items = masking.rows_of(load_items(probe, tokenizer))
    all_tokens = loss == "all" if all_tokens is None else all_tokens or loss == "all"
    started, training = time.perf_counter(), model.training
    model.eval()
    swept = masking.sweeps_exactly(model, items[0])
    notes = () if swept else ("this model's layers cannot be run on a batch of variants: scored with one forward a layer",)
    header = {
        "model": [model.config.name_or_path, str(model.dtype), digest(model.config.to_dict())],
        "items": digest([[item.input_ids, item.labels] for item in items]),
        "all_tokens": all_tokens,
        "inputs": dict(inputs or {}),
    }
    log = Journal(journal, header) if journal else None
    rows = list(log.rows) if log else []
    for item in tqdm(items[len(rows) :], desc="scoring", unit="item", initial=len(rows), total=len(items), disable=quiet):
        row = masking.measure(model, item, all_tokens, swept)
        rows.append(row)
        if log:
            log.append(row)
    if log:
        log.close()
    model.train(training)
    names = ["answer", "kl", *(["all"] if all_tokens else [])]
    return LayerScores(
        method=method,
        loss=loss,
        profiles={name: _profile(rows, name, seed) for name in names},
        items=len(items),
        tokens=sum(row["tokens"] for row in rows),
        seconds=time.perf_counter() - started,
        model=model.config.name_or_path,
        notes=notes,
        inputs=dict(inputs or {}),
    )


def _profile(rows: list[dict[str, Any]], name: str, seed: int) -> Profile:
    losses = torch.tensor([row[name] for row in rows], dtype=torch.float64)
    tokens = torch.tensor([row["all_tokens" if name == "all" else "tokens"] for row in rows])
    values, low, high = bootstrap(losses[:, 1:] - losses[:, :1], tokens, seed)
    base = None if name == "kl" else float(losses[:, 0].sum() / tokens.sum())
    return Profile(tuple(values.tolist()), tuple(low.tolist()), tuple(high.tolist()), base)
