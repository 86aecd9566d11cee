"""One AdamW step on the parameters of a 1B language model: ours against torch's, with and without rates per unit. Validated against fp64
before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from adept_fast.optim import AdamW
from bench import parser
from bench.measure import cache_filler, device_name, interleaved, interleaved_with_host

HYPER = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
Ways = dict[str, Callable[[], object]]  # name -> one step


class Setup(NamedTuple):
    """Dtypes of parameters and gradients, of moments, and the master; `floor` is the bytes a parameter that a step must move."""

    dtype: torch.dtype
    state_dtype: torch.dtype | None
    master_weights: str | None
    floor: int


SETUPS = {
    "fp32": Setup(torch.float32, None, None, 28),
    "bf16": Setup(torch.bfloat16, None, None, 14),
    "bf16 fp32-moments": Setup(torch.bfloat16, torch.float32, None, 22),
    "bf16 fp32-moments copy": Setup(torch.bfloat16, torch.float32, "copy", 30),
    "bf16 fp32-moments remainder": Setup(torch.bfloat16, torch.float32, "remainder", 26),
    "bf16 kahan": Setup(torch.bfloat16, None, "kahan", 18),
    "bf16 stochastic": Setup(torch.bfloat16, None, "stochastic", 14),
}


def main(argv: list[str]) -> dict:
    """Arguments -> {"device", "threads", "torch", "elements", "tensors", "units", "copy_gb_s", one entry a set-up}.

    Per set-up and way: `ms` (median of interleaved rounds, cache flushed before each), `host_ms` (until the call returns), `gb_s` (floor
    bytes over time), `percent_of_copy`; then the ratios of our times. torch has no counterpart for the set-ups that mix dtypes or keep a
    master: there only ours is timed.
    Raises AssertionError where a result is further from fp64 than torch's.
    """
    options = parser("adamw", __doc__)
    options.add_argument("--scale", type=int, help="divide the model's widths by this (default: 4 on a CPU, 1 on a GPU)")
    options.add_argument("--units", type=int, default=465, help="units with a rate each; torch's one group per unit makes as many groups")
    options.add_argument("--rounds", type=int, default=21, help="of all ways in turn, each timed once")
    options.add_argument("--setups", default=",".join(SETUPS), help="comma-separated")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="a torch device")
    options.add_argument("--backend", help="of ours: cuda, triton, cpu or torch (default: what fits the device)")
    given = options.parse_args(argv)
    device = torch.device(given.device)
    shapes = llama_1b(given.scale or (1 if device.type == "cuda" else 4))
    flush = cache_filler(device)
    copy_rate = _copy_rate(device, given.rounds, flush)
    elements = sum(rows * columns for rows, columns in shapes)
    result: dict = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "elements": elements,
        "tensors": len(shapes),
        "units": given.units,
        "copy_gb_s": copy_rate,
    }
    for name in given.setups.split(","):
        setup = SETUPS[name]
        _validate(setup, device, given.backend)
        found = interleaved_with_host(_ways(shapes, given.units, setup, device, given.backend), given.rounds, device, flush)
        times = {way: seconds for way, (seconds, _) in found.items()}
        result[name] = {}
        for way, (seconds, host) in found.items():
            rate = setup.floor * elements / seconds / 1e9
            result[name][way] = {"ms": 1e3 * seconds, "host_ms": 1e3 * host, "gb_s": rate, "percent_of_copy": 100 * rate / copy_rate}
        result[name]["ratios"] = {
            f"{ours}/{other}": times[ours] / times[other]
            for ours, other in (
                ("ours", "torch_fused"),
                ("ours", "torch_foreach"),
                ("units", "ours"),
                ("units", "torch_group_per_unit"),
                ("rows", "ours"),
                ("columns", "ours"),
                ("clipped", "torch_clip_and_fused"),
            )
            if other in times
        }
    return result


def llama_1b(scale: int) -> list[tuple[int, int]]:
    """Shapes of Llama 3.2 1B's parameters, widths and vocabulary divided by `scale`; a norm counts as one column."""
    hidden, inner, keys, vocabulary = 2048 // scale, 8192 // scale, 512 // scale, 128256 // scale
    projections = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden), (inner, hidden), (inner, hidden), (hidden, inner)]
    return [(vocabulary, hidden), *(projections + 2 * [(hidden, 1)]) * 16, (hidden, 1)]


def blocks(shapes: list[tuple[int, int]], units: int) -> list[list[int]]:
    """Rows of each unit: norms are one unit each, matrices are cut into nearly equal blocks of rows so that all units are `units`."""
    matrices = [i for i, (_, columns) in enumerate(shapes) if columns > 1]
    each, more = divmod(units - (len(shapes) - len(matrices)), len(matrices))
    parts = dict.fromkeys(range(len(shapes)), 1) | {i: each + (order < more) for order, i in enumerate(matrices)}
    return [[rows // parts[i] + (j < rows % parts[i]) for j in range(parts[i])] for i, (rows, _) in enumerate(shapes)]


def _parameters(shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> list[Parameter]:
    generator = torch.Generator(device).manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator, device=device).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, device=device).to(dtype)
    return params


def _multipliers(count: int, device: torch.device) -> Tensor:
    return torch.linspace(0.1, 1.9, count, device=device)


def _ways(shapes: list[tuple[int, int]], units: int, setup: Setup, device: torch.device, backend: str | None) -> Ways:
    params, cut = _parameters(shapes, setup.dtype, device), blocks(shapes, units)

    def ours(**options: object) -> AdamW:
        return AdamW(params, **HYPER, state_dtype=setup.state_dtype, master_weights=setup.master_weights, backend=backend, **options)

    plain, by_unit, by_row, by_column, clipped = ours(), ours(), ours(), ours(), ours(max_grad_norm=1e9)
    for other in (by_unit, by_row, by_column, clipped):
        # One state for all: a state each would not fit a GPU, and remainders would be cleared as after an edit, at each other's steps.
        other.state, other._collector.written = plain.state, plain._collector.written
    multipliers = _multipliers(units, device).split([len(rows) for rows in cut])
    for p, rows, values in zip(params, cut, multipliers, strict=True):
        by_unit.set_unit_lr(p, values.repeat_interleave(torch.tensor(rows, device=device)))
        by_row.set_unit_lr(p, _multipliers(p.shape[0], device))
        by_column.set_unit_lr(p, _multipliers(p.shape[1], device), dim=1)
    ways: Ways = {"ours": plain.step, "units": by_unit.step, "rows": by_row.step, "columns": by_column.step, "clipped": clipped.step}
    if setup.state_dtype is not None or setup.master_weights is not None:
        return ways
    groups = []
    for p, rows, values in zip(params, cut, multipliers, strict=True):
        for part, grad, value in zip(p.detach().split(rows), p.grad.split(rows), values.tolist(), strict=True):
            unit = Parameter(part)
            unit.grad = grad
            groups.append({"params": [unit], "lr": HYPER["lr"] * value})
    fused = torch.optim.AdamW(params, **HYPER, fused=True)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1e9)
        fused.step()

    return ways | {
        "torch_foreach": torch.optim.AdamW(params, **HYPER, foreach=True).step,
        "torch_fused": fused.step,
        "torch_group_per_unit": torch.optim.AdamW(groups, **HYPER, fused=True).step,
        "torch_clip_and_fused": clip_and_step,
    }


def _copy_rate(device: torch.device, rounds: int, flush: Tensor) -> float:
    source = torch.zeros(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, rounds, device, flush)["copy"]
    return 2 * source.numel() / seconds / 1e9


def _validate(setup: Setup, device: torch.device, backend: str | None) -> None:
    """Ours, with one rate and with one per row, may be no further from fp64 than torch with a group for each row in the parameter's dtype.
    Stochastic rounding, whose single errors are larger, must give the bits of the plain formula."""
    rows, steps = 13, 20
    for rates in (torch.ones(rows), _multipliers(rows, torch.device("cpu"))):
        start = _parameters([(rows, 7)], setup.dtype, device)[0]

        def per_row(as_dtype: torch.dtype, start: Parameter = start, rates: Tensor = rates) -> Tensor:
            parts = [Parameter(row.detach().to(as_dtype).clone()) for row in start]
            groups = [{"params": [p], "lr": HYPER["lr"] * rate.item()} for p, rate in zip(parts, rates, strict=True)]
            optimizer = torch.optim.AdamW(groups, **HYPER, fused=as_dtype == setup.dtype)
            for p, grad in zip(parts, start.grad, strict=True):
                p.grad = grad.to(as_dtype)
            for _ in range(steps):
                optimizer.step()
            return torch.stack([p.detach() for p in parts]).double()

        def run(backend: str | None, start: Parameter = start, rates: Tensor = rates) -> Tensor:
            param = Parameter(start.detach().clone())
            param.grad = start.grad
            optimizer = AdamW([param], **HYPER, state_dtype=setup.state_dtype, master_weights=setup.master_weights, backend=backend)
            if not bool((rates == 1).all()):
                optimizer.set_unit_lr(param, rates)
            for _ in range(steps):
                optimizer.step()
            return param.detach()

        found = run(backend)
        if setup.master_weights == "stochastic":
            assert torch.equal(found, run("torch")), f"ours differs from the plain formula ({setup})"
            continue
        truth, theirs = per_row(torch.float64), per_row(setup.dtype)
        error, allowed = (found.double() - truth).abs().max().item(), (theirs - truth).abs().max().item()
        assert error <= 1.05 * allowed + 1e-7, f"ours is {error:.3g} from fp64, torch's {allowed:.3g} ({setup})"
