"""The C++ backend: the bits of the plain formula for every mix of options, on every instruction set, for any number of threads."""

from __future__ import annotations

import functools
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adept_fast.ops.adamw.descriptors import WORDS, gradient_rows
from adept_fast.optim import AdamW

native = pytest.importorskip("adept_fast._C", reason="the C++ extension was not built")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = {"fp32": (None,), "bf16": (None, "copy", "remainder", "remainder8", "kahan", "stochastic"), "fp16": (None, "copy", "kahan")}
SHAPES = [(65, 131), (7,), (3, 5, 40), (0,), (), (1, 70)]
OPTIONS = [{}, {"maximize": True, "betas": (0.0, 0.97)}, {"amsgrad": True}, {"max_grad_norm": 0.5}]
CASES = [(dtype, mode, state) for dtype in DTYPES for mode in MODES[dtype] for state in (None, "fp32", "bf16", "fp16", "int8")]


def bits(x: Tensor) -> Tensor:
    """Comparable bit patterns; every NaN counts as one."""
    if not x.is_floating_point():
        return x
    x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x.detach()).contiguous()
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def run(backend: str, dtype: str, mode: str | None, state: str | None, units: str, shapes: list, **options: object) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).to(DTYPES[dtype])) for shape in shapes]
    hyper = {"lr": 3e-3, "betas": (0.85, 0.97), "weight_decay": 0.13, "eps": 1e-7} | options
    optimizer = AdamW(params, **hyper, backend=backend, master_weights=mode, state_dtype=DTYPES.get(state, state))

    def rates(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.2)

    if units == "rows":
        several = rates(shapes[0][0])
        several[3:9] = several[3]  # neighbours that share a rate
        optimizer.set_unit_lr(params[0], several)
        optimizer.set_unit_lr(params[2], rates(3, 5))
    elif units == "columns":
        optimizer.set_unit_lr(params[0], rates(shapes[0][1]), 1)
        optimizer.set_unit_lr(params[2], rates(5), 1)
        optimizer.set_unit_lr(params[1], rates(7))
    elif units == "whole":
        optimizer.set_unit_lr(params[0], 0.3)
        optimizer.set_unit_lr(params[1], 0.0)
    for step in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if step == 2:
            params[0].grad.view(-1)[5] = float("nan")
        optimizer.step()
    return [bits(x) for p in params for x in (p, *optimizer.state[p].values())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("instructions", native.features()["instruction_sets"])
@pytest.mark.parametrize(("dtype", "mode", "state"), CASES)
def test_bits_of_the_plain_formula(dtype: str, mode: str, state: str, instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from adept_fast.ops.adamw import cpu

    chosen = {name: staticmethod(functools.partial(getattr(native, name), set=instructions)) for name in ("adamw", "sum_of_squares")}
    monkeypatch.setattr(cpu, "_C", type("Native", (), chosen))
    for units, options in itertools.product(("none", "rows", "columns", "whole"), OPTIONS):
        if state == "int8" and "amsgrad" in options:
            continue
        arguments = (dtype, mode, state, units, SHAPES)
        assert same(run("cpu", *arguments, **options), run("torch", *arguments, **options)), (units, options)


@pytest.mark.parametrize("state", [None, "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_chunks_change_no_bit(dtype: str, state: str | None) -> None:
    shapes = [(523, 271), (7,), (3, 5, 4001), (32768,), (32769,), (1,)]
    one = run("cpu", dtype, None, state, "columns", shapes)
    torch.set_num_threads(3)
    try:
        assert same(run("cpu", dtype, None, state, "columns", shapes), one)
    finally:
        torch.set_num_threads(1)
    assert same(run("torch", dtype, None, state, "columns", shapes), one)


@pytest.mark.slow
def test_a_forked_child_steps_with_threads() -> None:
    """A child has none of its parent's OpenMP threads: waiting for them would hang."""
    script = """
import os, torch
from adept_fast.optim import AdamW
torch.set_num_threads(2)
p = torch.nn.Parameter(torch.ones(200_000)); p.grad = torch.ones_like(p)
optimizer = AdamW([p], backend="cpu"); optimizer.step()
child = os.fork()
if child == 0:
    optimizer.step(); os._exit(0 if optimizer.state[p]["step"] == 2 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def test_writes_are_seen_by_autograd() -> None:
    p = Parameter(torch.ones(5))
    squared = (p * p).sum()
    p.grad = torch.ones(5)
    AdamW([p], backend="cpu").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()
    low = Parameter(torch.ones(5, dtype=torch.bfloat16))
    for backend in ("cpu", "torch"):
        optimizer = AdamW([low], amsgrad=True, master_weights="remainder", backend=backend)
        versions = []
        for _ in range(2):
            low.grad = torch.ones_like(low)
            optimizer.step()
            versions.append({key: tensor._version for key, tensor in {"param": low, **optimizer.state[low]}.items()})
        assert all(versions[1][key] > version for key, version in versions[0].items()) and len(versions[0]) == 6, backend


def test_rows_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="out of range"):
        native.adamw((-1).to_bytes(8, "little", signed=True) * WORDS, bytes(80), 1.0, 1)
    with pytest.raises(ValueError, match="multiple of 152"):
        native.adamw(bytes(100), bytes(80), 1.0, 1)
    with pytest.raises(ValueError, match="no sse9"):
        native.adamw(b"", b"", 1.0, 1, "sse9")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sum_of_squares_is_the_same_for_any_threads_and_instruction_set(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(n, generator=generator).mul(3e-3).to(dtype) for n in (100_003, 0, 1, 63, 65, 32_768)]
    rows = gradient_rows(grads)
    sets = native.features()["instruction_sets"]
    found = {native.sum_of_squares(rows, threads, name) for threads in (1, 3) for name in sets}
    assert len(found) == 1
    exact = math.fsum(x * x for grad in grads for x in grad.double().tolist())
    assert found.pop() == pytest.approx(exact, rel=1e-13)
    grads[0][70_000] = float("nan")
    assert math.isnan(native.sum_of_squares(rows, 2))
