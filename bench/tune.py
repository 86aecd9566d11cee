"""A tuning step against a full continual-pretraining step: time and peak memory, on the same tokens in the same dtype, optimizer included.

    full    all parameters, the model's own loss, torch.optim.AdamW(fused=True)
    plain   copies of four layers, all else frozen, the model's own loss, torch.optim.AdamW(fused=True)
    ours    the same copies, fast_step, adept_fast.AdamW with a rate a unit
    anchor  what an anchor to the base (Anchor) on --anchor-tokens tokens adds to a step that has one

Steps are interleaved in one process. Memory is each way's in a process of its own: the peak resident memory of two steps (so that the
optimizer's states are there while activations are) over what is resident before them, weights included.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from adept_fast.data.items import Item
from adept_fast.expansion.expand_model import expand_model, freeze_original
from adept_fast.optim import AdamW
from adept_fast.runtime.memory import forget_peak, resident
from adept_fast.tuning.fast_step import fast_step
from adept_fast.tuning.kl_anchor import Anchor
from bench import parser
from bench.models import add_model, load_model, model_name

WAYS = ("full", "plain", "ours")
MIB = 2**20


def main(argv: list[str]) -> dict[str, Any]:
    options = parser("tune", __doc__)
    add_model(options)
    options.add_argument("--layers", type=int, nargs="+", default=[17, 20, 23, 26], help="that are copied")
    options.add_argument("--tokens", type=int, default=1024, help="of a step, one sequence")
    options.add_argument("--anchor-tokens", type=int, default=256, help="of an anchor's step")
    options.add_argument("--rounds", type=int, default=9, help="of all ways in turn, each timed once")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and activations")
    options.add_argument("--way", choices=WAYS, help="print one way's peak memory above the weights in MiB, and end")
    given = options.parse_args(argv)
    if given.way:
        return {"way": given.way, "peak_mib": _peak(given)}
    base = load_model(given, given.dtype)
    anchored = _anchor(base, given)
    anchors = []
    steps = {way: _step(way, base, given) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses = {way: float(step()) for way, step in steps.items()}  # the first step makes the optimizer's states
    spread = max(losses.values()) - min(losses.values())
    if spread > 1e-3 * losses["full"]:
        raise RuntimeError(f"not the same loss before the first update: {losses}")
    for _ in range(given.rounds):
        for way, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[way].append(time.perf_counter() - start)
        start = time.perf_counter()
        anchored()
        anchors.append(time.perf_counter() - start)
    del steps, anchored, base
    peaks = {way: _elsewhere(way, argv) for way in WAYS}
    times = {way: median(each) for way, each in seconds.items()}
    return {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "model": model_name(given),
        "layers": given.layers,
        "tokens": given.tokens,
        "dtype": given.dtype,
        "rounds": given.rounds,
        "loss": losses,
        "seconds": times,
        "anchor": {"tokens": given.anchor_tokens, "seconds": median(anchors), "share_of_our_step": median(anchors) / times["ours"]},
        "tokens_per_second": {way: given.tokens / time for way, time in times.items()},
        "peak_mib_above_weights": peaks,
        "time_over_full": {way: median(a / b for a, b in zip(seconds[way], seconds["full"], strict=True)) for way in WAYS[1:]},
        "memory_over_full": {way: peaks[way] / peaks["full"] for way in WAYS[1:]},
    }


def _step(way: str, base: torch.nn.Module, given: argparse.Namespace) -> Callable[[], torch.Tensor]:
    """A whole step of one way, on parameters of its own: forward, backward, update, gradients freed. Returns the loss."""
    ids = torch.randint(3, base.config.vocab_size, (1, given.tokens), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(given.tokens)[None], "use_cache": False}
    if way == "full":
        model = copy.deepcopy(base).requires_grad_(True)
    else:
        model = expand_model(base, given.layers)
        freeze_original(model)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if way == "ours":
        masters = {"master_weights": "remainder", "state_dtype": torch.float32} if given.dtype == "bfloat16" else {}
        optimizer: torch.optim.Optimizer = AdamW(trained, lr=1e-4, weight_decay=0.01, **masters)
        for index, parameter in enumerate(trained):
            optimizer.set_unit_lr(parameter, torch.tensor(0.5 + index / len(trained)))
        context = fast_step(model)
        if not context.__enter__():
            raise RuntimeError("this model's head cannot be run without logits: there is no fast step to time")
    else:
        context = None
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True)

    def step(context: Any = context) -> torch.Tensor:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _anchor(base: torch.nn.Module, given: argparse.Namespace) -> Callable[[], torch.Tensor]:
    model = expand_model(base, given.layers)
    freeze_original(model)
    ids = torch.randint(3, base.config.vocab_size, (given.anchor_tokens,), generator=torch.Generator().manual_seed(2)).tolist()
    anchor = Anchor([Item(tuple(ids), tuple(ids))], weight=1.0, tokens=given.anchor_tokens)

    def run() -> torch.Tensor:
        kl = anchor.backward(model, anchor.every)
        model.zero_grad()
        return kl

    run()  # which looks at the kinds of the layers' outputs
    return run


def _peak(given: argparse.Namespace) -> float:
    base = copy.deepcopy(load_model(given, given.dtype))  # out of the file it is mapped from
    step = _step(given.way, base, given)
    del base
    gc.collect()
    before = resident()
    forget_peak()
    step(), step()
    return (resident("VmHWM") - before) / MIB


def _elsewhere(way: str, argv: list[str]) -> float:
    done = subprocess.run([sys.executable, "-m", "bench", "tune", *argv, "--way", way], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["result"]["peak_mib"]
