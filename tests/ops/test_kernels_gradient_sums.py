"""kernels/gradient_sums.py against the formula in fp64: interpreted, compiled offline for three architectures, run where there is a GPU.

Triton decides at import whether it interprets, so the interpreted cases run in one child process: this file as a script.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

Sums = tuple[Tensor, Tensor, Tensor]
LAYOUTS = ("contiguous", "transposed", "strided", "expanded", "mixed")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# shape, dim, layout of the gradient (and, but for "mixed", of the parameter), dtypes of parameter and gradient, TILE, PROGRAMS
CASES: list[tuple[tuple[int, ...], int, str, str, str, int, int]] = [
    *(((7, 1203), dim, layout, "fp32", "fp32", 512, programs) for dim in (0, 1) for layout in LAYOUTS for programs in (1, 64)),
    *((shape, dim, "transposed", "fp32", "fp32", 512, 4) for shape in ((1, 67), (67, 1)) for dim in (0, 1)),
    *(((17, 70), dim, "contiguous", p, g, 512, 4) for dim in (0, 1) for p in ("fp32", "bf16", "fp16") for g in ("fp32", "bf16", "fp16")),
    *(((17, 70), dim, "contiguous", "fp64", "bf16", 512, 4) for dim in (0, 1)),
    *(((3, 5003), dim, "contiguous", "bf16", "fp32", 1024, 1024) for dim in (0, 1)),
    *(((3, 5, 7), dim, "contiguous", "bf16", "bf16", 512, 4) for dim in (0, 1, 2, -1)),
    *(((n,), 0, layout, "bf16", "fp32", 512, 4) for n in (1, 67, 1027) for layout in ("contiguous", "strided")),
    *((shape, dim, "contiguous", "fp32", "fp32", 512, 4) for shape in ((0, 5), (5, 0)) for dim in (0, 1)),
]


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values (but for "expanded": its first row) at other strides."""
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout == "strided":
        return torch.stack((values, values + 1), -1)[..., 0]
    if layout == "expanded":
        return values[:1].expand_as(values)
    return values.contiguous()


def inputs(shape: tuple[int, ...], layout: str, param_dtype: str, grad_dtype: str, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    param, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale for scale in (0.3, 7.0))
    param, grad = param.to(device, DTYPES[param_dtype]), grad.to(device, DTYPES[grad_dtype])
    if layout == "mixed":
        return param, laid_out(grad, "transposed")
    return laid_out(param, layout), laid_out(grad, layout)


def excess(sums: Sums, param: Tensor, grad: Tensor, dim: int) -> float:
    """Largest error over what fp32 sums in a tree may lose, 16 roundings of the sum of absolute terms; inf for a wrong shape or dtype."""
    theta, g = (x.double().movedim(dim, 0).reshape(param.shape[dim], -1 if param.numel() else 0) for x in (param, grad))
    worst = 0.0
    for found, terms in zip(sums, (g * g, (theta * g).abs(), theta * g), strict=True):
        if found.shape != (param.shape[dim],) or found.dtype != torch.float32:
            return float("inf")
        error = (found.double() - terms.sum(1)).abs()
        worst = max([worst, *(error / (16 * 2**-24 * terms.abs().sum(1)).clamp_min(1e-30)).tolist()])
    return worst


@pytest.fixture(scope="module")
def interpreted() -> list[dict[str, float | bool]]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "ADEPT_FAST_BACKEND": "triton", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, __file__], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: "-".join(map(str, CASES[index])).replace(" ", ""))
def test_interpreted_kernel_gives_the_sums(interpreted: list[dict[str, float | bool]], index: int) -> None:
    assert interpreted[index]["excess"] <= 1.0
    assert interpreted[index]["repeats"]


@pytest.mark.slow
def test_interpreted_kernel_adds_vectors_of_all_kinds_at_once(interpreted: list[dict[str, float | bool]]) -> None:
    assert interpreted[len(CASES)] == {"vectors": True}


@pytest.mark.slow
def test_hooks_hand_all_vectors_of_a_backward_to_one_interpreted_launch(interpreted: list[dict[str, float | bool]]) -> None:
    assert_wired(interpreted[len(CASES) + 1 :])


POINTERS = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
VECTORS = [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")]


@pytest.mark.slow
@pytest.mark.parametrize(("param_dtype", "grad_dtype"), VECTORS)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_kernel_for_vectors_compiles_without_spills(architecture: int, param_dtype: str, grad_dtype: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from adept_fast.kernels import gradient_sums_vectors
    from adept_fast.kernels.number_formats import TRITON_DTYPES

    types = (TRITON_DTYPES[DTYPES[name]] for name in (param_dtype, grad_dtype))
    constants = dict(zip(("PARAM", "GRAD"), types, strict=True)) | {"BLOCK": gradient_sums_vectors.BLOCK}
    kernel = gradient_sums_vectors.add_terms_kernel
    signature = {name: "constexpr" if name in constants else "*i64" for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs={(0,): [["tt.divisibility", 16]]})
    machine_code = triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["sass"]
    assert not re.search(r"\b(LDL|STL)\b", machine_code)
    assert len(re.findall(r"\bLDG\b", machine_code)) >= 6 and not re.search(r"\b(ATOM|ATOMG|RED)\b", machine_code)


@pytest.mark.slow
@pytest.mark.parametrize(("param_dtype", "grad_dtype"), [*VECTORS, ("fp32", "bf16"), ("fp16", "fp32")])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiles_to_wide_loads_without_spills(architecture: int, dim: int, param_dtype: str, grad_dtype: str) -> None:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from adept_fast.kernels import gradient_sums

    along = ("param_reduced_stride", "grad_reduced_stride") if dim == 0 else ("param_kept_stride", "grad_kept_stride")
    across = ("param_kept_stride", "grad_kept_stride") if dim == 0 else ("param_reduced_stride", "grad_reduced_stride")
    kept, reduced = gradient_sums.tile(4096, 4096, *((4096, 1) if dim == 0 else (1, 4096)))
    constants = {**dict.fromkeys(along, 1), "ACCUMULATOR": tl.float32, "KEPT": kept, "REDUCED": reduced, "TILES": 4}
    kernel = gradient_sums.partial_sums_kernel
    types = {"param": POINTERS[param_dtype], "grad": POINTERS[grad_dtype], "partials": "*fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    divisible = ("param", "grad", "partials", "kept", "reduced", *across)
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    machine_code = triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["sass"]
    assert not re.search(r"\b(LDL|STL)\b", machine_code)
    loads = re.findall(r"\bLDG\.\S+", machine_code)
    assert loads and all(".128" in load for load in loads), loads


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(37, 131), (1027, 4096), (4096, 1536), (3, 100_003)], ids=str)
def test_gpu_gives_the_sums(shape: tuple[int, ...], layout: str, dim: int) -> None:
    from adept_fast.kernels.gradient_sums import gradient_sums

    param, grad = inputs(shape, layout, "bf16", "fp32", "cuda")
    sums = gradient_sums(param, grad, dim)
    assert excess(sums, param, grad, dim) <= 1.0
    assert all(map(torch.equal, sums, gradient_sums(param, grad, dim)))


@pytest.mark.gpu
def test_gpu_indexes_beyond_32_bits() -> None:
    from adept_fast.kernels.gradient_sums import gradient_sums

    param = torch.full((2**16 + 1, 2**15 + 8), 0.5, dtype=torch.bfloat16, device="cuda")
    grad = torch.ones_like(param)
    param[-1], grad[-1] = -0.25, 3.0
    squares, absolutes, products = (found[-1].item() for found in gradient_sums(param, grad, 0))
    columns = param.shape[1]
    assert (squares, absolutes, products) == (9.0 * columns, 0.75 * columns, -0.75 * columns)


def vectors_agree(device: str) -> bool:
    """Two backwards over vectors of all kinds in one call each, against the formula: sums bit for bit in fp64, and the running gradient."""
    from adept_fast.kernels import gradient_sums_vectors
    from adept_fast.kernels.gradient_sums_vectors import Vector

    generator = torch.Generator().manual_seed(5)
    pairs = [(p, g) for p in ("fp32", "bf16", "fp16") for g in ("fp32", "bf16", "fp16")]
    cases = [(n, p, g, kinds, kept) for n in (1, 67, 600) for p, g in pairs for kinds, kept in ((1, False), (3, True))]
    vectors, wanted = [], []
    for n, p, g, kinds, kept in cases:
        theta, first, second = (torch.randn(n, generator=generator) for _ in range(3))
        theta, first, second = theta.to(DTYPES[p]), first.to(DTYPES[g]), second.to(DTYPES[g])
        sums = torch.zeros(kinds, n, dtype=torch.float64)
        running = torch.zeros(n) if kept else None
        vectors.append([Vector(*(x if x is None else x.to(device) for x in (theta, grad, sums, running))) for grad in (first, second)])
        terms = [torch.stack([x * x, (theta.double() * x).abs(), theta.double() * x]) for x in (first.double(), second.double())]
        wanted.append(((terms[0] + terms[1])[:kinds], first.float() + second.float()))
    vectors = [(one, two._replace(sums=one.sums, running=one.running)) for one, two in vectors]
    with patch.object(gradient_sums_vectors, "BLOCK", 256):
        for backward in (0, 1):
            gradient_sums_vectors.add_vectors([pair[backward] for pair in vectors])
    return all(
        torch.equal(pair[0].sums.cpu(), sums) and (pair[0].running is None or torch.equal(pair[0].running.cpu(), running))
        for pair, (sums, running) in zip(vectors, wanted, strict=True)
    )


@pytest.mark.gpu
def test_gpu_adds_vectors() -> None:
    assert vectors_agree("cuda")


# whether fp64 vectors are among the others, products of each backward are summed, the gradients are; launches of the kernel for vectors
HOOKS = [((False, True, False), 2), ((False, False, True), 2), ((True, True, True), 0)]


def hooked(device: str, wide: bool, products: bool, running: bool) -> dict[str, float | bool]:
    """GradientSums over two backwards through matrices and vectors: the largest error of what is summed over its bound, whether each
    backward's terms of vectors are exact, how often the kernel for vectors was launched."""
    from adept_fast.kernels import gradient_sums
    from adept_fast.ops.gradient_sums.op import GradientSums

    generator = torch.Generator().manual_seed(6)
    shapes = {"gain": ((67,), "bf16"), "weight": ((5, 70), "fp32"), "bias": ((600,), "fp32"), "half": ((9,), "fp16")}
    shapes |= {"long": ((11,), "fp64")} if wide else {}
    made = {name: torch.randn(shape, generator=generator).to(device, DTYPES[dtype]) for name, (shape, dtype) in shapes.items()}
    factors = [[torch.randn(shape, generator=generator).to(device) for shape, _ in shapes.values()] for _ in range(2)]
    parameters = {name: torch.nn.Parameter(value) for name, value in made.items()}

    def loss(factor: list[Tensor]) -> Tensor:
        return sum((parameter.double() * each).sin().sum() for parameter, each in zip(parameters.values(), factor, strict=True))

    with patch.object(gradient_sums, "add_vectors", wraps=gradient_sums.add_vectors) as launched:
        with GradientSums(parameters, {name: range(value.ndim) for name, value in made.items()}, products, running) as sums:
            for factor in factors:
                sums.backward(loss(factor))
            found = sums.read(tokens=7)
    backwards = [dict(zip(made, torch.autograd.grad(loss(factor), [*parameters.values()]), strict=True)) for factor in factors]
    excess, exact = [], True
    for (name, dim), (terms, taylor) in found.items():
        theta = made[name].double()
        gradients = [backward[name].double() for backward in backwards]

        def along(values: Tensor, dim: int = dim) -> Tensor:
            return values.movedim(1 + dim, 1).reshape(len(values), values.shape[1 + dim], -1).sum(2).cpu()

        every = sum(torch.stack([g * g, (theta * g).abs(), theta * g]) for g in gradients)[: len(terms)]
        exact &= theta.ndim > 1 or torch.equal(terms, along(every))
        excess.append((terms - along(every)).abs() / along(every.abs() if len(terms) == 1 else every[[0, 1, 1]]))
        if running:
            whole = along((theta * sum(gradients)).abs()[None])[0] / 7
            excess.append((taylor - whole).abs() / whole)
    return {"excess": max(float(each.max()) for each in excess) / (16 * 2**-24), "exact": exact, "launches": launched.call_count}


def assert_wired(results: list[dict[str, float | bool]]) -> None:
    assert all(found["excess"] <= 1 and found["exact"] for found in results), results
    assert [found["launches"] for found in results] == [launches for _, launches in HOOKS]


@pytest.mark.gpu
def test_gpu_hooks_hand_all_vectors_of_a_backward_to_one_launch() -> None:
    assert_wired([hooked("cuda", *setting) for setting, _ in HOOKS])


@pytest.mark.gpu
def test_gpu_sums_the_gradients_of_a_model_as_the_cpu_does() -> None:
    from adept_fast.scoring.unit_importance import parameter_sums
    from tests.support import tiny_models
    from tests.support.sequence_sums import sequence_sums

    model, items = tiny_models.model("phi3"), tiny_models.items(4)
    dims = {name: tuple(range(parameter.ndim)) for name, parameter in model.named_parameters() if ".layers." in name}
    corpus, sequences = (
        [summed(model.to(device), items, dims) for device in ("cpu", "cuda")] for summed in (parameter_sums, sequence_sums)
    )
    assert any(model.get_parameter(name).ndim == 1 for name, _ in corpus[1])
    for where in corpus[0]:
        pairs = [*((getattr(found[where], key) for found in corpus) for key in ("abs_taylor", "fisher"))]
        for wanted, value in [*pairs, *zip(*(found[where][:2] for found in sequences), strict=True)]:
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


def interpret_all() -> list[dict[str, float | bool]]:
    from adept_fast.kernels import gradient_sums

    results: list[dict[str, float | bool]] = []
    for shape, dim, layout, param_dtype, grad_dtype, tile, programs in CASES:
        gradient_sums.TILE, gradient_sums.PROGRAMS = tile, programs
        param, grad = inputs(shape, layout, param_dtype, grad_dtype, "cpu")
        first, second = (gradient_sums.gradient_sums(param, grad, dim) for _ in range(2))
        results.append({"excess": excess(first, param, grad, dim), "repeats": all(map(torch.equal, first, second))})
    results.append({"vectors": vectors_agree("cpu")})
    return [*results, *(hooked("cpu", *setting) for setting, _ in HOOKS)]


if __name__ == "__main__":
    print(json.dumps(interpret_all()))
