"""Losses of a linear head, and their gradient to its input: ours without logits against F.linear and F.cross_entropy on the same rows.

Validated against fp64 before anything is timed. Peak memory is what a call holds at most beside its arguments.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from adept_fast.ops.linear_cross_entropy.op import linear_cross_entropy
from adept_fast.ops.linear_cross_entropy.reference import Projection
from bench import parser
from bench.measure import cache_filler, device_name, interleaved, peak_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(argv: list[str]) -> dict:
    """Per dtype, way ("losses", "gradient") and implementation: ms (median of interleaved rounds), TFLOP/s, peak MiB; the ratios."""
    options = parser("linear_cross_entropy", __doc__)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="a torch device")
    options.add_argument("--rows", type=int, help="supervised tokens (default: 256 on a CPU, 8,192 on a GPU)")
    options.add_argument("--width", type=int, help="of a hidden state (default: 576 on a CPU, 4,096 on a GPU)")
    options.add_argument("--vocabulary", type=int, default=150_000, help="rows of the head")
    options.add_argument("--rounds", type=int, default=7, help="of all ways in turn, each timed once")
    options.add_argument("--backend", help="of ours: triton, cpu or torch (default: what fits the device)")
    options.add_argument("--dtypes", nargs="*", choices=DTYPES, help="default: fp32 on a CPU, bf16 on a GPU")
    given = options.parse_args(argv)
    device = torch.device(given.device)
    gpu = device.type == "cuda"
    rows, width = given.rows or (8192 if gpu else 256), given.width or (4096 if gpu else 576)
    flush = cache_filler(device) if gpu else None  # events then time the device
    result: dict = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "rows": rows,
        "width": width,
        "vocabulary": given.vocabulary,
    }
    for name in given.dtypes or (["bf16"] if gpu else ["fp32"]):
        hidden, weight, targets = _inputs(rows, width, given.vocabulary, DTYPES[name], device)
        _validate(hidden, weight, targets, given.backend)
        square = torch.randn(4096, 4096, device=device).to(DTYPES[name])
        peak_rate = 2 * 4096**3 / interleaved({"mm": partial(torch.mm, square, square)}, 5, device, flush)["mm"] / 1e12
        result[name] = {"matmul_tflop_s": peak_rate}
        for way, products in (("losses", 1), ("gradient", 2)):
            ways = {
                "ours": partial(_ours, hidden, weight, targets, given.backend, way),
                "torch": partial(_torch, hidden, weight, targets, way),
            }
            times = interleaved(ways, given.rounds, device, flush)
            found = {
                key: {
                    "ms": 1e3 * seconds,
                    "tflop_s": products * 2 * rows * width * given.vocabulary / seconds / 1e12,
                    "peak_mib": peak_memory(ways[key], device) / 2**20,
                }
                for key, seconds in times.items()
            }
            for numbers in found.values():
                numbers["percent_of_matmul"] = 100 * numbers["tflop_s"] / peak_rate
            found["ratios"] = {key: found["ours"][key] / found["torch"][key] for key in ("ms", "peak_mib")}
            result[name][way] = found
    return result


def _inputs(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, device=device)
    weight = torch.randn(vocabulary, width, generator=generator, device=device).mul_(3 * width**-0.5)
    return hidden.to(dtype), weight.to(dtype), torch.randint(vocabulary, (rows,), generator=generator, device=device)


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str | None, way: str) -> tuple[Tensor, ...]:
    h = hidden.detach().requires_grad_(way == "gradient")
    losses = linear_cross_entropy(h, Projection(weight), targets, backend=backend)
    return (losses, *torch.autograd.grad(losses.sum(), h)) if way == "gradient" else (losses,)


def _torch(hidden: Tensor, weight: Tensor, targets: Tensor, way: str) -> tuple[Tensor, ...]:
    h = hidden.detach().requires_grad_(way == "gradient")
    losses = functional.cross_entropy(functional.linear(h, weight), targets, reduction="none")
    return (losses, *torch.autograd.grad(losses.sum(), h)) if way == "gradient" else (losses,)


def _validate(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str | None) -> None:
    """On some rows: our root mean square distance from fp64 may not exceed torch's in the same dtype."""
    some, wanted = hidden[:32], targets[:32]
    truth = _torch(some.double(), weight.double(), wanted, "gradient")
    ours, theirs = _ours(some, weight, wanted, backend, "gradient"), _torch(some, weight, wanted, "gradient")
    for name, true, our, their in zip(("loss", "gradient"), truth, ours, theirs, strict=True):
        error, allowed = ((found.double() - true).square().mean().sqrt().item() for found in (our, their))
        tiny = 2.0**-23 * true.abs().max().item()
        assert error <= allowed + tiny, f"our {name} is {error:.3g} from fp64, torch's {allowed:.3g}"
