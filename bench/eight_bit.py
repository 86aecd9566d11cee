"""Compare training with 8-bit moments to training with fp32 moments, by the loss on held-out text.

fp32     state_dtype=torch.float32, master_weights="remainder": 8 bytes of moments an element, an exact fp32 master
int8     state_dtype="int8", master_weights="remainder8": 2.1 bytes of moments an element, a master of 24 bits
control  state_dtype=torch.float32, master_weights="remainder8": shows what other last bits of the weights come to by themselves

All train a bf16 model on the same batches of --text: with one rate for all (`one`), and with a multiplier from 0 to 2 for each row of each
matrix, every eighth row frozen (`units`). A seed sets batches, multipliers and the initial values of a random model. Without --model all of
a random Llama of 1.1 million parameters is trained, on bytes; with it silent copies of --layers are, on tokens. Each run is stored in the
folder --out, and the same command goes on with the runs that are not there. Losses are in nats per token on documents that are not
trained on, after each eighth of the steps. The spread is the highest minus the lowest last loss of fp32's seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adept_fast.checkpoints import checkpoint
from adept_fast.data.documents import Documents, document_tokens
from adept_fast.data.encoding import Encoder
from adept_fast.data.packing import Blocks
from adept_fast.data.readers import reader
from adept_fast.data.sources import Source
from adept_fast.data.templates import document_text
from adept_fast.expansion.expand_model import expand_model, freeze_original
from adept_fast.optim import AdamW
from adept_fast.runtime.atomic_files import write_text
from adept_fast.tuning.fast_step import fast_step
from bench import parser

STATES: dict[str, dict[str, Any]] = {
    "fp32": {"state_dtype": torch.float32, "master_weights": "remainder"},
    "int8": {"state_dtype": "int8", "master_weights": "remainder8"},
    "control": {"state_dtype": torch.float32, "master_weights": "remainder8"},
}
RATES = ("one", "units")
SMALL = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
POINTS = 8
WARM_UP = 0.1  # of the steps; then a cosine to a tenth of the rate

Block = dict[str, Tensor]
Subject = tuple[Callable[[], Any], list[Block], list[Block]]


class Cell(NamedTuple):
    seed: int
    rates: str
    states: str


def main(argv: list[str]) -> dict[str, Any]:
    options = parser("eight_bit", __doc__)
    options.add_argument("--text", required=True, help="a file of documents")
    options.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="stores a line for each cell")
    options.add_argument("--model", help="a checkpoint folder or hub name; without it a small random model is trained whole")
    options.add_argument("--layers", type=int, nargs="+", default=[17, 20, 23, 26], help="that are copied, with --model")
    options.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    options.add_argument("--steps", type=int, default=1000, help="of each cell")
    options.add_argument("--batch", type=int, default=8, help="sequences of a step")
    options.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    options.add_argument("--held-out", type=int, default=64, help="so many sequences are measured and not trained on")
    options.add_argument("--lr", type=float, default=2e-3, help="the highest rate")
    options.add_argument("--beta2", type=float, default=0.999, help="the decay rate of second moments")
    options.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after this time; 0 reports what is stored")
    given = options.parse_args(argv)
    if given.steps < POINTS:
        options.error(f"--steps {given.steps}: give {POINTS} or more, one for each reading of the loss")
    setting = {name: value for name, value in vars(given).items() if name not in ("out", "seeds", "seconds")}
    setting |= {"text": Path(given.text).name, "model": Path(given.model).name if given.model else "small"}
    digest = hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:8]
    cells = [Cell(*each) for each in itertools.product(range(given.seeds), RATES, STATES)]
    cells.sort(key=lambda cell: cell.states == "control")
    paths = {cell: given.out / f"{digest}-seed{cell.seed}-{cell.rates}-{cell.states}.json" for cell in cells}
    left = [cell for cell in cells if not paths[cell].exists()]
    start = time.monotonic()
    subject = _subject(given, options) if left and given.seconds else None
    for number, cell in enumerate(left):
        if subject is None or time.monotonic() > start + given.seconds:
            break
        say = partial(_say, start, number * given.steps, len(left) * given.steps, cell)
        line = {**setting, **cell._asdict(), "result": _run(given, cell, subject, say)}
        write_text(paths[cell], json.dumps(line, allow_nan=False) + "\n")
    found = {cell: json.loads(path.read_text())["result"] for cell, path in paths.items() if path.exists()}
    return {"device": "cpu", "threads": torch.get_num_threads(), **setting, "cells": len(found), **_table(found)}


def _say(start: float, before: int, steps: int, cell: Cell, step: int, loss: float) -> None:
    """before: the steps of earlier cells since `start`; steps: those of all."""
    minutes = (time.monotonic() - start) / (before + step) * (steps - before - step) / 60
    print(f"{' '.join(map(str, cell))}: step {step}, loss {loss:.4f}, {minutes:.0f} min left of all", file=sys.stderr, flush=True)


def _subject(given: argparse.Namespace, options: argparse.ArgumentParser) -> Subject:
    """Return what makes a model whose trained parameters require gradients, the held-out blocks and those to train on."""
    if given.model:
        folder = checkpoint.resolve(given.model)
        base, encoder = checkpoint.load_model(folder, dtype="bfloat16"), Encoder(checkpoint.load_tokenizer(folder))

        def make() -> Any:
            model = expand_model(base, given.layers)
            freeze_original(model)
            return model

        def tokens(text: str) -> list[np.ndarray]:
            return document_tokens([text], encoder)

        begin = np.array(encoder.begin, np.int32)
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        def make() -> Any:
            config = AutoConfig.for_model("llama", **SMALL)
            return AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.bfloat16)  # faster on short sequences

        def tokens(text: str) -> list[np.ndarray]:
            return [np.frombuffer(text.encode() + b"\0", np.uint8).astype(np.int32)]

        begin = np.zeros(0, np.int32)
    texts = [text for record in reader(Source(given.text)).records() if (text := document_text(record))]
    random.Random(0).shuffle(texts)  # a file may be in the order of its subjects
    remaining = iter(texts)
    held_out = _blocks(given.held_out, given.length, remaining, tokens, begin)
    train = _blocks(given.steps * given.batch, given.length, remaining, tokens, begin)
    if len(train) < given.batch:
        options.error(f"--text {given.text}: too short for {given.held_out} held-out sequences and one step: give more text")
    return make, held_out, train


def _blocks(count: int, length: int, texts: Iterator[str], tokens: Callable[[str], list[np.ndarray]], begin: np.ndarray) -> list[Block]:
    """Pack documents into at most `count` blocks; fewer where the text ends."""
    documents: list[np.ndarray] = []
    missing = count * length
    while missing > 0 and (text := next(texts, None)):
        documents += tokens(text)
        missing -= len(documents[-1])
    ids = np.concatenate(documents) if documents else np.zeros(0, np.int32)
    blocks = Blocks(Documents(ids, np.cumsum([0, *map(len, documents)]), begin), np.arange(len(documents)), length)
    return [blocks[index] for index in range(min(count, len(blocks)))]


def _batch(blocks: list[Block]) -> dict[str, Any]:
    return {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]} | {"use_cache": False}


def _run(given: argparse.Namespace, cell: Cell, subject: Subject, say: Callable[[int, float], None]) -> dict[str, Any]:
    """Train one cell: losses at the points, and the share of frozen and of other rows whose bits stayed."""
    make, held_out, train = subject
    torch.manual_seed(cell.seed)
    model, batches, draws = make().train(), torch.Generator().manual_seed(cell.seed), torch.Generator().manual_seed(cell.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, lr=given.lr, betas=(0.9, given.beta2), weight_decay=0.1, max_grad_norm=1.0, **STATES[cell.states])
    rows = []
    for parameter in trained:
        if cell.rates == "units" and parameter.ndim > 1:
            multipliers = 2 * torch.rand(len(parameter), generator=draws)
            multipliers[::8] = 0
            optimizer.set_unit_lr(parameter, multipliers)
            rows.append((parameter, parameter.detach().clone(), multipliers == 0))
    losses: list[float] = []
    with fast_step(model):
        for step in range(1, given.steps + 1):
            warm, done = min(1, step / (WARM_UP * given.steps)), (step - 1) / (given.steps - 1)
            optimizer.param_groups[0]["lr"] = given.lr * warm * (0.55 + 0.45 * math.cos(math.pi * done))
            chosen = torch.randint(len(train), (given.batch,), generator=batches).tolist()
            model(**_batch([train[index] for index in chosen])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step * POINTS // given.steps > len(losses):
                losses.append(_loss(model, held_out, given.batch))
                say(step, losses[-1])
    result = {"losses": losses, "trained": sum(parameter.numel() for parameter in trained)}
    if rows:
        same = torch.cat([(now.detach().view(torch.int16) == before.view(torch.int16)).all(1) for now, before, _ in rows])
        frozen = torch.cat([mask for _, _, mask in rows])
        for name, mask in (("frozen", frozen), ("other", ~frozen)):
            result |= {f"{name}_rows": int(mask.sum()), f"{name}_unchanged": float(same[mask].float().mean())}
    return result


@torch.no_grad()
def _loss(model: Any, blocks: list[Block], batch: int) -> float:
    """Return nats per token."""
    model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(blocks), batch):
        inputs = _batch(blocks[start : start + batch])
        count = int((inputs["labels"][:, 1:] >= 0).sum())
        total += float(model(**inputs).loss) * count
        tokens += count
    model.train()
    return total / tokens


def _table(found: dict[Cell, dict[str, Any]]) -> dict[str, Any]:
    """Compare the pairs that are complete."""
    made: dict[str, Any] = {}
    for rates in RATES:
        there = {states: {str(cell.seed): result for cell, result in found.items() if cell[1:] == (rates, states)} for states in STATES}
        full = there["fp32"]
        made[rates] = {**there, "spread_of_fp32": float(np.ptp([run["losses"][-1] for run in full.values()])) if len(full) > 1 else None}
        for states in ("int8", "control"):
            both = {seed: (run["losses"], full[seed]["losses"]) for seed, run in there[states].items() if seed in full}
            made[rates][f"{states}_minus_fp32"] = {seed: np.subtract(*losses).tolist() for seed, losses in both.items()}
    return made
