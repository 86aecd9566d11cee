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


WRONG = {
    "fewer targets": (
        lambda h, w, b, t: (h, w, b, t[1:]),
        "found hidden \\(37, 24\\), weight \\(1203, 24\\), bias \\(1203,\\), targets \\(36,\\)",
    ),
    "a shorter bias": (lambda h, w, b, t: (h, w, b[:-1], t), "bias \\[vocabulary\\] or None .* bias \\(1202,\\)"),
    "a bias of two dimensions": (lambda h, w, b, t: (h, w, b[:, None], t), "bias \\(1203, 1\\)"),
    "another width": (lambda h, w, b, t: (h[:, 1:], w, b, t), "hidden \\(37, 23\\), weight \\(1203, 24\\)"),
    "a weight of three dimensions": (lambda h, w, b, t: (h, w[None], b, t), "weight \\(1, 1203, 24\\)"),
    "no vocabulary": (lambda h, w, b, t: (h, w[:0], b[:0], t), "weight \\(0, 24\\)"),
    "targets of int32": (lambda h, w, b, t: (h, w, b, t.int()), "targets must be int64, found torch.int32"),
    "hidden states of integers": (lambda h, w, b, t: (h.long(), w, b, t), "hidden must be fp32, bf16, fp16 or fp64, found torch.int64"),
    "a complex bias": (lambda h, w, b, t: (h, w, b.to(torch.complex64), t), "bias must be fp32"),
    "a weight on meta": (lambda h, w, b, t: (h, w.to("meta"), b, t), "one device.*: hidden is on cpu, weight on meta"),
    "targets on meta": (lambda h, w, b, t: (h, w, b, t.to("meta")), "targets on meta"),
    "all on meta": (lambda *given: (x.to("meta") for x in given), "hidden on meta"),
    "a trained head": (lambda h, w, b, t: (h, w.clone().requires_grad_(), b, t), "freeze it"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", BACKENDS)
def test_what_does_not_fit_is_refused(name: str, wrong: str) -> None:
    change, message = WRONG[wrong]
    hidden, head, targets = inputs(*SHAPES[2], torch.float32)
    hidden, weight, bias, targets = change(hidden, head.weight, head.bias, targets)
    head = Projection(weight, bias)
    for call in (linear_cross_entropy, linear_predictions):
        with pytest.raises(InputError, match=message):
            call(hidden, head, targets, backend=name)
    if "meta" not in wrong and not weight.requires_grad:  # of a caller who takes the operator itself
        with pytest.raises(InputError, match=message):
            torch.ops.adept_fast.linear_cross_entropy(hidden, weight, bias, targets, 1.0, 0.0, name)


@pytest.mark.parametrize("change", [{"scale": float("nan")}, {"softcap": float("inf")}, {"softcap": -1.0}, {"softcap": 1e-40}])
def test_a_scale_or_softcap_that_is_none_is_refused(change: dict[str, float]) -> None:
    hidden, head, targets = inputs(*SHAPES[2], torch.float32)
    with pytest.raises(InputError, match="scale must be finite, softcap 0 or positive"):
        linear_cross_entropy(hidden, head._replace(**change), targets)


@pytest.mark.parametrize("shape", [(2, 5, 24), (0, 5, 24), (24,)])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_divergence_of_what_does_not_fit_is_refused(name: str, shape: tuple[int, ...]) -> None:
    _, head, targets = inputs(*SHAPES[2], torch.float32)
    with pytest.raises(InputError, match="expected hidden \\[variants, rows, width\\] and targets \\[rows\\]"):
        linear_divergence(torch.zeros(shape), head, targets[: 5 if shape[0] == 0 else 6], backend=name)


def strided(x: Tensor) -> Tensor:
    """The same values in memory that is not in one piece."""
    return torch.stack([x, torch.full_like(x, 99)], -1)[..., 0]


LAYOUTS = {
    "bias not contiguous": lambda h, w, b, t: (h, w, strided(b), t),
    "bias expanded": lambda h, w, b, t: (h, w, b[:1].expand(len(b)), t),
    "bias with an offset": lambda h, w, b, t: (h, w, torch.cat([b[:3], b])[3:], t),
    "all not contiguous": lambda *given: map(strided, given),
    "transposed": lambda h, w, b, t: (h.T.contiguous().T, w.T.contiguous().T, b, t),
    "targets all alike": lambda h, w, b, t: (h, w, b, t.new_tensor(7).expand(len(t))),
    "one row again and again": lambda h, w, b, t: (h[:1].expand(len(h), -1), w, b, t),
    "mixed types": lambda h, w, b, t: (h.bfloat16(), w, b.half(), t),
    "a negative scale": lambda h, w, b, t: (h, w, b, t, -0.7, 0.0),
    "a scale of 0": lambda h, w, b, t: (h, w, b, t, 0.0, 0.0),
    "a negative scale with a cap": lambda h, w, b, t: (h, w, b, t, -0.7, 2.0),
    "width 1": lambda h, w, b, t: (h[:, :1], w[:, :1], b, t),
    "width 0": lambda h, w, b, t: (h[:, :0], w[:, :0], b, t),
    "a vocabulary of 1": lambda h, w, b, t: (h, w[:1], b[:1], t.clamp_max(0)),
    "one target": lambda h, w, b, t: (h, w, b, torch.where(torch.arange(len(t)) == 5, 3, IGNORE)),
    "no row": lambda h, w, b, t: (h[:0], w, b, t[:0]),
    "a single row without dimension": lambda h, w, b, t: (h[0], w, b, t[0]),
    "three dimensions": lambda h, w, b, t: (h[:36].view(2, 9, 2, -1), w, b, t[:36].view(2, 9, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BACKENDS)
def test_any_layout_gives_the_numbers_of_the_same_values_in_one_piece(name: str, layout: str) -> None:
    hidden, head, targets = inputs(*SHAPES[2], torch.float32)
    hidden, weight, bias, targets, *factors = LAYOUTS[layout](hidden, head.weight, head.bias, targets)
    head = Projection(weight, bias, *factors)
    hidden = hidden.detach().requires_grad_()
    flat = hidden.reshape(-1, hidden.shape[-1]) if hidden.numel() else hidden
    wide = Projection(weight.double(), bias.double(), *factors)
    truth = functional.cross_entropy(plain_logits(flat, wide, torch.float64), targets.flatten(), reduction="none", ignore_index=IGNORE)
    gradient = torch.autograd.grad(truth.sum(), hidden)[0]
    losses = linear_cross_entropy(hidden, head, targets, backend=name)
    found = torch.autograd.grad(losses.sum(), hidden)[0]
    torch.testing.assert_close(losses.double(), truth.view(targets.shape), rtol=2e-6, atol=2e-6)
    tolerance = 2e-6 if hidden.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), gradient.double(), rtol=tolerance, atol=tolerance)
    assert torch.equal(linear_cross_entropy(hidden.detach(), head, targets, backend=name), losses.detach())
    predicted, _ = linear_predictions(hidden, head, targets, backend=name)
    torch.testing.assert_close(predicted, losses.detach(), rtol=1e-6, atol=1e-6)
    if targets.ndim == 1:
        divergence = linear_divergence(torch.stack([hidden, hidden + 0.5]), head, targets, backend=name)
        torch.testing.assert_close(divergence.losses[0], losses.detach(), rtol=1e-6, atol=1e-6)
        assert bool(divergence.kl.isfinite().all()) and not divergence.kl[0].any()


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_without_a_target_get_a_gradient_of_zero_whatever_comes_down(name: str) -> None:
    """As F.cross_entropy's do: the mean over no target has an upstream gradient of infinity."""
    hidden, head, targets = inputs(*SHAPES[1], torch.float32)
    hidden.requires_grad_()
    none = torch.full_like(targets, IGNORE)
    mean = linear_cross_entropy(hidden, head, none, backend=name).sum() / (none != IGNORE).sum()
    theirs = functional.cross_entropy(plain_logits(hidden, head, torch.float32), none, ignore_index=IGNORE)
    for loss in (mean, theirs):
        assert loss.isnan() and not torch.autograd.grad(loss, hidden)[0].any()
    found = torch.autograd.grad((linear_cross_entropy(hidden, head, targets, backend=name) * torch.inf).sum(), hidden)[0]
    assert not found[targets == IGNORE].any() and not found[targets != IGNORE].isfinite().all()


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


@pytest.mark.slow
def test_operator_traces() -> None:
    hidden, head, targets = inputs(*SHAPES[2], torch.float32)
    operator = torch.ops.adept_fast.linear_cross_entropy.default
    for name in BACKENDS:
        for h in (hidden, hidden.clone().requires_grad_()):
            torch.library.opcheck(operator, (h, head.weight, head.bias, targets, head.scale, head.softcap, name))
