"""Losses without logits against F.linear and F.cross_entropy: no further from fp64 than those in the same dtype."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adept_fast.errors import InputError
from adept_fast.ops import dispatch
from adept_fast.ops.linear_cross_entropy.op import IGNORE, linear_cross_entropy, linear_divergence, linear_predictions
from adept_fast.ops.linear_cross_entropy.reference import Projection
from bench.measure import peak_memory

BACKENDS = [name for name in dispatch.IMPLEMENTED["linear_cross_entropy"] if name == "torch" or name == "cpu"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# rows, width, vocabulary, bias, scale, softcap
SHAPES = [
    (1, 8, 3, False, 1.0, 0.0),
    (37, 24, 1203, False, 1.0, 0.0),
    (37, 24, 1203, True, 0.37, 0.0),
    (300, 40, 5003, False, 1.7, 9.0),
    (5, 64, 20_011, True, 1.0, 4.0),
]


def inputs(rows: int, width: int, vocabulary: int, bias: bool, scale: float, softcap: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Hidden states, head and targets (every fifth is none), such that the likeliest tokens stand out as in a trained model."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.7).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[1::5] = IGNORE
    shift = torch.randn(vocabulary, generator=generator).to(dtype) if bias else None
    return hidden, Projection(weight, shift, scale, softcap), targets


def plain_logits(hidden: Tensor, head: Projection, dtype: torch.dtype) -> Tensor:
    z = functional.linear(hidden.to(dtype), head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)) * head.scale
    return torch.tanh(z / head.softcap) * head.softcap if head.softcap else z


def plain(hidden: Tensor, head: Projection, targets: Tensor, dtype: torch.dtype, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and gradient of (losses * upstream).sum() as torch takes them in `dtype`; both in fp64."""
    hidden = hidden.to(dtype).requires_grad_()
    z = plain_logits(hidden, head, dtype)
    losses = functional.cross_entropy(z if dtype == torch.float64 else z.float(), targets, reduction="none", ignore_index=IGNORE)
    return losses.detach().double(), torch.autograd.grad((losses * upstream).sum(), hidden)[0].double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_values_and_gradients_are_no_further_from_fp64_than_torch_s(name: str, dtype: torch.dtype, shape: tuple) -> None:
    hidden, head, targets = inputs(*shape, dtype)
    upstream = torch.rand(len(targets), generator=torch.Generator().manual_seed(3)) + 0.5
    truth, gradient = plain(hidden, head, targets, torch.float64, upstream)
    theirs, their_gradient = plain(hidden, head, targets, dtype, upstream)
    hidden.requires_grad_()
    losses = linear_cross_entropy(hidden, head, targets, backend=name)
    found = torch.autograd.grad((losses * upstream).sum(), hidden)[0]
    assert losses.dtype == torch.float32 and found.dtype == dtype
    assert bool((losses[targets == IGNORE] == 0).all()) and bool((found[targets == IGNORE] == 0).all())
    rounding = 2.0**-24  # of one fp32 operation on the largest value
    assert distance(losses, truth) <= distance(theirs, truth) + 2 * rounding * float(truth.abs().max())
    assert distance(found, gradient) <= distance(their_gradient, gradient) + 2 * rounding * float(gradient.abs().max())


def distance(found: Tensor, truth: Tensor) -> float:
    """Root of the mean square: the largest single error of a few hundred is chance."""
    return float((found.detach().double() - truth).square().mean().sqrt())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_predictions_and_divergence(name: str, shape: tuple) -> None:
    hidden, head, targets = inputs(*shape, torch.float32)
    losses, best = linear_predictions(hidden, head, targets, backend=name)
    assert torch.equal(best, plain_logits(hidden, head, torch.float64).argmax(-1))
    generator = torch.Generator().manual_seed(4)
    variants = hidden + torch.tensor([0.0, 1e-3, 1.0])[:, None, None] * torch.randn(3, *hidden.shape, generator=generator)
    found = linear_divergence(variants, head, targets, backend=name)
    logs = plain_logits(variants, head, torch.float64).log_softmax(-1)
    kl = (logs[0].exp() * (logs[0] - logs)).sum(-1)
    there = targets != IGNORE
    truth = -logs[:, there].gather(-1, targets[there].expand(3, -1)[..., None])[..., 0]
    assert bool((losses[~there] == 0).all())
    assert distance(losses[there], truth[0]) <= 2e-7 * float(truth.abs().max())
    assert distance(found.losses[:, there], truth) <= 2e-7 * float(truth.abs().max())
    assert bool((found.kl[0] == 0).all()) and bool((found.kl[:, ~there] == 0).all()) and bool((found.losses[:, ~there] == 0).all())
    spread = float((logs[0] - logs).abs().max())
    assert distance(found.kl[:, there], kl[:, there]) <= 2e-7 * max(spread, float(plain_logits(hidden, head, torch.float64).abs().max()))


@pytest.mark.parametrize("name", BACKENDS)
def test_shapes_of_any_rank_and_nothing_supervised(name: str) -> None:
    hidden, head, targets = inputs(*SHAPES[2], torch.float32)
    flat = linear_cross_entropy(hidden[:36], head, targets[:36], backend=name)
    assert torch.equal(linear_cross_entropy(hidden[:36].view(3, 12, -1), head, targets[:36].view(3, 12), backend=name), flat.view(3, 12))
    hidden.requires_grad_()
    losses = linear_cross_entropy(hidden, head, torch.full_like(targets, IGNORE), backend=name)
    assert not losses.any() and not torch.autograd.grad(losses.sum(), hidden)[0].any()
    assert linear_cross_entropy(hidden[:0], head, targets[:0], backend=name).shape == (0,)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", [name for name in BACKENDS if name == "cpu"])
def test_memory_does_not_grow_with_the_vocabulary(name: str) -> None:
    peaks = []
    for vocabulary in (20_000, 200_000):
        hidden, head, targets = inputs(256, 16, vocabulary, False, 1.0, 0.0, torch.bfloat16)
        hidden.requires_grad_()
        call = functools.partial(lambda h, head, t: torch.autograd.grad(linear_cross_entropy(h, head, t, backend=name).sum(), h), hidden)
        call(head._replace(weight=head.weight[:64]), targets % 64)  # what the libraries keep from their first call
        peaks.append(peak_memory(lambda call=call, head=head, targets=targets: call(head, targets), torch.device("cpu")))
    assert max(peaks) < 4 * 2**20  # 256 rows of 200,000 logits are 195 MiB
    assert abs(peaks[1] - peaks[0]) < 2**20


@pytest.mark.parametrize("variants", [0, 3])
def test_bits_do_not_depend_on_instructions_or_threads(monkeypatch: pytest.MonkeyPatch, variants: int) -> None:
    native, cpu = pytest.importorskip("adept_fast._C"), pytest.importorskip("adept_fast.ops.linear_cross_entropy.cpu")
    hidden, head, targets = inputs(300, 40, 5003, True, 1.7, 9.0, torch.bfloat16)
    results = []
    for instructions in native.features()["instruction_sets"]:
        for threads in (1, 3):
            monkeypatch.setattr(cpu, "INSTRUCTIONS", instructions)
            monkeypatch.setattr(cpu, "THREADS", threads)
            results.append(cpu.linear_cross_entropy(hidden, head, targets.clamp_min(0), variants, not variants))
    assert len(results) >= 2
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_what_does_not_fit_is_refused() -> None:
    hidden, head, targets = inputs(*SHAPES[1], torch.float32)
    with pytest.raises(InputError, match="hidden .*, found \\(37, 24\\), \\(1203, 24\\) and \\(36,\\)"):
        linear_cross_entropy(hidden, head, targets[1:])
    with pytest.raises(InputError, match="freeze it"):
        linear_cross_entropy(hidden, head._replace(weight=head.weight.requires_grad_()), targets)
    with pytest.raises(InputError, match="targets must be int64, found torch.int32"):
        linear_cross_entropy(hidden, head, targets.int())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("wrong", [-1, 1203])
def test_targets_outside_the_vocabulary_are_refused(name: str, wrong: int) -> None:
    hidden, head, targets = inputs(*SHAPES[1], torch.float32)
    targets[3] = wrong
    for h in (hidden, hidden.clone().requires_grad_()):
        with pytest.raises((IndexError, RuntimeError)):
            linear_cross_entropy(h, head, targets, backend=name)
    with pytest.raises((IndexError, RuntimeError)):
        linear_predictions(hidden, head, targets, backend=name)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_second_derivative_is_refused(name: str) -> None:
    hidden, head, targets = inputs(*SHAPES[1], torch.float32)
    mixing = torch.eye(hidden.shape[1], requires_grad=True)
    losses = linear_cross_entropy(hidden @ mixing, head, targets, backend=name)
    (first,) = torch.autograd.grad(losses.sum(), mixing, retain_graph=True)
    (gradient,) = torch.autograd.grad(losses.sum(), mixing, create_graph=True)
    assert torch.equal(gradient, first)
    with pytest.raises(InputError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum(), mixing)


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast_casts_the_inputs_and_no_sum(name: str) -> None:
    hidden, head, targets = inputs(*SHAPES[1], torch.float32)
    low = Projection(head.weight.bfloat16(), None if head.bias is None else head.bias.bfloat16(), head.scale, head.softcap)
    found = []
    for h, w, autocast in ((hidden, head, True), (hidden.bfloat16(), low, False)):
        h = h.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = linear_cross_entropy(h, w, targets, backend=name)
            found.append((losses, torch.autograd.grad(losses.sum(), h)[0].bfloat16()))
    assert found[0][0].dtype == torch.float32 and all(map(torch.equal, *found))


def test_operator_traces() -> None:
    hidden, head, targets = inputs(*SHAPES[2], torch.float32)
    operator = torch.ops.adept_fast.linear_cross_entropy.default
    for name in BACKENDS:
        for h in (hidden, hidden.clone().requires_grad_()):
            torch.library.opcheck(operator, (h, head.weight, head.bias, targets, head.scale, head.softcap, name))
