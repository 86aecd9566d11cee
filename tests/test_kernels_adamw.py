"""kernels/adamw.py against the reference, bit for bit: interpreted, compiled offline for three architectures, run where there is a GPU.

Triton decides at import whether it interprets, so the interpreted launches run in one child process: this file as a script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from adept_fast.reference import AdamWOptions, Update, adamw_update_, split_master

pytest.importorskip("triton")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MASTERS = {"copy": torch.float32, "remainder": torch.int16, "kahan": None}


class Part(NamedTuple):
    """A parameter: its size, its multipliers (length 0: none), how far it lies off its allocation, what its values hold, its step."""

    numel: int
    length: int = 0
    inner: int = 1
    offset: int = 0
    values: str = "normal"
    step: int = 0


class Launch(NamedTuple):
    dtypes: tuple[str, str, str]  # parameter, gradient, moments
    mode: str | None
    parts: tuple[Part, ...]
    amsgrad: bool = False
    maximize: bool = False
    block: int = 256
    blocks: int = 2
    steps: int = 3
    grad_scale: float | None = None
    found_inf: float | None = None
    device_scalars: torch.dtype | None = None

    def __str__(self) -> str:
        flags = [name for name in ("amsgrad", "maximize", "grad_scale", "found_inf", "device_scalars") if getattr(self, name)]
        numels = ",".join(str(part.numel) for part in self.parts)
        return "-".join([*self.dtypes, str(self.mode), *flags, f"{self.block}x{self.blocks}", numels])


PARTS = (
    Part(315),
    Part(67, 1, 1, offset=1, step=99_999),
    Part(255, 5, 51),
    Part(90, 9, 1, offset=3),
    Part(504, 7, 9, step=5),
    Part(130, 2, 65, values="frozen"),
    Part(67, values="special", step=2**24 - 2),
)
# Units shorter than a block, longer, exactly as long, and units that wrap within a block.
WALKS = tuple(
    Part(periods * length * inner, length, inner)
    for periods, length, inner in (
        *((1, 3, 101), (2, 131, 1), (1, 65, 2), (3, 64, 1), (2, 2, 64)),
        *((40, 2, 3), (1, 2, 65), (3, 1, 50), (2, 63, 1), (1, 129, 1), (9, 3, 5)),
    )
)
SETUPS = [
    *((("fp32", g, m), mode) for g, m, mode in (("fp32", "fp32", None), ("bf16", "fp32", "copy"), ("fp16", "bf16", None))),
    *((("bf16", "bf16", "fp32"), mode) for mode in (None, "copy", "remainder", "kahan", "stochastic")),
    *((("bf16", "bf16", "bf16"), mode) for mode in (None, "remainder", "stochastic")),
    *((("bf16", "fp32", "fp16"), mode) for mode in ("copy", "kahan")),
    *((("fp16", "fp16", moments), mode) for moments in ("fp16", "fp32") for mode in (None, "copy", "kahan")),
]
LAUNCHES = [
    *(Launch(*setup, PARTS, amsgrad=i % 2 == 0, maximize=i % 3 == 0) for i, setup in enumerate(SETUPS)),
    Launch(("bf16", "bf16", "fp32"), "stochastic", WALKS, block=64, steps=1),
    Launch(("fp32", "fp32", "fp32"), None, WALKS[:4], block=64, blocks=1, steps=1),
    Launch(("fp32", "fp32", "fp32"), None, PARTS[:3], grad_scale=0.3, device_scalars=torch.float32),
    Launch(("bf16", "bf16", "bf16"), "kahan", PARTS[:3], grad_scale=2.0**-16, found_inf=0.0, maximize=True, device_scalars=torch.float64),
    Launch(("bf16", "bf16", "fp32"), "copy", PARTS[:3], amsgrad=True, found_inf=1.0),
    Launch(("fp32", "fp32", "fp32"), None, (Part(0), Part(5), Part(0), Part(130, 2, 65), Part(0))),
    Launch(("bf16", "bf16", "fp32"), "remainder", (Part(0),)),
    Launch(("bf16", "bf16", "fp32"), "remainder", ()),
]


def placed(values: Tensor, part: Part) -> Tensor:
    """`values` within a longer allocation, whose other elements must stay."""
    buffer = torch.full((part.numel + 2 * part.offset + 1,), 3, dtype=values.dtype)
    return buffer[part.offset : part.offset + part.numel].copy_(values)


def updates_of(launch: Launch) -> Iterator[Update]:
    """On the CPU. Two groups take turns; the second group's averages are the fast ones."""
    options = (
        AdamWOptions(0.013, 0.9, 0.95, 1e-6, 0.3, launch.maximize, launch.mode),
        AdamWOptions(0.4, 0.25, 0.4, 1e-3, 0.07, launch.maximize, launch.mode),
    )
    dtype, grad_dtype, moments_dtype = (DTYPES[name] for name in launch.dtypes)
    generator = torch.Generator().manual_seed(len(str(launch)))
    for seed, part in enumerate(launch.parts):
        weight, grad, m, v, vmax = (torch.randn(part.numel, generator=generator) for _ in range(5))
        if part.values == "special":
            for i, x in enumerate((float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-40, 3e38, 65519.0, 1 + 2**-8, 6e-8)):
                weight[i], grad[3 * i] = x, x
                vmax[5 * i] = x
            m[10:20], v[10:20], grad[40:50] = 1e-39, 3e-42, 1e-30
        multipliers = None
        if part.length:
            multipliers = torch.rand(part.length, generator=generator) * 3
            multipliers[::4] = 0.0 if part.length > 1 else 0.7
        if part.values == "frozen":
            grad[::5] = float("nan")
            multipliers.zero_()
        param, master = weight.to(dtype), None
        if dtype != torch.float32 and launch.mode == "remainder":
            param, master = split_master(weight)
        elif dtype != torch.float32 and launch.mode == "copy":
            master = torch.where(torch.arange(part.numel) % 7 == 0, 0.5, weight)  # some are stale
        elif dtype != torch.float32 and launch.mode == "kahan":
            master = (weight - param.float()).to(dtype)
        stored = (param, grad.to(grad_dtype), m.to(moments_dtype), v.abs().to(moments_dtype))
        largest = vmax.abs().to(moments_dtype) if launch.amsgrad else None
        tensors = [x if x is None else placed(x, part) for x in (*stored, largest, master)]
        step = torch.tensor(float(part.step))
        first_index = 2**32 - 100 if seed % 2 else 7
        yield Update(*tensors, step, multipliers, max(part.length, 1), part.inner, first_index, seed, options[seed % 2])


def copied(update: Update, device: str) -> Update:
    """With every allocation copied whole."""

    def copy(x: Tensor) -> Tensor:
        whole = x.new_empty(0).set_(x.untyped_storage()).to(device, copy=True)
        return whole.as_strided(x.shape, x.stride(), x.storage_offset())

    return update._replace(**{name: copy(x) for name, x in update._asdict().items() if isinstance(x, Tensor)})


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Of the whole allocations; NaN equals NaN."""
    a, b = (x.new_empty(0).set_(x.untyped_storage()).cpu() for x in (a, b))
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool(((a.view(integer) == b.view(integer)) | ((a != a) & (b != b))).all())


def differences(launch: Launch, device: str) -> list[str]:
    """What differs, after each step, between the kernels on `device` and the reference on the CPU."""
    from adept_fast.kernels import adamw as kernels

    kernels.BLOCK, kernels.BLOCKS, kernels.TENSORS = launch.block, launch.blocks, 4
    expected = list(updates_of(launch))
    found = [copied(update, device) for update in expected]
    scalars = launch.device_scalars
    if scalars is not None:
        options = {id(u.options): u.options for u in found}
        on_device = {
            key: o._replace(**{name: torch.tensor(getattr(o, name), dtype=scalars, device=device) for name in ("lr", "beta1", "beta2")})
            for key, o in options.items()
        }
        found = [u._replace(options=on_device[id(u.options)]) for u in found]
        as_read = {key: o._replace(lr=o.lr.item(), beta1=o.beta1.item(), beta2=o.beta2.item()) for key, o in on_device.items()}
        expected = [u._replace(options=as_read[id(u.options)]) for u in expected]
    grad_scale = None if launch.grad_scale is None else torch.tensor(launch.grad_scale, dtype=torch.float64)
    found_inf = None if launch.found_inf is None else torch.tensor(launch.found_inf)
    frozen = [copied(u, "cpu") for u, part in zip(expected, launch.parts, strict=True) if part.values == "frozen"]
    names = []
    for repeat in range(launch.steps):
        kernels.adamw(found, *(x if x is None else x.to(device) for x in (grad_scale, found_inf)))
        for ours, theirs in zip(found, expected, strict=True):
            if not launch.found_inf:
                adamw_update_(theirs, grad_scale)
            for name, x in theirs._asdict().items():
                if isinstance(x, Tensor) and not same_bits(x, getattr(ours, name)):
                    names.append(f"step {repeat}, tensor {theirs.seed}: {name}")
            new = torch.randn(theirs.grad.shape, generator=torch.Generator().manual_seed(repeat)).to(theirs.grad.dtype)
            if theirs.seed not in {before.seed for before in frozen}:
                theirs.grad.copy_(new)
                ours.grad.copy_(new)
    for before in frozen:
        kept = found[before.seed]
        for name in ("param", "master"):
            if getattr(before, name) is not None and not torch.equal(getattr(before, name), getattr(kept, name).cpu()):
                names.append(f"frozen {name}")
    return names


@pytest.fixture(scope="module")
def interpreted() -> list[list[str]]:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, __file__], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("index", range(len(LAUNCHES)), ids=lambda index: str(LAUNCHES[index]))
def test_interpreted_kernel_agrees_bit_for_bit(interpreted: list[list[str]], index: int) -> None:
    assert interpreted[index] == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([differences(launch, "cpu") for launch in LAUNCHES]))
