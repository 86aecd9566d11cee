"""One AdamW step of two checkouts, each in a process of its own, in turn: fp32, bf16 and a rate per unit, old against new."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

from bench import parser

ROOT = Path(__file__).parents[1]
SETUPS = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "fp32 units": (torch.float32, True),
    "bf16 units": (torch.bfloat16, True),
}
SERVER = """
import sys, time
import torch
from adept_fast import AdamW
from bench.adamw import HYPER, _multipliers, _parameters, blocks, llama_1b
from bench.measure import cache_filler

scale, units, rated, dtype = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True", getattr(torch, sys.argv[4])
shapes, device = llama_1b(scale), torch.device("cpu")
params, flush = _parameters(shapes, dtype, device), cache_filler(device)
optimizer, cut = AdamW(params, **HYPER), blocks(shapes, units)
if rated:
    for p, rows, values in zip(params, cut, _multipliers(units, device).split([len(rows) for rows in cut]), strict=True):
        optimizer.set_unit_lr(p, values.repeat_interleave(torch.tensor(rows)))
for _ in range(3):
    optimizer.step()
print("ready", flush=True)
for _ in sys.stdin:
    flush.add_(1)
    start = time.perf_counter()
    optimizer.step()
    print(time.perf_counter() - start, flush=True)
"""


def main(argv: list[str]) -> dict:
    """Arguments -> {"device", "threads", one entry a set-up}: `old_ms` and `new_ms` (medians of steps taken in turn), `new/old`
    (median of the rounds' ratios)."""
    options = parser("adamw_builds", __doc__)
    options.add_argument("--old", required=True, help="another checkout, its native code built")
    options.add_argument("--scale", type=int, default=4, help="divide the model's widths by this")
    options.add_argument("--units", type=int, default=465, help="units with a rate each")
    options.add_argument("--rounds", type=int, default=41, help="of both builds in turn, each timed once")
    given = options.parse_args(argv)
    result: dict = {"device": "cpu", "threads": torch.get_num_threads()}
    for name, (dtype, rated) in SETUPS.items():
        arguments = [str(given.scale), str(given.units), str(rated), str(dtype).removeprefix("torch.")]
        builds = {"old": _server(Path(given.old), arguments), "new": _server(ROOT, arguments)}
        seconds: dict[str, list[float]] = {build: [] for build in builds}
        for number in range(given.rounds):
            for build in sorted(builds, reverse=bool(number % 2)):
                builds[build].stdin.write("step\n")
                builds[build].stdin.flush()
                seconds[build].append(float(builds[build].stdout.readline()))
        for server in builds.values():
            server.stdin.close()
            server.wait()
        old, new = (1e3 * median(seconds[build]) for build in ("old", "new"))
        ratio = median(b / a for a, b in zip(seconds["old"], seconds["new"], strict=True))
        result[name] = {"old_ms": old, "new_ms": new, "new/old": ratio}
    return result


def _server(checkout: Path, arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SERVER, *arguments]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    server = subprocess.Popen(command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "ready\n", f"{checkout}: the build does not start"
    return server
