"""Public functions on tiny models, with items, batches, layers, units and rates of which some are wrong."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adept_fast import (
    AdamW,
    Units,
    apply_rates,
    expand_model,
    fast_step,
    freeze_original,
    mask_units,
    score_layers,
    score_units,
    select_layers,
    unit_rates,
    verify_expansion,
)
from adept_fast.data.items import IGNORE, Item
from adept_fast.scoring.unit_importance import UnitImportance
from tests.crash.case import Case
from tests.support import tiny_models
from tests.support.degenerate_batches import ITEMS

WIDE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # which runs natively
MODELS = [tiny_models.model(num_hidden_layers=2, **shape) for shape in ({}, WIDE)]
EXPANDED = [expand_model(model, [1]) for model in MODELS]
for _model in EXPANDED:
    freeze_original(_model)
SCORES = score_layers(MODELS[0], tiny_models.items(2))
BACKENDS = ("cpu", "cpu", "torch")
NUMBERS = (None, -1, 0, 1, 2, 3, 2.5, float("nan"), float("inf"), True, "2", 2**40, [1])
NAMES = ("tensor", "head", "neuron", "answer", "kl", "all", "masking", "gate", "fisher", "rank", "", "None", None, 3)


def _records(draw: random.Random) -> list[Any]:
    """Items, and records that are tokenised already, of which some are wrong."""
    if draw.random() < 0.4:
        return list(draw.choice(list(ITEMS.values())))
    made: list[Any] = []
    for _ in range(draw.randrange(4)):
        length = draw.choice((0, 1, 2, 5, 30))
        ids = [draw.randrange(3, tiny_models.VOCABULARY) for _ in range(length)]
        labels = [draw.choice((token, IGNORE)) for token in ids]
        change = draw.choice(("", "", "", "beyond", "negative", "shifted", "short", "text", "float", "none", "an item"))
        if change == "beyond" and ids:
            ids[-1] = labels[-1] = draw.choice((tiny_models.VOCABULARY, 2**40, 2**70))
        elif change == "negative" and ids:
            ids[0] = -1
        elif change == "shifted":
            labels = [*labels[1:], IGNORE]
        elif change == "short":
            labels = labels[:-1]
        elif change == "float":
            ids = [float(token) for token in ids]
        made.append(
            {"text": "a text"} if change == "text" else None if change == "none" else Item(tuple(ids), tuple(ids)) if change == "an item"
            else {"input_ids": ids, "labels": labels}
        )  # fmt: skip
    return made


def _numbers(values: Sequence[float]) -> Tensor:
    return torch.tensor([*values], dtype=torch.float64)


def layer_scores(draw: random.Random) -> Case:
    model, seed = draw.randrange(2), draw.randrange(2**30)
    options: dict[str, Any] = {"method": draw.choice(("masking", "masking", "gate", "cumulative", "fisher", "rank", "block_influence"))}
    lists = (["kl", "all"], ["kl", "x"], None, "all")
    for name, pool in (("loss", NAMES), ("sweep_tokens", NUMBERS), ("seed", NUMBERS), ("losses", lists)):
        if draw.random() < 0.3:
            options[name] = draw.choice(pool)

    def call() -> list[Tensor]:
        scores = score_layers(MODELS[model], _records(random.Random(seed)), **options)
        return [_numbers(getattr(profile, key)) for profile in scores.profiles.values() for key in ("values", "low", "high")]

    return Case(f"score_layers of model {model}, records of {seed}, {options}", call, backend=draw.choice(BACKENDS))


def unit_scores(draw: random.Random) -> Case:
    model, other, seed = draw.randrange(2), draw.randrange(2), draw.randrange(2**30)
    granularity, momenta = draw.choice(NAMES[:3]), draw.choice((None, None, "right", "short", "meta", "other"))

    def call() -> list[Tensor]:
        units = Units.of(EXPANDED[model if seed % 3 else other], granularity)
        given = None
        if momenta:
            changes = {"right": lambda x: x, "short": lambda x: x[:1], "meta": lambda x: x.to("meta"), "other": lambda x: x.flatten()}
            change = changes[momenta]
            given = {name: change(torch.ones_like(EXPANDED[model].get_parameter(name))) for name in units.slices}
        found = score_units(EXPANDED[model], _records(random.Random(seed)), units, momenta=given)
        rates = unit_rates(found)
        optimizer = AdamW([p for p in EXPANDED[model].parameters() if p.requires_grad], lr=1e-3)
        apply_rates(optimizer, EXPANDED[model], units, rates)
        return [found.abs_taylor, found.fisher, rates]

    described = f"score_units of model {model}, units {granularity} of {model if seed % 3 else other}, records of {seed}, {momenta}"
    return Case(described, call, backend=draw.choice(BACKENDS))


def masked_units(draw: random.Random) -> Case:
    model, seed = draw.randrange(2), draw.randrange(2**30)
    options: dict[str, Any] = {"layers": draw.choice(([1], [0], [0, 1], [], [2], [-1], [1, 1], [0.5], None, "1", 1))}
    for name, pool in (("granularity", NAMES), ("loss", NAMES), ("sweep_tokens", NUMBERS)):
        if draw.random() < 0.3:
            options[name] = draw.choice(pool)

    def call() -> list[Tensor]:
        return [_numbers(mask_units(MODELS[model], _records(random.Random(seed)), **options).values)]

    return Case(f"mask_units of model {model}, records of {seed}, {options}", call, backend=draw.choice(BACKENDS))


def fast_steps(draw: random.Random) -> Case:
    """Against transformers' own loss and gradients, but for its 0 / 0."""
    index, rows, length = draw.randrange(2), draw.choice((0, 1, 2, 3)), draw.choice((0, 1, 2, 9))
    ids = torch.tensor([[draw.randrange(3, tiny_models.VOCABULARY) for _ in range(length)] for _ in range(rows)], dtype=torch.int64)
    ids = ids.view(rows, length)
    keep = draw.choice((0.0, 0.1, 0.5, 1.0))
    counted = torch.tensor([draw.random() < keep for _ in range(ids.numel())], dtype=torch.bool).view(ids.shape)
    labels = torch.where(counted, ids, IGNORE)
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
    targets = int((labels[:, 1:] != IGNORE).sum())
    if draw.random() < 0.5:
        batch["num_items_in_batch"] = draw.choice((max(targets, 1), torch.tensor(7.5), torch.tensor(targets or 0) if not targets else 3))
    if draw.random() < 0.2:
        batch["position_ids"] = torch.zeros_like(ids)
    wrong = draw.choice((None, None, "int32 labels", "short labels", "labels beyond", "tokens beyond", "float labels", "meta labels"))
    change = {
        "int32 labels": {"labels": labels.int()},
        "short labels": {"labels": labels[:, 1:]},
        "labels beyond": {"labels": torch.full_like(labels, tiny_models.VOCABULARY)},
        "tokens beyond": {"input_ids": torch.full_like(ids, tiny_models.VOCABULARY)},
        "float labels": {"labels": labels.float()},
        "meta labels": {"labels": labels.to("meta")},
        None: {},
    }[wrong]
    batch |= change

    def run(fast: bool) -> list[Tensor]:
        model = copy.deepcopy(EXPANDED[index]).train()
        if fast:
            with fast_step(model) as active:
                assert active
                loss = model(**batch, use_cache=False).loss
        else:
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        return [loss.detach() if targets or wrong else loss.detach().nan_to_num(), *grads]

    described = f"a batch of {rows} x {length}, {targets} targets, {wrong}, {sorted(batch)}"
    expected = (lambda: run(False)) if wrong is None else None
    sound = wrong is None and rows * length > 0
    return Case(described, lambda: run(True), expected, valid=sound, rtol=1e-3, atol=1e-5, backend=draw.choice(BACKENDS))


def choices(draw: random.Random) -> Case:
    """select_layers, expand_model, verify_expansion, Units.of, unit_rates and apply_rates."""
    number, name = draw.choice(NUMBERS), draw.choice((*NAMES, "lowest", "uniform", "lowest_per_band"))
    layers = draw.choice(([0], [1, 0], [0, 0], [2], [-1], [], [1.0], None, 0, "0", [True]))
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))
    inputs = draw.choice((None, ids, ids[:0], ids[0], ids.float(), ids * 1000, -ids, ids.int(), ids.to("meta")))
    ones = torch.ones(9)
    rates = draw.choice((ones, ones[1:], ones[:1], torch.tensor(1.0), ones * torch.nan, -ones, ones.bool(), ones.to("meta"), [1.0] * 9))
    values = draw.choice((torch.ones(9), torch.arange(9.0), torch.zeros(9), torch.full((9,), torch.inf), torch.ones(3)))
    way = draw.choice(("select", "budget", "expand", "verify", "units", "rates", "apply", "another model"))

    def call() -> list[Tensor]:
        if way == "select":
            return [_numbers(select_layers(SCORES, number, name))]
        if way == "budget":
            return [_numbers(select_layers(SCORES, budget={draw.choice(("time", "parameters", "x")): number}))]
        if way == "expand":
            return [expand_model(MODELS[0], layers)(ids).logits]
        if way == "verify":
            verify_expansion(MODELS[0], EXPANDED[0], inputs)
            return []
        units = Units.of(EXPANDED[0], name if way == "units" else "tensor")
        if way == "units":
            return [units.sizes]
        if way == "rates":
            return [unit_rates(UnitImportance(units, values.double(), values.double()), name if name in NAMES[3:] else "rank", number)]
        model = EXPANDED[1] if way == "another model" else EXPANDED[0]
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        apply_rates(optimizer, model, units, rates)
        return [optimizer.unit_lr(p)[0] for p in model.parameters() if p.requires_grad]

    return Case(f"{way}: {number}, {name}, {layers}, inputs {inputs}, rates {rates}, values {values}", call)


FAMILIES = (layer_scores, unit_scores, masked_units, fast_steps, choices)
