"""What taking sums of gradients adds to a backward, and the memory that gradients take: interleaved in one process.

    kept       loss.backward(), the gradients of all layers freed behind it
    freed      the same, each gradient freed by a hook as soon as it is there: what a backward costs that keeps no gradient
    fisher     hooks with sum g^2 for rows and columns of every matrix (GradientSums without products)
    saliency   hooks with sum g^2, sum |theta g| and sum theta g of both
    corpus     hooks with sum g^2, and the running fp32 sum of gradients that |theta g| of a corpus needs

All parameters of the decoder layers require a gradient in every way, and the forward is not timed. Freed memory is kept mapped in all of
them, as a pass over a corpus has it: without that, page faults of gradients make a plain backward slower and more so than the hooks.
Overheads are medians over rounds of the ratio to `kept` and to `freed` in the same round. peak_mib: what tensors take at most during a
backward, beyond what they took before, by its own record; resident_mib: the same by the process's high-water mark, which adds what
allocator and libraries hold.
sums: one matrix's sums by row and by column alone, against a copy of as many bytes in the same rounds, the cache flushed before each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from adept_fast.data.items import Item
from adept_fast.models.decoder_layers import decoder_layers
from adept_fast.models.gradient_scope import only_these_require_grad
from adept_fast.models.losses import batch_loss
from adept_fast.ops.gradient_sums.op import GradientSums, gradient_sums
from adept_fast.runtime.malloc import freed_memory_kept
from bench import parser
from bench.measure import allocated, cache_filler, device_name, interleaved, now, peak_memory
from bench.models import add_model, load_model, model_name

WAYS = ("kept", "freed", "fisher", "saliency", "corpus")


def main(argv: list[str]) -> dict[str, Any]:
    """Per length of sequence and way: ms of backward (median), overheads in per cent of `freed` and `kept`, peak MiB."""
    options = parser("gradient_sums", __doc__)
    add_model(options)
    options.add_argument("--tokens", type=int, nargs="*", default=[512, 64], help="lengths of the sequence")
    options.add_argument("--rounds", type=int, default=7, help="of all ways in turn, each timed once")
    given = options.parse_args(argv)
    model = load_model(given).to("cuda" if torch.cuda.is_available() else "cpu")
    parameters = {name: p for name, p in model.named_parameters() if any(p is q for q in decoder_layers(model).parameters())}
    device = next(iter(parameters.values())).device
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "model": model_name(given),
        "parameters": sum(p.numel() for p in parameters.values()),
        "largest_parameter_mib": max(p.numel() * p.element_size() for p in parameters.values()) / 2**20,
        "sums": {name: _sums(dtype, given.rounds, device) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))},
        **{f"{tokens}_tokens": _measured(model, parameters, tokens, given.rounds, device) for tokens in given.tokens},
    }


def _sums(dtype: torch.dtype, rounds: int, device: torch.device) -> dict[str, float]:
    """GB/s of reading weight and gradient once, and per cent of what a copy reads and writes: medians of interleaved rounds."""
    side = 8192 if device.type == "cuda" else 2048
    weight, gradient = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    target = torch.empty_like(weight)
    ways = {
        "copy": lambda: target.copy_(weight),
        "rows": lambda: gradient_sums(weight, gradient, 0),
        "columns": lambda: gradient_sums(weight, gradient, 1),
    }
    seconds = interleaved(ways, rounds, device, cache_filler(device))
    rates = {name: 2 * weight.nbytes / each / 1e9 for name, each in seconds.items()}
    shares = {f"{name}_percent_of_copy": 100 * rates[name] / rates["copy"] for name in ("rows", "columns")}
    return {**{f"{name}_gb_s": rate for name, rate in rates.items()}, **shares}


def _measured(model: nn.Module, parameters: dict[str, nn.Parameter], tokens: int, rounds: int, device: torch.device) -> dict[str, Any]:
    ids = tuple(torch.randint(3, 1000, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist())
    item = Item(ids, ids)
    hooks = {way: _hooks(parameters, way) for way in WAYS}
    _validate(model, parameters, item)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with freed_memory_kept():
        for _ in range(rounds + 1):
            for way in WAYS:
                seconds[way].append(_backward(model, parameters, item, way, hooks[way]))
    seconds = {way: values[1:] for way, values in seconds.items()}

    def overhead(way: str, over: str) -> float:
        return round(100 * (median(a / b for a, b in zip(seconds[way], seconds[over], strict=True)) - 1), 2)

    result: dict[str, Any] = {}
    for way in WAYS:
        found: dict[str, Any] = {"ms": round(1e3 * median(seconds[way]), 1)}
        if hooks[way] is not None:
            found |= {f"percent_over_{plain}": overhead(way, plain) for plain in WAYS if hooks[plain] is None}
        allocated, resident = _peaks(model, parameters, item, way, hooks[way], device)
        found |= {"peak_mib": round(allocated / 2**20, 2), "resident_mib": round(resident / 2**20, 2)}
        result[way] = found
    return result


def _hooks(parameters: dict[str, nn.Parameter], way: str) -> GradientSums | None:
    """What is entered for the time of a backward, the same one for all rounds: a running sum is touched before it is timed."""
    if way in ("kept", "freed"):
        return None
    dims = {name: range(parameter.ndim) for name, parameter in parameters.items()}
    return GradientSums(parameters, dims, products=way == "saliency", running=way == "corpus")


@contextmanager
def _hooked(parameters: dict[str, nn.Parameter], way: str, sums: GradientSums | None) -> Iterator[Callable[[Tensor], None]]:
    """loss -> None: the backward of a way, its gradients freed."""

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    with ExitStack() as stack:
        for parameter in parameters.values() if way == "freed" else ():
            stack.callback(parameter.register_post_accumulate_grad_hook(free).remove)

        def kept(loss: Tensor) -> None:
            loss.backward()
            for parameter in parameters.values():
                parameter.grad = None

        yield stack.enter_context(sums).backward if sums else Tensor.backward if way == "freed" else kept


def _backward(model: nn.Module, parameters: dict[str, nn.Parameter], item: Item, way: str, sums: GradientSums | None) -> float:
    """Seconds of one backward; what hooks prepare and read is not timed: it is done once a corpus."""
    with only_these_require_grad(model, parameters.values()), _hooked(parameters, way, sums) as backward:
        loss = batch_loss(model, [item])
        start = now(loss.device)
        backward(loss)
        return now(loss.device) - start


def _peaks(
    model: nn.Module, parameters: dict[str, nn.Parameter], item: Item, way: str, sums: GradientSums | None, device: torch.device
) -> tuple[int, int]:
    """Bytes of a backward beyond what stood before it: (torch's own allocations at most, resident memory at most)."""
    peaks = []
    for peak in (peak_memory if device.type == "cuda" else lambda backward, _: allocated(backward), peak_memory):
        with only_these_require_grad(model, parameters.values()), _hooked(parameters, way, sums) as backward:
            loss = batch_loss(model, [item])
            peaks.append(peak(lambda loss=loss, backward=backward: backward(loss), device))
    return peaks[0], peaks[1]


def _validate(model: nn.Module, parameters: dict[str, nn.Parameter], item: Item) -> None:
    """The hooks' sums over rows of g^2, |theta g| and theta g against those of kept gradients, in fp64."""
    with only_these_require_grad(model, parameters.values()):
        truths = {}
        for (name, parameter), gradient in zip(
            parameters.items(), torch.autograd.grad(batch_loss(model, [item]), list(parameters.values())), strict=True
        ):
            g, product = gradient.double(), parameter.detach().double() * gradient.double()
            truths[name] = torch.stack([x.view(len(x), -1).sum(1) for x in (g.square(), product.abs(), product)])
        with GradientSums(parameters, {name: [0] for name in parameters}, products=True, running=False) as sums:
            sums.backward(batch_loss(model, [item]))
            found = sums.read(item.supervised)
    for (name, _), (values, _) in found.items():
        scale = truths[name][[0, 1, 1]]
        assert bool(((values - truths[name].cpu()).abs() <= 1e-5 * scale.cpu()).all()), f"{name}: sums differ from those of its gradient"
