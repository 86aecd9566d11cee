"""Two checkouts doing the same work in turn, each in a process of its own: AdamW steps, a scoring of layers, a scoring of units."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

from bench import parser
from bench.adamw_setups import HYPER, blocks, llama_1b

ROOT = Path(__file__).parents[1]
SERVER = """
import contextlib, sys, time
import torch
{setup}
for _ in range(3):
    work()
print("ready", flush=True)
for _ in sys.stdin:
    between()
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        work()
    print(time.perf_counter() - start, flush=True)
"""
ADAMW = """
from adept_fast import AdamW

generator, params = torch.Generator().manual_seed(0), []
for shape in {shapes}:
    params.append(torch.nn.Parameter(torch.randn(shape, generator=generator).to(torch.{dtype})))
    params[-1].grad = torch.randn(shape, generator=generator).to(torch.{dtype})
flush, optimizer = torch.zeros(2**26, dtype=torch.uint8), AdamW(params, **{hyper})
if {rated}:
    cut = {cut}
    for p, rows, values in zip(params, cut, torch.linspace(0.1, 1.9, {units}).split([len(rows) for rows in cut]), strict=True):
        optimizer.set_unit_lr(p, values.repeat_interleave(torch.tensor(rows)))
work, between = optimizer.step, lambda: flush.add_(1)
"""
SCORES = """
from transformers import AutoConfig, AutoModelForCausalLM
import adept_fast
from bench.models import SMOLLM2

torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMOLLM2 | {{"num_hidden_layers": 6}})).eval()
items = []
for _ in range(4):
    ids = torch.randint(3, SMOLLM2["vocab_size"], (int(torch.randint(40, 200, ())),)).tolist()
    items.append({{"input_ids": ids, "labels": [-100] * (len(ids) - 11) + ids[-11:]}})
between = lambda: None
"""
LAYERS = SCORES + "work = lambda: adept_fast.score_layers(model, items)"
UNITS = SCORES + """
model = adept_fast.expand_model(model, [1, 4])
units = adept_fast.Units.of(model)
work = lambda: adept_fast.score_units(model, items, units)
"""


def main(argv: list[str]) -> dict:
    """Arguments -> {"device", "threads", one entry a work}: `old_ms` and `new_ms` (medians of works done in turn), `new/old`
    (median of the rounds' ratios)."""
    options = parser("builds", __doc__)
    options.add_argument("--old", required=True, help="another checkout, its native code built")
    options.add_argument("--scale", type=int, default=4, help="divide the widths of AdamW's model by this")
    options.add_argument("--units", type=int, default=465, help="units with a rate each")
    options.add_argument("--rounds", type=int, default=41, help="of both builds in turn, each timed once")
    given = options.parse_args(argv)
    shapes = llama_1b(given.scale)
    shared = {"shapes": shapes, "cut": blocks(shapes, given.units), "units": given.units, "hyper": HYPER}
    works = {
        f"adamw {dtype}{' units' * rated}": ADAMW.format(dtype=dtype, rated=rated, **shared)
        for rated in (False, True)
        for dtype in ("float32", "bfloat16")
    } | {"score_layers": LAYERS.format(), "score_units": UNITS.format()}
    compared = {name: compare(setup, given.old, given.rounds) for name, setup in works.items()}
    return {"device": "cpu", "threads": torch.get_num_threads(), **compared}


def compare(setup: str, old: str, rounds: int) -> dict[str, float]:
    """Time the work that `setup` defines, in both checkouts in turn."""
    builds = {"old": _server(Path(old), setup), "new": _server(ROOT, setup)}
    seconds: dict[str, list[float]] = {build: [] for build in builds}
    for number in range(rounds):
        for build in sorted(builds, reverse=bool(number % 2)):
            builds[build].stdin.write("work\n")
            builds[build].stdin.flush()
            seconds[build].append(float(builds[build].stdout.readline()))
    for server in builds.values():
        server.stdin.close()
        server.wait()
    ratio = median(new / old for old, new in zip(seconds["old"], seconds["new"], strict=True))
    return {"old_ms": 1e3 * median(seconds["old"]), "new_ms": 1e3 * median(seconds["new"]), "new/old": ratio}


def _server(checkout: Path, setup: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SERVER.format(setup=setup)]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    server = subprocess.Popen(command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ready = server.stdout.readline()
    assert ready == "ready\n", f"{checkout}: the build does not start ({ready.strip()})"
    return server
