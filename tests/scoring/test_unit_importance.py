"""Sums of gradients from hooks: the formulas in fp64, and whatever could break hooks leaves nothing wrong and nothing behind."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from adept_fast.data.items import Item
from adept_fast.errors import InputError
from adept_fast.models.gradient_scope import only_these_require_grad
from adept_fast.ops import dispatch
from adept_fast.ops.gradient_sums import op, reference
from adept_fast.ops.gradient_sums.op import GradientSums, gradient_sums
from adept_fast.scoring.unit_importance import parameter_sums
from bench.measure import allocated
from tests.support import tiny_models
from tests.support.sequence_sums import sequence_sums
from tests.support.sharded_worker import in_processes

BACKENDS = [name for name in ("cpu", "torch") if dispatch.status()[name].found]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(7, 1203), (300, 40), (129, 2050), (67,), (1,), (3, 5, 7), (2, 3, 4, 5), (0, 5), (4, 0)]
Found = dict[tuple[str, int], Tensor]


def truths(parameter: Tensor, gradient: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    theta, g = (x.double().movedim(dim, 0).reshape(x.shape[dim], -1 if x.numel() else 0) for x in (parameter, gradient))
    return (g * g).sum(1), (theta * g).abs().sum(1), (theta * g).sum(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("param_dtype", "grad_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=lambda dtype: str(dtype)[6:])
def test_native_sums(monkeypatch: pytest.MonkeyPatch, param_dtype: torch.dtype, grad_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Added to what stands there, to fp32's roundings of fp64's sums; the bits are the same on every instruction set and thread count."""
    native, cpu = pytest.importorskip("adept_fast._C"), pytest.importorskip("adept_fast.ops.gradient_sums.cpu")
    generator = torch.Generator().manual_seed(len(shape))
    parameter, gradient = (torch.randn(shape, generator=generator).to(dtype) * 3 for dtype in (param_dtype, grad_dtype))
    if len(shape) == 2:
        gradient = gradient.mT.contiguous().mT
    results: list[list[Tensor]] = []
    for instructions, threads in itertools.product(native.features()["instruction_sets"], (1, 3)):
        monkeypatch.setattr(cpu, "INSTRUCTIONS", instructions)
        monkeypatch.setattr(cpu, "THREADS", threads)
        sums = {dim: torch.full((3, size), 0.5, dtype=torch.float64) for dim, size in enumerate(shape)}
        squares = {dim: torch.full((1, size), 0.5, dtype=torch.float64) for dim, size in enumerate(shape)}
        running = torch.ones(shape)
        cpu.NativeGradientSums(sums, shape, None).add(parameter, gradient)
        cpu.NativeGradientSums(squares, shape, running).add(parameter, gradient)
        assert torch.equal(running, 1 + gradient.float())
        assert all(torch.equal(squares[dim][0], sums[dim][0]) for dim in sums)
        results.append([*sums.values()])
    for dim, found in enumerate(results[0]):
        exact = truths(parameter, gradient, dim)
        for value, truth, terms in zip(found - 0.5, exact, (exact[0], exact[1], exact[1]), strict=True):
            assert bool(((value - truth).abs() <= 1e-6 * terms).all())
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_one_dimension_by_every_backend(monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, ...]) -> None:
    monkeypatch.setenv("ADEPT_FAST_BACKEND", name)
    parameter, gradient = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).unbind(0)
    for dim in (*range(len(shape)), -1):
        exact = truths(parameter, gradient, dim)
        for value, truth, terms in zip(gradient_sums(parameter, gradient, dim), exact, (exact[0], exact[1], exact[1]), strict=True):
            assert value.dtype == torch.float32 and bool(((value.double() - truth).abs() <= 1e-5 * terms + 1e-30).all())


def dims_of(model: nn.Module, only: str = "") -> dict[str, list[int]]:
    return {name: list(range(parameter.ndim)) for name, parameter in model.named_parameters() if only in name}


def gradients_one_by_one(model: nn.Module, items: list, names: list[str]) -> list[dict[str, Tensor]]:
    """By torch.func, of each sequence's summed loss in fp64."""
    model = model.double()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters() if name in names}

    def loss(parameters: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, parameters, (ids[None],), {"use_cache": False}).logits[0, :-1]
        return functional.cross_entropy(logits, labels[1:], reduction="sum")

    return [torch.func.grad(loss)(parameters, torch.tensor(item.input_ids), torch.tensor(item.labels)) for item in items]


def plain_loss(model: nn.Module, item: Item) -> Tensor:
    logits = model(torch.tensor([item.input_ids]), use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits, torch.tensor(item.labels[1:]), reduction="sum")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_fisher_is_the_mean_of_squared_sequence_gradients(monkeypatch: pytest.MonkeyPatch, name: str, tied: bool) -> None:
    monkeypatch.setenv("ADEPT_FAST_BACKEND", name)
    make = {"tie_word_embeddings": tied}
    items, model = tiny_models.items(4), tiny_models.model(**make)
    dims = dims_of(model)
    assert tied != ("lm_head.weight" in dims)
    exact = gradients_one_by_one(tiny_models.model(**make), items, list(dims))
    single = [
        dict(zip(dims, torch.autograd.grad(plain_loss(model, item), [model.get_parameter(key) for key in dims]), strict=True))
        for item in items
    ]
    parameters = {key: parameter.detach() for key, parameter in tiny_models.model(**make).named_parameters()}
    found, corpus = sequence_sums(model, items, dims), parameter_sums(model, items, dims)
    again = sequence_sums(model, items, dims)
    tokens = sum(item.supervised for item in items)
    for key, dim in found:
        means, theirs = (
            [torch.stack([truths(parameters[key], g[key], dim)[kind] for g in gradients]).mean(0) for kind in range(3)]
            for gradients in (exact, single)
        )
        total, their_total = (
            truths(parameters[key], sum(g[key].double() for g in gradients) / tokens, dim)[1] for gradients in (exact, single)
        )
        terms = means[1] * len(items) / tokens
        for value, truth, their, scale in [
            (found[key, dim][0], means[0], theirs[0], means[0]),
            (found[key, dim][1], means[1], theirs[1], means[1]),
            (found[key, dim][2], means[2], theirs[2], means[1]),
            (corpus[key, dim].fisher, means[0], theirs[0], means[0]),
            (corpus[key, dim].abs_taylor, total, their_total, terms),
        ]:
            error = (value.double() - truth).abs()
            assert float(error.sum()) <= 1e-5 * float(scale.sum()), (key, dim)
            # Index by index, a gradient in fp32 is itself up to 2e-5 away from fp64.
            assert bool(((value.double() - their).abs() <= 2e-6 * scale).all()), (key, dim)
        assert torch.equal(again[key, dim], found[key, dim])


def test_squares_of_batches_are_another_quantity() -> None:
    model, items = tiny_models.model(), tiny_models.items(4)
    dims = dims_of(model, "layers.1.mlp")
    exact = gradients_one_by_one(tiny_models.model(), items, list(dims))
    found = sequence_sums(model, items, dims, batch=2)
    single = sequence_sums(model, items, dims)
    for key, dim in found:
        pairs = [exact[0][key] + exact[1][key], exact[2][key] + exact[3][key]]
        truth = sum(truths(g, g, dim)[0] for g in pairs) / 2
        assert bool(((found[key, dim][0] - truth).abs() <= 1e-5 * truth).all())
        assert not torch.allclose(found[key, dim][0], 2 * single[key, dim][0], rtol=1e-3)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(12)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def test_gradient_memory_is_that_of_the_largest_parameter() -> None:
    net, x, one = Deep(), torch.randn(2, 1024), 1024 * 1024 * 4
    dims = {name: [0] for name, _ in net.named_parameters()}

    def hooked() -> None:
        with only_these_require_grad(net, net.parameters()), GradientSums(dict(net.named_parameters()), dims, True, False) as sums:
            sums.backward(net(x))

    assert allocated(lambda: net(x).backward()) >= 12 * one
    net.zero_grad()
    assert one <= allocated(hooked) <= 1.25 * one  # with the gradients of activations, and the sums


def state_of(model: nn.Module) -> list:
    return [(p.requires_grad, p.grad, len(p._post_accumulate_grad_hooks or ())) for p in model.parameters()] + [
        module.training for module in model.modules()
    ]


def test_gradients_of_an_accumulating_step_are_put_back_and_an_exception_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = tiny_models.model().train(), tiny_models.items(3)
    dims = dims_of(model, "layers.2")
    expected = sequence_sums(model, items, dims)
    model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    before, kept = state_of(model), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    rng = torch.get_rng_state()
    found = sequence_sums(model, items, dims)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    calls = itertools.count()
    take = op._ParameterSums.take

    def failing(*arguments: object) -> None:
        if next(calls) == 5:
            raise RuntimeError("the device is lost")
        take(*arguments)

    monkeypatch.setattr(op._ParameterSums, "take", failing)
    with pytest.raises(RuntimeError, match="the device is lost"):
        sequence_sums(model, items, dims)
    after = state_of(model)
    assert all(a == b if isinstance(b, bool) else (a[0], a[2]) == (b[0], b[2]) and a[1] is b[1] for a, b in zip(after, before, strict=True))
    assert all(map(torch.equal, kept, (p.grad for p in model.parameters() if p.grad is not None)))
    assert torch.equal(rng, torch.get_rng_state())


def test_reentrant_checkpointing_is_refused_and_the_other_changes_nothing() -> None:
    model, items = tiny_models.model().train(), tiny_models.items(2)
    dims = dims_of(model, "layers.2")
    expected = sequence_sums(model, items, dims)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = sequence_sums(model, items, dims)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(InputError, match="reentrant activation checkpointing .*use_reentrant"):
        sequence_sums(model, items, dims)


def test_a_gradient_that_comes_in_parts_is_refused() -> None:
    """As reentrant checkpointing of two blocks that share a weight hands it on."""
    from torch.utils.checkpoint import checkpoint

    layer, x = nn.Linear(5, 5), torch.randn(2, 5, requires_grad=True)
    sums = GradientSums({"weight": layer.weight}, {"weight": [0]}, products=True, running=False)
    with sums, pytest.raises(InputError, match="weight: .* in several parts"):
        sums.backward(checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True).sum())


def _expected() -> tuple[nn.Module, dict[str, list[int]], list, dict]:
    model, items = tiny_models.model(), tiny_models.items(3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    dims = dims_of(model, "layers.1")
    return model, dims, items, parameter_sums(model, items, dims)


def _sharded() -> None:
    model, dims, items, expected = _expected()
    wrapped = DistributedDataParallel(model)
    for probed in (wrapped, model):
        found = parameter_sums(probed, items, dims)
        assert all(torch.equal(found[key].fisher, expected[key].fisher) for key in expected)
    ids = torch.arange(9)[None] + 20 * dist.get_rank()
    wrapped(ids, labels=ids).loss.backward()  # still reduces
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    mean = weight.grad.clone()
    dist.all_reduce(mean)
    assert torch.equal(mean / 2, weight.grad) and bool(weight.grad.any())
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    found = parameter_sums(model, items, dims)
    for key, sums in expected.items():
        for kind in ("fisher", "abs_taylor"):
            values = getattr(sums, kind)
            assert float((getattr(found[key], kind) - values).abs().max()) <= 1e-5 * float(values.mean())
    _shared_out(model, items)
    _sharded_experts()


def _shared_out(sharded: nn.Module, items: list) -> None:
    """Three items over two processes; sharded models run them all."""
    model, dims, _, expected = _expected()
    for probed in (model, sharded):
        found = parameter_sums(probed, items, dims, share=True)
        for key, sums in expected.items():
            for kind in ("fisher", "abs_taylor"):
                values = getattr(sums, kind)
                assert float((getattr(found[key], kind) - values).abs().max()) <= 1e-5 * float(values.mean())


def _sharded_experts() -> None:
    """Five experts on two processes: sums by expert and row."""
    model, items, name = tiny_models.model("mixtral", num_local_experts=5), tiny_models.items(2), "model.layers.1.mlp.experts.gate_up_proj"
    dims = {name: (0, (0, 1))}
    expected = parameter_sums(model, items, dims)
    both = expected[name, (0, 1)].abs_taylor.view(5, -1)
    torch.testing.assert_close(both.sum(1), expected[name, 0].abs_taylor, rtol=1e-5, atol=0)
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    found = parameter_sums(model, items, dims)[name, (0, 1)].abs_taylor.view(5, -1)
    assert float((found - both).abs().max()) <= 1e-5 * float(both.mean())


def test_ddp_is_unwrapped_and_fsdp2_s_shards_are_put_together(tmp_path: Path) -> None:
    in_processes(2, tmp_path, _sharded)


def test_reference_needs_no_products() -> None:
    sums = {0: torch.zeros(1, 3, dtype=torch.float64)}
    gradient = torch.arange(6.0).view(3, 2)
    op._add(sums, gradient.double(), gradient.double(), None)
    assert torch.equal(sums[0][0], reference.gradient_sums(gradient, gradient, 0)[0].double())
