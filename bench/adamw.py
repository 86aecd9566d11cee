"""One AdamW step: ours against torch's, with and without rates per unit. Validated against fp64 before anything is timed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.nn import Parameter

from adept_fast.optim import AdamW

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOOR_BYTES = {"fp32": 28, "bf16": 14}  # per parameter: p, m, v read and written, g read, all in that dtype
Ways = dict[str, Callable[[], object]]  # name -> one step
HYPER = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def main(argv: list[str]) -> dict:
    """Arguments -> {"device", "threads", "torch", "copy_gb_s", "fp32": {...}, "bf16": {...}}.

    Per dtype and way: `ms` (median of interleaved rounds, cache flushed before each), `gb_s` (floor bytes over time), `percent_of_copy`;
    then the ratios of our time to torch's. Raises AssertionError where a result is further from fp64 than torch's.
    """
    parser = argparse.ArgumentParser(prog="bench adamw", description=__doc__)
    parser.add_argument("--elements", type=int, default=None, help="parameters in all (default: 10^7 on a CPU, 10^9 on a GPU)")
    parser.add_argument("--tensors", type=int, default=465, help="tensors they are spread over; torch's one group per unit makes as many")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default=None)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    elements = arguments.elements or (10**9 if device.type == "cuda" else 10**7)
    columns = 128
    shape = (max(1, elements // arguments.tensors // columns), columns)
    flush = torch.zeros(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    copy_rate = _copy_rate(device, arguments.rounds, flush)
    result: dict = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "elements": shape[0] * columns * arguments.tensors,
        "tensors": arguments.tensors,
        "copy_gb_s": copy_rate,
    }
    for name, dtype in DTYPES.items():
        _validate(dtype, device, arguments.backend)
        ways = _ways(shape, arguments.tensors, dtype, device, arguments.backend)
        times = _interleaved(ways, arguments.rounds, device, flush)
        result[name] = {}
        for way, seconds in times.items():
            rate = FLOOR_BYTES[name] * result["elements"] / seconds / 1e9
            result[name][way] = {"ms": 1e3 * seconds, "gb_s": rate, "percent_of_copy": 100 * rate / copy_rate}
        result[name]["ratios"] = {
            "ours/torch_fused": times["ours"] / times["torch_fused"],
            "ours/torch_foreach": times["ours"] / times["torch_foreach"],
            "ours_unit_lr/ours": times["ours_unit_lr"] / times["ours"],
            "ours_unit_lr/torch_group_per_unit": times["ours_unit_lr"] / times["torch_group_per_unit"],
        }
    return result


def _parameters(shape: tuple[int, int], count: int, dtype: torch.dtype, device: torch.device) -> list[Parameter]:
    generator = torch.Generator(device).manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator, device=device).to(dtype)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(shape, generator=generator, device=device).to(dtype)
    return params


def _multipliers(rows: int, device: torch.device) -> torch.Tensor:
    return torch.linspace(0.1, 1.9, rows, device=device)


def _ways(shape: tuple[int, int], count: int, dtype: torch.dtype, device: torch.device, backend: str | None) -> Ways:
    params = _parameters(shape, count, dtype, device)
    ours, rated = (AdamW(params, **HYPER, backend=backend) for _ in range(2))
    for p in params:
        rated.set_unit_lr(p, _multipliers(shape[0], device))
    groups = [{"params": [p], "lr": HYPER["lr"] * (0.1 + 1.8 * i / count)} for i, p in enumerate(params)]
    return {
        "ours": ours.step,
        "ours_unit_lr": rated.step,
        "torch_foreach": torch.optim.AdamW(params, **HYPER, foreach=True).step,
        "torch_fused": torch.optim.AdamW(params, **HYPER, fused=True).step,
        "torch_group_per_unit": torch.optim.AdamW(groups, **HYPER, fused=True).step,
    }


def _interleaved(ways: Ways, rounds: int, device: torch.device, flush: torch.Tensor) -> dict[str, float]:
    """Median seconds of each way; the first round, which allocates state, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            flush.add_(1)
            _wait(device)
            start = time.perf_counter()
            way()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values[1:]) for name, values in seconds.items()}


def _copy_rate(device: torch.device, rounds: int, flush: torch.Tensor) -> float:
    source = torch.zeros(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _interleaved({"copy": lambda: target.copy_(source)}, rounds, device, flush)["copy"]
    return 2 * source.numel() / seconds / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _validate(dtype: torch.dtype, device: torch.device, backend: str | None) -> None:
    """Ours, one rate and one per row, may be no further from fp64 than torch with a group for each row."""
    rows, steps = 13, 20
    multipliers = _multipliers(rows, torch.device("cpu"))
    for rates in (torch.ones(rows), multipliers):
        start = _parameters((rows, 7), 1, dtype, device)[0]

        def per_row(as_dtype: torch.dtype, start: Parameter = start, rates: torch.Tensor = rates) -> torch.Tensor:
            parts = [Parameter(row.detach().to(as_dtype).clone()) for row in start]
            groups = [{"params": [p], "lr": HYPER["lr"] * rate.item()} for p, rate in zip(parts, rates, strict=True)]
            optimizer = torch.optim.AdamW(groups, **HYPER, fused=as_dtype == dtype)
            for p, grad in zip(parts, start.grad, strict=True):
                p.grad = grad.to(as_dtype)
            for _ in range(steps):
                optimizer.step()
            return torch.stack([p.detach() for p in parts]).double()

        truth, theirs = per_row(torch.float64), per_row(dtype)
        optimizer = AdamW([start], **HYPER, backend=backend)
        if not bool((rates == 1).all()):
            optimizer.set_unit_lr(start, rates)
        for _ in range(steps):
            optimizer.step()
        error, allowed = (start.detach().double() - truth).abs().max().item(), (theirs - truth).abs().max().item()
        assert error <= 1.05 * allowed + 1e-7, f"ours is {error:.3g} from fp64, torch's {allowed:.3g} ({dtype})"
