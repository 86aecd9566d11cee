"""kernels/linear_cross_entropy*.py against fp64: interpreted, compiled offline for three architectures, run where there is a GPU.

Triton decides at import whether it interprets, so the interpreted cases run in one child process: this file as a script.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adept_fast.ops.linear_cross_entropy.op import IGNORE, linear_cross_entropy, linear_divergence, linear_predictions
from adept_fast.ops.linear_cross_entropy.reference import Projection
from tests.ops.test_linear_cross_entropy import DTYPES, LAYOUTS, distance, inputs, plain, plain_logits

pytest.importorskip("triton")

# rows, width, vocabulary, bias, scale, softcap; dtype; then PROGRAMS and PART: how many shares and parts the vocabulary falls into
CASES = [
    *(((1, 8, 3, False, 1.0, 0.0), dtype, 1, 64) for dtype in DTYPES),
    *(((1, 96, 301, False, 1.0, 0.0), dtype, 1, 64) for dtype in ("bf16", "fp16")),
    *(((37, 24, 1203, True, 0.37, 0.0), dtype, 3, 2**14) for dtype in DTYPES),
    ((131, 40, 403, False, 1.7, 9.0), "fp32", 1024, 2**25),
    ((3, 130, 257, True, 0.5, 3.0), "bf16", 2, 400),
    ((131, 16, 128, False, 2.0, 0.0), "fp16", 1, 2**14),
]


UNIT = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}  # of rounding
FEW = 64  # entries of a gradient: of two errors of the same size, chance says which is larger


def beyond_rounding(found: Tensor, true: Tensor, hidden: Tensor, head: Projection, targets: Tensor, upstream: Tensor, unit: float) -> float:
    """Largest error of a gradient over its bound: each factor of w_v rounded once in the head's type, the result once, the rest in fp32.

    |error| <= unit (sum_v |factor_v w_v| + |gradient|) + 2^-20 sum_v |factor_v w_v| + 2^-25 sum_v |w_v|, the last for subnormal factors.
    """
    weight = head.weight.double()
    product = (hidden.double() @ weight.T).requires_grad_()
    z = (product if head.bias is None else product + head.bias.double()) * head.scale
    z = torch.tanh(z / head.softcap) * head.softcap if head.softcap else z
    losses = functional.cross_entropy(z, targets, reduction="none", ignore_index=IGNORE)
    factors = torch.autograd.grad((losses * upstream).sum(), product)[0].abs()
    terms = factors @ weight.abs()
    bound = unit * (terms + true.abs()) + 2.0**-20 * terms + 2.0**-25 * weight.abs().sum(0) * upstream.max()
    return float(((found.double() - true).abs() / bound).max()) - 1


def excess(case: tuple, device: str) -> dict[str, Any]:
    """How far the kernels are from fp64, beyond torch in the same dtype and the rounding of one fp32 operation: at most 0 is wanted."""
    from adept_fast.kernels import linear_cross_entropy as kernels
    from adept_fast.kernels import linear_cross_entropy_gradient as gradients

    shape, dtype, programs, part = case
    hidden, head, targets = inputs(*shape, DTYPES[dtype])
    upstream = torch.rand(len(targets), generator=torch.Generator().manual_seed(3)) + 0.5
    truth, true_gradient = plain(hidden, head, targets, torch.float64, upstream)
    theirs, their_gradient = plain(hidden, head, targets, DTYPES[dtype], upstream)
    variants = (hidden + torch.tensor([0.0, 1e-3, 1.0])[:, None, None] * torch.randn(3, *hidden.shape)).to(hidden.dtype)
    z = plain_logits(variants, head, torch.float64)
    logs, there = z.log_softmax(-1), targets != IGNORE
    true_kl = (logs[0].exp() * (logs[0] - logs)).sum(-1)[:, there]
    device_head = head._replace(weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device))
    with patch.object(kernels, "PROGRAMS", programs), patch.object(gradients, "PART", part):
        runs = []
        for _ in range(2):
            h = hidden.to(device).requires_grad_()
            losses = linear_cross_entropy(h, device_head, targets.to(device), backend="triton")
            found = torch.autograd.grad((losses * upstream.to(device)).sum(), h)[0]
            both = linear_divergence(variants.to(device), device_head, targets.to(device), backend="triton")
            best = linear_predictions(h, device_head, targets.to(device), backend="triton")[1]
            runs.append([x.detach().cpu() for x in (losses, found, *both, best)])
    losses, found, variant_losses, kl, best = runs[0]
    rounding = 2.0**-24
    true_losses = -logs[:, there].gather(-1, targets[there].expand(3, -1)[..., None])[..., 0]
    theirs_less = distance(found, true_gradient) - distance(their_gradient, true_gradient) - 2 * rounding * float(true_gradient.abs().max())
    return {
        "losses": distance(losses, truth) - distance(theirs, truth) - 2 * rounding * float(truth.abs().max()),
        "gradient_bound": beyond_rounding(found, true_gradient, hidden, head, targets, upstream, UNIT[dtype]),
        **({"gradient": theirs_less} if hidden.numel() >= FEW else {}),
        "variants": distance(variant_losses[:, there], true_losses) - 4 * rounding * float(z.abs().max()),
        "kl": distance(kl[:, there], true_kl) - 4 * rounding * float(z.abs().max()),
        "argmax": float((z[0].amax(-1) - z[0].gather(1, best[:, None])[:, 0]).max()) - 4 * rounding * float(z.abs().max()),
        "unsupervised": float(losses[~there].abs().sum() + found[~there].abs().sum() + kl[:, ~there].abs().sum() + kl[0].abs().sum()),
        "repeats": all(map(torch.equal, *runs)),
    }


def nan_alone(dtype: str, device: str) -> dict[str, bool]:
    """Whether targets outside the vocabulary make their rows NaN, in loss and gradient, and no other row any different."""
    hidden, head, targets = (x.to(device) if isinstance(x, Tensor) else x for x in inputs(37, 24, 1203, False, 0.37, 9.0, DTYPES[dtype]))
    head, stray = head._replace(weight=head.weight.to(device)), targets.clone()
    stray[[0, 3, 35]] = torch.tensor([-1, 1203, 2**40], device=device)
    found = []
    for wanted in (targets, stray):
        h = hidden.clone().requires_grad_()
        losses = linear_cross_entropy(h, head, wanted, backend="triton")
        gradient = torch.autograd.grad(losses.sum(), h)[0]
        predicted = linear_predictions(h, head, wanted, backend="triton")[0]
        divergence = linear_divergence(torch.stack([hidden, hidden + 1]), head, wanted, backend="triton").losses
        found.append({"losses": losses[:, None], "gradient": gradient, "predicted": predicted[:, None], "divergence": divergence.T})
    right, outside = found[0], stray != targets
    return {name: bool(x[outside].isnan().all()) and torch.equal(x[~outside], right[name][~outside]) for name, x in found[1].items()}


def of_layout(layout: str, device: str) -> float:
    """Largest difference between the kernels' losses and gradients and the reference's, where tensors lie in memory some other way."""
    hidden, head, targets = inputs(37, 24, 130, True, 1.0, 0.0, torch.float32)
    hidden, weight, bias, targets, *factors = LAYOUTS[layout](*(x.to(device) for x in (hidden, head.weight, head.bias, targets)))
    found = []
    for name in ("triton", "torch"):
        h = hidden.detach().requires_grad_()
        losses = linear_cross_entropy(h, Projection(weight, bias, *factors), targets, backend=name)
        found.append(torch.cat([losses.detach().flatten(), torch.autograd.grad(losses.sum(), h)[0].float().flatten()]))
    return max((found[0] - found[1]).abs().tolist(), default=0.0)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, __file__], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: "-".join(map(str, CASES[index])).replace(" ", ""))
def test_interpreted_kernels_are_no_further_from_fp64_than_torch(interpreted: dict[str, Any], index: int) -> None:
    found = dict(interpreted["cases"][index])
    assert found.pop("repeats")
    assert all(value <= 0 for value in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_numbers_of_the_reference(interpreted: dict[str, Any], layout: str) -> None:
    assert interpreted["layouts"][layout] <= (2e-2 if layout == "mixed types" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_target_outside_the_vocabulary_makes_its_row_nan(interpreted: dict[str, Any], dtype: str) -> None:
    assert all(interpreted["nan alone"][dtype].values()), interpreted["nan alone"][dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_target_outside_the_vocabulary_makes_its_row_nan_on_a_gpu(dtype: str) -> None:
    found = nan_alone(dtype, "cuda")
    assert all(found.values()), found


POINTERS = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
EVERY = {"BIAS": True, "SOFTCAP": True, "DIVERGENCE": False}
FLAGS = {"losses": EVERY, "divergence": {**EVERY, "DIVERGENCE": True}}
BUILDS = [
    *(("share_kernel", dtype, flags) for dtype in POINTERS for flags in FLAGS),
    *((name, dtype, "losses") for name in ("factors_kernel", "add_product_kernel") for dtype in POINTERS),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "flags"), BUILDS)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiles_to_wide_loads_without_spills(architecture: int, name: str, dtype: str, flags: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from adept_fast.kernels import linear_cross_entropy as kernels
    from adept_fast.kernels import linear_cross_entropy_gradient as gradients
    from adept_fast.kernels.number_formats import TRITON_DTYPES

    kernel = getattr(kernels if name == "share_kernel" else gradients, name)
    tile = kernels.tile(DTYPES[dtype], flags == "divergence")
    branches = {"DTYPE": TRITON_DTYPES[DTYPES[dtype]], **FLAGS[flags]}
    constants = {key: value for key, value in {**tile.sizes, **branches}.items() if key in kernel.arg_names}
    own = dict.fromkeys(("hidden", "weight", "bias", "factors"), POINTERS[dtype])
    types = {**own, "targets": "*i64", "likeliest": "*i64", "scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(("maxima", "sums", "wanted", "weighted", "normaliser", "gradient"), "*fp32")
    signature = {key: "constexpr" if key in constants else types.get(key, "i32") for key in kernel.arg_names}
    divisible = [key for key in kernel.arg_names if key in types and types[key].startswith("*")] + ["width", "stride"]
    attributes = {(kernel.arg_names.index(key),): [["tt.divisibility", 16]] for key in divisible if key in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=tile.options)
    machine_code = compiled.asm["sass"]
    assert not re.search(r"\b(LDL|STL)\b", machine_code)
    assert compiled.metadata.shared <= 99 * 2**10  # of a block, on sm_86 too
    wide = re.findall(r"\b(?:LDG|LDGSTS)\.\S*128\b", machine_code)
    products = {"share_kernel": 2 + 2 * (flags == "divergence"), "factors_kernel": 2, "add_product_kernel": 2}[name]
    assert len(wide) >= products, "the operands of a product are read 16 bytes at a time"
    if dtype != "fp32":
        assert re.search(r"\b(HMMA|HGMMA|UTCHMMA|UTCMMA)\b", machine_code), "no tensor cores"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace(" ", ""))
def test_gpu_is_no_further_from_fp64_than_torch(case: tuple) -> None:
    found = excess(case, "cuda")
    assert found.pop("repeats")
    assert all(value <= 0 for value in found.values()), found


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = {
        "cases": [excess(case, "cpu") for case in CASES],
        "layouts": {layout: of_layout(layout, "cpu") for layout in LAYOUTS},
        "nan alone": {dtype: nan_alone(dtype, "cpu") for dtype in DTYPES},
    }
    print(json.dumps(made))
