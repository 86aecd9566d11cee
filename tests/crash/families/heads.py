"""Losses of heads, and sums of gradients, of tensors of any shape, dtype and layout, some of which do not belong together."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from adept_fast.ops.gradient_sums import op as sums_op
from adept_fast.ops.linear_cross_entropy.op import IGNORE, linear_cross_entropy, linear_divergence, linear_predictions
from adept_fast.ops.linear_cross_entropy.reference import Projection
from tests.crash.case import Case

BACKENDS = (None, "cpu", "cpu", "torch", "triton")
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXACT = (torch.float32, torch.float64)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 3)], -1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "strided": strided,
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[min(x.numel(), 1) :].view(x.shape),
    "reversed": lambda x: x.flip(0).contiguous().flip(0),
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "expanded": lambda x: x[:1].expand(x.shape) if len(x) else x,
}
# Of what does not belong together. What is no tensor of the kind that is taken is refused; the rest is compared with torch.
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "shorter": lambda x: x[:-1],
    "longer": lambda x: torch.cat([x, x[:1]]),
    "a dimension more": lambda x: x[None],
    "one dimension": lambda x: x.flatten(),
    "empty": lambda x: x[:0],
    "on meta": lambda x: x.to("meta"),
    "of int32": lambda x: x.to(torch.int32),
    "complex": lambda x: x.to(torch.complex64),
    "boolean": lambda x: x > 0,
    "fp8": lambda x: x.float().to(torch.float8_e4m3fn),
    "far out": lambda x: torch.full_like(x, 2**40) if x.dtype == torch.int64 else x,
    "negative": lambda x: torch.full_like(x, -7) if x.dtype == torch.int64 else x,
}


def _normal(draw: random.Random, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw.randrange(2**30)))


def head_losses(draw: random.Random) -> Case:
    rows, width, vocabulary = draw.choice((0, 1, 2, 7, 33)), draw.choice((0, 1, 3, 16, 40)), draw.choice((1, 2, 15, 17, 130, 1029))
    backend = draw.choice(BACKENDS)
    dtype = draw.choice(DTYPES if width else EXACT)
    other = draw.choice((dtype, dtype, *DTYPES))
    given = {"hidden": _normal(draw, rows, width).to(dtype), "weight": _normal(draw, vocabulary, width).to(other)}
    if draw.random() < 0.5:
        given["bias"] = _normal(draw, vocabulary).to(draw.choice((dtype, torch.float32)))
    given["targets"] = torch.tensor([draw.choice((IGNORE, draw.randrange(vocabulary))) for _ in range(rows)], dtype=torch.int64)
    layouts = {name: draw.choice(list(LAYOUTS)) for name in given}
    given = {name: LAYOUTS[layouts[name]](x) for name, x in given.items()}
    scale, softcap = draw.choice((1.0, 1.0, 0.3, -2.0, 0.0, 1e20, float("nan"))), draw.choice((0.0, 0.0, 3.0, -1.0, 1e-42))
    wrong, how = (draw.choice(list(given)), draw.choice(list(WRONG))) if draw.random() < 0.4 else (None, None)
    if backend == "triton" and how in ("far out", "negative"):  # of which the host hears nothing
        wrong = None
    if wrong:
        given[wrong] = WRONG[how](given[wrong])
    head = Projection(given["weight"], given.get("bias"), scale, softcap)
    way = draw.choice(("gradient", "gradient", "losses", "predictions", "divergence"))
    hidden, targets = given["hidden"], given["targets"]

    def call() -> list[Tensor]:
        if way == "predictions":
            return [linear_predictions(hidden, head, targets)[0].double()]
        if way == "divergence":
            return [linear_divergence(torch.stack([hidden, hidden]), head, targets).losses[1].double()]
        if way == "losses" or not hidden.is_floating_point():
            return [linear_cross_entropy(hidden, head, targets).double()]
        h = hidden.detach().requires_grad_()
        losses = linear_cross_entropy(h, head, targets)
        return [losses.detach().double(), torch.autograd.grad(losses.sum(), h)[0].double()]

    def expected() -> list[Tensor]:
        h = hidden.double().requires_grad_()
        z = functional.linear(h, head.weight.double(), None if head.bias is None else head.bias.double()) * scale
        z = torch.tanh(z / softcap) * softcap if softcap else z
        losses = functional.cross_entropy(z.flatten(0, -2) if z.ndim > 1 else z, targets.flatten(), reduction="none", ignore_index=IGNORE)
        found = [losses.detach().view(targets.shape)]
        return found if way != "gradient" else [*found, torch.autograd.grad(losses.sum(), h)[0]]

    sound = scale == scale and softcap in (0.0, 3.0)
    exact = all(x.dtype in EXACT for name, x in given.items() if name != "targets")
    large = abs(scale) > 1e10  # losses of 1e20 in fp32
    shapes = {name: (tuple(x.shape), str(x.dtype)[6:], layouts[name]) for name, x in given.items()}
    return Case(
        f"{way} by {backend} of {shapes}, scale {scale}, softcap {softcap}, {wrong} {how}",
        call,
        expected,
        valid=wrong is None and sound,
        finite=not large,
        rtol=1e-4 if exact and not large else 2e-2,
        atol=(1e-4 if exact else 5e-2) * max(1.0, abs(scale) if sound else 1.0),
        backend=backend,
    )


def gradient_sums(draw: random.Random) -> Case:
    shape = draw.choice(((0, 5), (1,), (7,), (9, 70), (4, 1100), (3, 5, 7), (2, 3, 4, 5), ()))
    backend, dim = draw.choice(BACKENDS), draw.choice((0, -1, 0, -1, 1, 2, 5))
    given = [_normal(draw, *shape).to(draw.choice(DTYPES)) for _ in range(2)]
    layouts = [draw.choice(list(LAYOUTS)) if shape else "plain" for _ in given]
    given = [LAYOUTS[layout](x) for layout, x in zip(layouts, given, strict=True)]
    wrong, how = (draw.randrange(2), draw.choice(list(WRONG))) if draw.random() < 0.4 and shape else (None, None)
    if wrong is not None:
        given[wrong] = WRONG[how](given[wrong])

    def expected() -> list[Tensor]:
        theta, g = (x.double().movedim(dim, 0).reshape(x.shape[dim], x.numel() // max(x.shape[dim], 1)) for x in given)
        if given[0].shape != given[1].shape:
            raise ValueError("two shapes")
        return [(g * g).sum(1).float(), (theta * g).abs().sum(1).float(), (theta * g).sum(1).float()]

    described = [(tuple(x.shape), str(x.dtype)[6:], layout) for x, layout in zip(given, layouts, strict=True)]
    return Case(
        f"sums by {backend} of {described} along {dim}, {wrong} {how}",
        lambda: sums_op.gradient_sums(*given, dim),
        expected,
        valid=wrong is None and -len(shape) <= dim < len(shape),
        rtol=1e-4,
        atol=1e-3,
        backend=backend,
    )


def hooked_gradients(draw: random.Random) -> Case:
    """A parameter that is given other data while hooks on it take its gradients."""
    shape, backend, running = draw.choice(((1,), (7,), (9, 70), (3, 5, 7))), draw.choice(BACKENDS), draw.random() < 0.5
    value, other = _normal(draw, *shape), draw.choice(("as it was", *WRONG))

    def call() -> list[Tensor]:
        parameter = nn.Parameter(value.clone())
        with sums_op.GradientSums({"weight": parameter}, {"weight": [0]}, not running, running) as sums:
            sums.backward((parameter * parameter).sum())
            if other != "as it was":
                parameter.data = WRONG[other](value)
            sums.backward((parameter * parameter).sum())
            found, _ = sums.read(1)["weight", 0]
        return [found]

    def expected() -> list[Tensor]:
        g, theta = 2 * value.double().flatten(1) if len(shape) > 1 else 2 * value.double()[:, None], value.double()
        theta = theta.flatten(1) if len(shape) > 1 else theta[:, None]
        kinds = [(g * g).sum(1)] if running else [(g * g).sum(1), (theta * g).abs().sum(1), (theta * g).sum(1)]
        return [2 * torch.stack(kinds)]

    same = other in ("as it was", "far out", "negative")
    described = f"gradients of {shape} by {backend}, running {running}, then {other}"
    return Case(described, call, expected if same else None, valid=same, rtol=1e-4, atol=1e-3, backend=backend)


FAMILIES = (head_losses, gradient_sums, hooked_gradients)
