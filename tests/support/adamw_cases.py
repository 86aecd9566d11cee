"""Updates of every kind, and the check of a backend against the reference's bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adept_fast.ops.adamw.reference import AdamWOptions, Update, adamw_update_

CHUNK = 8192
OPTIONS = AdamWOptions(3e-3, 0.85, 0.97, 1e-7, 0.13, False, None)
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
MODES = {
    torch.float32: (None,),
    torch.bfloat16: (None, "copy", "remainder", "kahan", "stochastic"),
    torch.float16: (None, "copy", "kahan"),
}
UNITS = {  # multipliers or not, length, inner, periods
    "none": (False, 1, 1, 1003),
    "whole": (True, 1, 1, 1003),
    "rows": (True, 13, 77, 1),
    "wide rows": (True, 3, 1024, 1),
    "columns": (True, 77, 1, 13),
    "middle": (True, 5, 7, 31),
    "beyond a chunk": (True, 3, CHUNK + 809, 1),
    "more than a chunk": (True, CHUNK + 809, 1, 2),
}


class Case(NamedTuple):
    formats: tuple[torch.dtype, torch.dtype, torch.dtype]  # param, grad, moments
    mode: str | None
    amsgrad: bool
    units: str
    shift: int  # param and every second stream begin this many elements after an aligned address


def cases(dtype: torch.dtype, units: Iterable[str]) -> list[Case]:
    formats = [(dtype, *rest) for rest in itertools.product(FORMATS, FORMATS)]
    found = itertools.product(formats, MODES[dtype], (False, True), units)
    return [Case(*fields, shift=number % 3) for number, fields in enumerate(found)]


def make(case: Case, seed: int, options: AdamWOptions = OPTIONS) -> Update:
    """On the CPU. Infinities, NaN, zeros and denormals among the values; unit 1 frozen, with NaN gradients."""
    generator = torch.Generator().manual_seed(seed)
    has_multipliers, length, inner, periods = UNITS[case.units]
    numel = length * inner * periods

    def draw(dtype: torch.dtype, shift: int, scale: float) -> Tensor:
        values = scale * torch.randn(numel, generator=generator)
        return torch.empty(numel + shift, dtype=dtype)[shift:].copy_(values)

    dtype, grad_dtype, moments = case.formats
    param, grad = draw(dtype, case.shift, 0.5), draw(grad_dtype, 0, 0.1)
    param[-5:] = torch.tensor([float("inf"), -0.0, 1e-40, float("nan"), 3e4], dtype=dtype)
    grad[-9:-5] = torch.tensor([float("inf"), 0.0, 1e-6, float("nan")], dtype=grad_dtype)
    m, v, vmax = draw(moments, case.shift, 0.05), draw(moments, 0, 0.01).abs_(), draw(moments, case.shift, 0.01).abs_()
    multipliers = None
    if has_multipliers:
        multipliers = 2 * torch.rand(length, generator=generator)
        if length > 1:
            multipliers[1] = 0.0
            grad.view(periods, length, inner)[:, 1] = float("nan")
    master = None
    if case.mode == "copy":
        master = (param.float() + 1e-4 * torch.randn(numel, generator=generator)).contiguous()
    elif case.mode == "remainder":
        master = torch.randint(-(2**15), 2**15, (numel,), generator=generator).to(torch.int16)
    elif case.mode == "kahan":
        master = draw(dtype, 1, 1e-4)
    return Update(
        param, grad, m, v, vmax if case.amsgrad else None, master, torch.tensor(float(seed % 40)), multipliers, length, inner,
        2**32 - 300, seed, options._replace(master_weights=case.mode),
    )  # fmt: skip


def placed(update: Update, device: str) -> Update:
    """A copy on `device`, with every tensor as far from an aligned address as it was."""

    def copy(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        shift = x.storage_offset()
        return torch.empty(x.numel() + shift, dtype=x.dtype, device=device)[shift:].view(x.shape).copy_(x)

    options = update.options._replace(**{name: copy(getattr(update.options, name)) for name in ("lr", "beta1", "beta2")})
    return update._replace(**{name: copy(x) for name, x in update._asdict().items() if isinstance(x, Tensor)}, options=options)


WRITTEN = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "step", "exp_avg_scale", "exp_avg_sq_scale")


def written(update: Update) -> list[Tensor]:
    return [x for name in WRITTEN if (x := getattr(update, name)) is not None]


def bits(x: Tensor) -> Tensor:
    return x.cpu().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.itemsize])


def assert_same_bits(ours: Sequence[Update], reference: Sequence[Update], names: Sequence[object]) -> None:
    """NaN equals NaN, whatever its payload."""
    for a, b, name in zip(ours, reference, names, strict=True):
        for place, (x, y) in enumerate(zip(written(a), written(b), strict=True)):
            same = bits(x) == bits(y)
            if x.is_floating_point():
                same |= x.isnan().cpu() & y.isnan()
            assert same.all(), f"{name}: tensor {place} differs at {(~same).nonzero().flatten()[:8].tolist()}"


def compare(chosen: Sequence[Case], options: AdamWOptions, run: Callable[[list[Update], float], None], device: str, scale: float) -> None:
    """Two steps of `run` on `device` against the reference on the CPU."""
    reference = [make(case, seed, options) for seed, case in enumerate(chosen)]
    ours = [placed(update, device) for update in reference]
    before = [placed(update, "cpu") for update in reference]
    for _ in range(2):
        run(ours, scale)
        for update in reference:
            adamw_update_(update, torch.tensor(scale, dtype=torch.float64))
    assert_same_bits(ours, reference, chosen)
    for update, old in zip(ours, before, strict=True):
        assert not torch.equal(bits(update.param), bits(old.param))
        for new, kept in ((update.param, old.param), (update.master, old.master)):
            if update.length > 1 and new is not None:
                shape = (-1, update.length, update.inner)
                assert torch.equal(bits(new).view(shape)[:, 1], bits(kept).view(shape)[:, 1]), "a frozen unit was stored to"
