"""kernels/adamw.py against the reference, bit for bit: interpreted, compiled offline for three architectures, run where there is a GPU.

Triton decides at import whether it interprets, so the interpreted launches run in one child process: this file as a script.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from adept_fast.ops.adamw import eight_bit
from adept_fast.ops.adamw.masters import split_master, split_master8
from adept_fast.ops.adamw.reference import AdamWOptions, Update, adamw_update_
from adept_fast.ops.adamw.table import Table

pytest.importorskip("triton")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.uint8}


class Part(NamedTuple):
    """A parameter: its size, its multipliers (length 0: none), how far into its allocation it lies, its values, its step, its rows."""

    numel: int
    length: int = 0
    inner: int = 1
    offset: int = 0
    values: str = "normal"
    step: int = 0
    dtypes: tuple[str, str, str] | None = None
    row: int = 64


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
        return "-".join([*self.dtypes, str(self.mode), *flags, f"{self.block}x{self.blocks}", f"{len(self.parts)}parts"])


FP32 = ("fp32", "fp32", "fp32")
PARTS = (
    Part(315),
    Part(67, 1, 1, offset=1, step=99_999),
    Part(255, 5, 51),
    Part(90, 9, 1, offset=3),
    Part(189, 7, 9, step=5),
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
# Rates by row, by column, by expert and by element; rows shorter than a block, of whole blocks, and with a short last block.
CODED = (
    Part(144, 9, 16, row=16),
    Part(297, 11, 27, row=27, step=99_999),
    Part(832, 64, 1, row=64, offset=16),
    Part(700, 100, 1, row=100, offset=3),
    Part(576, 576, 1, row=192, step=5),
    Part(1800, 3, 600, row=600),
    Part(448, values="special", row=64),
    Part(297, values="special", row=27, step=2**24 - 2),
    Part(200, 2, 100, row=100, values="frozen"),
    Part(320, values="tiny", row=64),
    Part(130, 2, 65, row=65, values="zeros"),
    Part(5000, 1, 1, row=5000),
)
MIXED = (Part(300, row=100), Part(67, dtypes=FP32), Part(0, row=16), Part(256), Part(70, dtypes=("bf16", "bf16", "bf16")))
SETUPS = [
    *((("fp32", g, m), mode) for g, m, mode in (("fp32", "fp32", None), ("bf16", "fp32", "copy"), ("fp16", "bf16", None))),
    *((("bf16", "bf16", "fp32"), mode) for mode in (None, "copy", "remainder", "kahan", "stochastic")),
    *((("bf16", "bf16", "bf16"), mode) for mode in (None, "remainder", "stochastic")),
    *((("bf16", "fp32", "fp16"), mode) for mode in ("copy", "kahan", "remainder8")),
    *((("fp16", "fp16", moments), mode) for moments in ("fp16", "fp32") for mode in (None, "copy", "kahan")),
]
CODED_SETUPS = [
    (("fp32", "fp32", "int8"), None),
    *((("bf16", "bf16", "int8"), mode) for mode in (None, "copy", "remainder", "kahan", "stochastic", "remainder8")),
    *((("fp16", "fp32", "int8"), mode) for mode in (None, "copy", "kahan")),
]
LAUNCHES = [
    *(Launch(*setup, PARTS, amsgrad=i % 2 == 0, maximize=i % 3 == 0, blocks=1 + i % 2, steps=2 + i % 2) for i, setup in enumerate(SETUPS)),
    Launch(("bf16", "bf16", "fp32"), "stochastic", WALKS, block=64, steps=1),
    Launch(FP32, None, WALKS[:4], block=64, blocks=1, steps=1),
    Launch(FP32, None, PARTS[:3], grad_scale=0.3, device_scalars=torch.float32),
    Launch(("bf16", "bf16", "bf16"), "kahan", PARTS[:3], grad_scale=2.0**-16, found_inf=0.0, maximize=True, device_scalars=torch.float64),
    Launch(("bf16", "bf16", "fp32"), "copy", PARTS[:3], amsgrad=True, found_inf=1.0),
    Launch(FP32, None, (Part(0), Part(5), Part(0), Part(130, 2, 65), Part(0))),
    Launch(("fp16", "fp16", "fp16"), "kahan", (Part(300), Part(0, dtypes=FP32), Part(90, 9, dtypes=FP32), Part(513), Part(5, dtypes=FP32))),
    Launch(FP32, None, (Part(6006, 2, 3003),), blocks=3, steps=1),
    Launch(("bf16", "bf16", "fp32"), "remainder", (Part(0),)),
    Launch(("bf16", "bf16", "fp32"), "remainder", ()),
    *(Launch(*setup, CODED[i % 2 : 11 : 2], maximize=i % 3 == 0, blocks=1 + i % 2, steps=2) for i, setup in enumerate(CODED_SETUPS)),
    Launch(("bf16", "bf16", "int8"), "remainder8", CODED[:4], steps=1, block=64),
    Launch(("bf16", "bf16", "int8"), "remainder8", (CODED[11], Part(64 * 25), Part(3456, 27, 128, row=128)), block=1024, grad_scale=0.3),
    Launch(("bf16", "bf16", "int8"), "kahan", MIXED, grad_scale=2.0**-16, found_inf=0.0, device_scalars=torch.float32),
    Launch(("bf16", "bf16", "int8"), "remainder8", MIXED, found_inf=1.0),
]


def placed(values: Tensor, part: Part) -> Tensor:
    """`values` within a longer allocation, whose other elements must stay."""
    buffer = torch.full((values.numel() + 2 * part.offset + 1,), 3, dtype=values.dtype)
    return buffer[part.offset : part.offset + values.numel()].copy_(values.flatten())


def updates_of(launch: Launch) -> Iterator[Update]:
    """On the CPU. Two groups take turns; the second group's averages are the fast ones."""
    options = (
        AdamWOptions(0.013, 0.9, 0.95, 1e-6, 0.3, launch.maximize, launch.mode),
        AdamWOptions(0.4, 0.25, 0.4, 1e-3, 0.07, launch.maximize, launch.mode),
    )
    generator = torch.Generator().manual_seed(len(str(launch)))
    for seed, part in enumerate(launch.parts):
        dtype, grad_dtype, moments_dtype = (DTYPES[name] for name in part.dtypes or launch.dtypes)
        weight, grad, m, v, vmax = (torch.randn(part.numel, generator=generator) for _ in range(5))
        if part.values == "special":
            for i, x in enumerate((float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-40, 3e38, 65519.0, 1 + 2**-8, 6e-8)):
                weight[i], grad[3 * i] = x, x
                vmax[5 * i] = x
            m[10:20], v[10:20], grad[40:50] = 1e-39, 3e-42, 1e-30
            grad.view(torch.int32)[60] = 0x7FFFFFFF  # a NaN that plain rounding carries into a number
        if part.values == "tiny":  # around the least scale, block by block
            m, grad = (x * torch.logspace(-26, -34, part.numel) for x in (m, grad))
            v = v * torch.logspace(-38, -50, part.numel)
        if part.values == "zeros":
            grad, m, v = (torch.zeros_like(x) for x in (grad, m, v))
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
        elif dtype != torch.float32 and launch.mode == "remainder8":
            param, master = split_master8(weight)
        elif dtype != torch.float32 and launch.mode == "copy":
            master = torch.where(torch.arange(part.numel) % 7 == 0, 0.5, weight)  # some are stale
        elif dtype != torch.float32 and launch.mode == "kahan":
            master = (weight - param.float()).to(dtype)
        moments, scales, row = [m.to(moments_dtype), v.abs().to(moments_dtype)], (), 0
        if moments_dtype == torch.uint8:
            m, average_scale, v, root_scale = eight_bit.encode(m, v.abs(), part.row)
            moments, scales, row = [m, v], (placed(average_scale, part), placed(root_scale, part)), part.row
        largest = vmax.abs().to(moments_dtype) if launch.amsgrad else None
        tensors = [x if x is None else placed(x, part) for x in (param, grad.to(grad_dtype), *moments, largest, master)]
        if row:
            tensors = [x if x is None else x.view(part.numel // row, row) for x in tensors]
        first_index = 2**32 - 100 if seed % 2 else 7
        yield Update(
            *tensors, torch.tensor(float(part.step)), multipliers, max(part.length, 1), part.inner, first_index, seed, options[seed % 2],
            *(scales or (None, None)), row,
        )  # fmt: skip


def copied(update: Update, device: str) -> Update:
    """With every allocation copied whole."""

    def copy(x: Tensor) -> Tensor:
        whole = x.new_empty(0).set_(x.untyped_storage()).to(device, copy=True)
        return whole.as_strided(x.shape, x.stride(), x.storage_offset())

    return update._replace(**{name: copy(x) for name, x in update._asdict().items() if isinstance(x, Tensor)})


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Of the whole allocations; NaN equals NaN."""
    a, b = (x.new_empty(0).set_(x.untyped_storage()).cpu() for x in (a, b))
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool(((a.view(integer) == b.view(integer)) | ((a != a) & (b != b))).all())


def differences(launch: Launch, device: str) -> list[str]:
    """What differs, after each step, between the kernels on `device` and the reference on the CPU."""
    from adept_fast.kernels import adamw as kernels

    expected = list(updates_of(launch))
    found = [copied(update, device) for update in expected]
    scalars = launch.device_scalars
    if scalars is not None:
        options = {id(u.options): u.options for u in found}
        on_device = {
            key: o._replace(**{name: torch.tensor(getattr(o, name), dtype=scalars, device=device) for name in ("lr", "beta1", "beta2")})
            for key, o in options.items()
        }
        as_read = {key: o._replace(lr=o.lr.item(), beta1=o.beta1.item(), beta2=o.beta2.item()) for key, o in on_device.items()}
        found = [u._replace(options=on_device[id(u.options)]) for u in found]
        expected = [u._replace(options=as_read[id(u.options)]) for u in expected]
    grad_scale = None if launch.grad_scale is None else torch.tensor(launch.grad_scale, dtype=torch.float64)
    found_inf = None if launch.found_inf is None else torch.tensor(launch.found_inf)
    start, names = [copied(u, "cpu") for u in expected], []
    for repeat in range(launch.steps):
        with patch.multiple(kernels, BLOCK=launch.block, BLOCKS=launch.blocks, TENSORS=4):
            kernels.adamw(Table(found), *(x if x is None else x.to(device) for x in (grad_scale, found_inf)))
        for ours, theirs, before, part in zip(found, expected, start, launch.parts, strict=True):
            if not launch.found_inf:
                adamw_update_(theirs, grad_scale)
            pairs = [(name, x, getattr(ours, name)) for name, x in theirs._asdict().items() if isinstance(x, Tensor)]
            if part.values == "frozen":
                pairs += [("frozen", x, y) for x, y in ((before.param, ours.param), (before.master, ours.master)) if x is not None]
            names += [f"step {repeat}, tensor {theirs.seed}: {name}" for name, x, y in pairs if not same_bits(x, y)]
            if part.values in ("normal", "special"):
                new = torch.randn(theirs.grad.shape, generator=torch.Generator().manual_seed(repeat)).to(theirs.grad.dtype)
                theirs.grad.copy_(new)
                ours.grad.copy_(new)
    return names


@pytest.fixture(scope="module")
def interpreted() -> list[list[str]]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, __file__], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(LAUNCHES)), ids=lambda index: str(LAUNCHES[index]))
def test_interpreted_kernel_agrees_bit_for_bit(interpreted: list[list[str]], index: int) -> None:
    assert interpreted[index] == []


def compiled(architecture: int, name: str, types: dict[str, str], constants: dict[str, Any]) -> tuple[str, str]:
    """(PTX, machine code) of a kernel whose tables are aligned."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from adept_fast.kernels import adamw as kernels

    kernel = getattr(kernels, name)
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types.get(name, "").startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    assembly = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"enable_fp_fusion": False}).asm
    return assembly["ptx"], assembly["sass"]


INEXACT = re.compile(r"\.ftz|\.approx|\.full|\bfma\.")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
WIDE = [
    (FP32, None, True),
    (("bf16", "bf16", "fp32"), "remainder", False),
    (("bf16", "bf16", "bf16"), "stochastic", True),
    (("bf16", "fp32", "fp32"), "copy", False),
    (("fp16", "fp16", "fp16"), "kahan", False),
    (("bf16", "bf16", "int8"), "remainder8", False),
    (("fp32", "fp32", "int8"), None, False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("dtypes", "mode", "amsgrad"), WIDE, ids=str)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiles_to_wide_accesses_without_spills(architecture: int, dtypes: tuple[str, str, str], mode: str | None, amsgrad: bool) -> None:
    """Each thread has 8 elements of each tensor, so accesses are 2 of 16 bytes in fp32, 1 in 16 bits, and 1 of 8 bytes in 8 bits, in the
    path for whole blocks."""
    from adept_fast.kernels import adamw as kernels

    constants = dict(zip(("PARAM", "GRAD", "MOMENTS"), (kernels.TRITON_DTYPES[DTYPES[name]] for name in dtypes), strict=True))
    constants |= {"MODE": kernels.MODES[mode], "AMSGRAD": amsgrad, "BLOCK": kernels.BLOCK, "BLOCKS": kernels.BLOCKS}
    types = {"rows": "*i64", "chunks": "*i64", "scalars": "*fp64", "first_program": "i32"}
    ptx, machine_code = compiled(architecture, "update_kernel", types, constants)
    param, grad, moment = (BYTES[name] // 2 for name in dtypes)
    master = {"copy": 2, "remainder": 1, "kahan": 1}.get(mode, 0)
    stores = param + (2 + amsgrad) * moment + master
    assert len(re.findall(r"\bLDG\.E\.128\b", machine_code)) == stores + grad
    assert len(re.findall(r"\bSTG\.E\.128\b", machine_code)) == stores
    bytewise = 2 * (dtypes[2] == "int8") + (mode == "remainder8")
    assert len(re.findall(r"\bld\.global\.v2\.b32\b", ptx)) == bytewise
    assert len(re.findall(r"\bSTG\.E\.64\b", machine_code)) == bytewise
    assert not INEXACT.search(ptx)
    assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx
    spills = re.search(r"\b(LDL|STL)\b", machine_code)
    if spills and version("triton").startswith("3.7."):
        pytest.skip("triton 3.7 keeps some registers of this kernel in memory, which costs time and changes no bit")
    assert not spills


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_preparation_compiles_to_ieee_arithmetic(architecture: int) -> None:
    types = {"rows": "*i64", "groups": "*i64", "scalars": "*fp64", "grad_scale": "*fp64", "found_inf": "*fp32", "tensors": "i32"}
    ptx, _ = compiled(architecture, "prepare_kernel", types, {"TENSORS": 64})
    assert not INEXACT.search(ptx)
    assert "div.rn.f64" in ptx and "sqrt.rn.f64" in ptx


def test_tables_are_kept_until_they_change() -> None:
    from adept_fast.kernels.adamw_tables import by_setup, chunks_on, groups_on, slots_of, tensors_on

    device, updates = torch.device("cpu"), list(updates_of(LAUNCHES[0]))

    def tables() -> list[Tensor]:
        table = Table(updates)
        rows, _ = by_setup(table)
        return [tensors_on(device, rows, updates), groups_on(device, table.options), chunks_on(device, slots_of(rows), 128)]

    first, again = tables(), tables()
    assert all(x is y for x, y in zip(first, again, strict=True))
    updates[3] = updates[3]._replace(grad=updates[3].grad.clone(), options=updates[3].options._replace(lr=0.7))
    changed = tables()
    assert [x is y for x, y in zip(first, changed, strict=True)] == [False, False, True]
    assert first[2].tolist() == [(part << 32) + i for i, p in enumerate(LAUNCHES[0].parts) for part in range(-(-p.numel // 128))]


@pytest.mark.gpu
@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_gpu_agrees_bit_for_bit(launch: Launch) -> None:
    assert differences(launch, "cuda") == []
    assert differences(launch._replace(block=1024, blocks=8), "cuda") == []


@pytest.mark.gpu
def test_gpu_graph_reads_lr_and_multipliers_at_each_replay() -> None:
    from adept_fast.kernels import adamw as kernels

    launch = Launch(("bf16", "bf16", "fp32"), "remainder", PARTS[2:5])
    expected = [copied(u, "cpu") for u in updates_of(launch)]
    found = [copied(u, "cuda") for u in expected]
    lr, rates = torch.tensor(0.1, device="cuda"), [0.1, 0.02, 0.3]
    found = [u._replace(options=u.options._replace(lr=lr)) for u in found]
    with torch.cuda.stream(torch.cuda.Stream()):
        kernels.adamw(Table(found), None, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.adamw(Table(found), None, None)
    for rate in rates[1:]:
        lr.fill_(rate)
        for update in found:
            update.multipliers.mul_(0.5)
        graph.replay()
    for theirs, ours in zip(expected, found, strict=True):
        for i, rate in enumerate(rates):
            if i:
                theirs.multipliers.mul_(0.5)
            adamw_update_(theirs._replace(options=theirs.options._replace(lr=torch.tensor(rate).item())))
        assert all(same_bits(x, getattr(ours, name)) for name, x in theirs._asdict().items() if isinstance(x, Tensor))


@pytest.mark.gpu
def test_gpu_indexes_beyond_32_bits() -> None:
    from adept_fast.kernels import adamw as kernels

    numel, tail, length, generator = 2**31 + 4099, 10_007, 3001, torch.Generator().manual_seed(0)
    param, grad, m, v = (torch.zeros(numel, dtype=torch.bfloat16, device="cuda") for _ in range(4))
    ends = [torch.randn(tail, generator=generator).bfloat16() for _ in range(4)]
    ends[3].abs_()
    for x, end in zip((param, grad, m, v), ends, strict=True):
        x[-tail:] = end.cuda()
    multipliers, step = torch.rand(length, generator=generator), torch.zeros((), device="cuda")
    options = AdamWOptions(0.013, 0.9, 0.95, 1e-6, 0.3, False, "stochastic")
    update = Update(param, grad, m, v, None, None, step, multipliers.cuda(), length, 1, 5, 3, options)
    kernels.adamw(Table([update]), None, None)
    each = multipliers[torch.arange(numel - tail, numel) % length]
    adamw_update_(Update(*ends, None, None, torch.zeros(()), each, tail, 1, 5 + numel - tail, 3, options))
    for x, end in zip((param, m, v), (ends[0], ends[2], ends[3]), strict=True):
        assert torch.equal(x[-tail:].cpu(), end)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([differences(launch, "cpu") for launch in LAUNCHES]))
