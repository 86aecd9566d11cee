"""One AdamW step on the parameters of a 1B language model: ours, with and without rates per unit, against torch's and other packages'.

Each is compared with fp64 before it is timed, and allowed what its own formats take it away (adamw_truth.py). All ways of a set-up are
timed in turn, and a copy of memory among them. Each set-up has a process of its own, so that one that fails takes no other with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from adept_fast.optim import AdamW
from bench import parser
from bench.adamw_others import versions
from bench.adamw_setups import SETUPS, parameters, shapes_of
from bench.adamw_truth import distances, shifted
from bench.adamw_ways import Way, ways_of
from bench.measure import Timed, cache_filler, device_name, held_memory, python_calls, tensor_bytes, timed_rounds

MOST = 8.0  # seconds of one way's rounds
PAIRS = ("units/ours", "rows/ours", "columns/ours", "misaligned/ours", "units/torch_group_per_unit", "clipped/torch_clip_and_fused")


def main(argv: list[str]) -> dict[str, Any]:
    """Arguments -> {"device", "threads", "scale", "units", "packages", one entry a set-up}.

    An entry has "elements", "tensors", one entry a way, "ratios" of device times (medians over rounds) and "left_out": way -> reason.
    A way has `ms` (device) and on a GPU `host_ms` (until the call returns), medians; `gb_s` and `percent_of_copy` by the bytes that its
    step must move; `python_calls`; `distance`, `allowed` and `spread` as adamw_truth.distances has them. Where it has a state of its own:
    the bytes a parameter of its tensors after a step (`state_bytes`), and those that the process, or the CUDA allocator, then holds more
    (`held_bytes`). A way or a set-up that fails has `failed` instead: the reason.
    """
    options = parser("adamw", __doc__)
    options.add_argument("--scale", type=int, help="divide the model's widths by this (default: 4 on a CPU, 1 on a GPU)")
    options.add_argument("--units", type=int, default=465, help="units with a rate each; torch's one group per unit makes as many groups")
    options.add_argument("--rounds", type=int, default=21, help="of all ways in turn, each timed once")
    options.add_argument("--setups", default=",".join(SETUPS), help="comma-separated; a single one runs in this process")
    options.add_argument("--seconds", type=float, default=float("inf"), help="end set-ups that are not done after this time")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="a torch device")
    options.add_argument("--backend", help="of ours: cuda, triton, cpu or torch (default: what fits the device)")
    given = options.parse_args(argv)
    given.scale = given.scale or (1 if given.device.startswith("cuda") else 4)
    names, end = given.setups.split(","), time.monotonic() + given.seconds
    result: dict[str, Any] = {
        "device": device_name(torch.device(given.device)),
        "threads": torch.get_num_threads(),
        "scale": given.scale,
        "units": given.units,
        "packages": versions(),
    }
    for name in names:
        result[name] = _measured(name, given) if len(names) == 1 else _in_a_process(name, given, end - time.monotonic())
    return result


def _in_a_process(name: str, given: Namespace, seconds: float) -> dict[str, Any]:
    options = {"setups": name, **{key: getattr(given, key) for key in ("scale", "units", "rounds", "device", "backend")}}
    command = [sys.executable, "-m", "bench", "adamw", *(f"--{key}={value}" for key, value in options.items() if value is not None)]
    limit = None if seconds == float("inf") else max(seconds, 0.0)
    try:
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s"}
    sys.stderr.write(done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"bench"')]  # other packages print too
    if not lines:
        return {"failed": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]}
    return json.loads(lines[-1])["result"][name]


def _measured(name: str, given: Namespace) -> dict[str, Any]:
    setup, device = SETUPS[name], torch.device(given.device)
    params = parameters(shapes_of(name, given.scale), setup.dtype, device)
    elements = sum(p.numel() for p in params)
    ways, left_out = ways_of(name, given.units, device, given.backend)
    entries: dict[str, dict[str, Any]] = {}
    made: dict[str, Optimizer] = {}
    for key, way in ways.items():
        try:
            entries[key] = _compared(way, setup.dtype, device)
            made[key], state = _made(way, params, device, made)
            entries[key] |= {held: count / elements for held, count in state.items()}
        except Exception as error:  # of another package, say: the rest is timed all the same
            entries[key] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    source = torch.zeros(min(elements, 2**30), dtype=setup.dtype, device=device)
    target = torch.empty_like(source)
    steps = {"copy": lambda: target.copy_(source), **{key: optimizer.step for key, optimizer in made.items()}}
    calls = {key: python_calls(step) for key, step in steps.items()}
    timed = timed_rounds(steps, given.rounds, device, cache_filler(device), MOST, warm=True)
    bytes_moved = {"copy": 2 * source.nbytes}
    for key, optimizer in made.items():
        floor = ways[key].floor or 3 * setup.dtype.itemsize + 2 * tensor_bytes(optimizer.state) / elements
        bytes_moved[key] = floor * elements
        entries[key]["python_calls"] = calls[key]
    rates = {key: moved / median(each.device for each in timed[key]) / 1e9 for key, moved in bytes_moved.items()}
    for key, rate in rates.items():
        speed = _times(timed[key], device) | {"gb_s": rate, "percent_of_copy": 100 * rate / rates["copy"]}
        entries[key] = speed | entries.get(key, {})
    pairs = [*PAIRS, *(f"ours/{key}" for key, way in ways.items() if key not in ("ours", "misaligned") and way.shares != "ours")]
    return {"elements": elements, "tensors": len(params), **entries, "ratios": _ratios(timed, pairs), "left_out": left_out}


def _compared(way: Way, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return distances(way.compared, dtype, device, way.margin, way.moments, way.master, way.dim, way.shift) if way.compared else {}


def _made(way: Way, params: list[Parameter], device: torch.device, made: dict[str, Optimizer]) -> tuple[Optimizer, dict[str, int]]:
    """Return an optimizer after a step, and the bytes of a state of its own. made: the ways before it."""
    if way.copied:
        given, params = params, [Parameter(shifted(p.detach(), way.shift)) for p in params]
        for param, p in zip(params, given, strict=True):
            param.grad = p.grad

    def after_a_step() -> Optimizer:
        optimizer = way.make(params)
        if way.shares:  # a state each would not fit a GPU
            optimizer.state = made[way.shares].state
        if isinstance(optimizer, AdamW) and "ours" in made:  # or masters would be reset as after an edit, at each other's steps
            optimizer._collector.written = made["ours"]._collector.written
        optimizer.step()
        return optimizer

    after_a_step()  # what is loaded, compiled and cached is held from here on
    before = held_memory(device)
    optimizer = after_a_step()
    return optimizer, {} if way.shares else {"state_bytes": tensor_bytes(optimizer.state), "held_bytes": held_memory(device) - before}


def _times(timed: list[Timed], device: torch.device) -> dict[str, float]:
    found = {"ms": 1e3 * median(each.device for each in timed)}
    return found | {"host_ms": 1e3 * median(each.host for each in timed)} if device.type == "cuda" else found


def _ratios(timed: dict[str, list[Timed]], pairs: list[str]) -> dict[str, float]:
    found = {}
    for pair in pairs:
        mine, other = (timed.get(key) for key in pair.split("/"))
        if mine and other:
            found[pair] = median(a.device / b.device for a, b in zip(mine, other, strict=False))  # one may have left
    return found
