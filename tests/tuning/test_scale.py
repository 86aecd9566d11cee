"""The memory arithmetic of docs/how-to/several-gpus.md: measured on a tiny Llama, computed for an 8B model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from adept_fast.expansion.expand_model import expand_model, freeze_original
from adept_fast.runtime.dtensor import is_sharded
from adept_fast.tuning.adept_trainer import AdeptTrainer
from adept_fast.tuning.fast_step import fast_step
from tests.support import tiny_models
from tests.support.sharded_worker import in_processes, whole
from tests.support.training_worker import Fsdp2Trainer, as_launched, trained

SCALE = (Path(__file__).parents[2] / "docs" / "how-to" / "several-gpus.md").read_text()


def frozen_layer(h: int, m: int, k: int, a: int) -> int:
    """Bytes kept for backward, per token."""
    return 12 * h + 6 * m + 4 * k + 4 * a + 8


def copy(h: int, m: int, k: int, a: int) -> int:
    return 20 * h + 8 * m + 4 * k + 4 * a + 8


def kept(shape: dict, layers: int, copies: list[int], tokens: int = 64, checkpointing: bool = False) -> float:
    """Bytes per token that a step keeps between forward and backward, beside parameters."""
    model = expand_model(tiny_models.model(dtype=torch.bfloat16, num_hidden_layers=layers, **shape), copies)
    freeze_original(model)
    model.config.use_cache = False
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids, positions = torch.arange(2 * tokens).view(2, -1) % 200, torch.arange(tokens).expand(2, -1)
    with fast_step(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, position_ids=positions)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values()) / ids.numel()


@pytest.mark.slow
@pytest.mark.parametrize(("h", "m", "a", "groups"), [(32, 48, 4, 2), (64, 112, 8, 2)])
def test_activations_kept_for_backward(h: int, m: int, a: int, groups: int) -> None:
    shape = {"hidden_size": h, "intermediate_size": m, "num_attention_heads": a, "num_key_value_heads": groups}
    sizes = h, m, h // a * groups, a
    base = kept(shape, 4, [2])
    assert kept(shape, 6, [2]) - base == 2 * frozen_layer(*sizes)
    assert kept(shape, 4, [2, 3]) - base == copy(*sizes)
    assert kept(shape, 8, [6]) == base, "layers below the lowest copy keep something"
    assert kept(shape, 6, [2], checkpointing=True) - kept(shape, 5, [2], checkpointing=True) == 2 * h


class Footprint(TrainerCallback):
    """Bytes of parameters and gradients just before a step, and of the optimizer's states after it."""

    def __init__(self) -> None:
        self.weights = self.gradients = self.states = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        parameters = [*model.parameters()]
        self.weights = sum(map(here, parameters))
        self.gradients = sum(here(parameter.grad) for parameter in parameters if parameter.grad is not None)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs) -> None:
        states = optimizer.optimizer.state.values()
        self.states = sum(here(tensor) for state in states for key, tensor in state.items() if key != "step")


def here(tensor: Tensor) -> int:
    """Bytes of a tensor that this process holds."""
    tensor = tensor._local_tensor if is_sharded(tensor) else tensor
    return tensor.numel() * tensor.element_size()


def measured(folder: Path, engine: type[AdeptTrainer]) -> tuple[Footprint, int, int]:
    """(bytes, P, C) of two steps in bf16."""
    footprint = Footprint()
    trainer, _ = trained(folder, engine, "neuron", dtype=torch.bfloat16, callbacks=[footprint], max_steps=2, save_strategy="no")
    sizes = [(whole(parameter).numel(), parameter.requires_grad) for parameter in trainer.model.parameters()]
    return footprint, sum(size for size, _ in sizes), sum(size for size, copied in sizes if copied)


@pytest.mark.slow
def test_weights_gradients_and_states_of_one_process(tmp_path: Path) -> None:
    found, parameters, copied = measured(tmp_path, AdeptTrainer)
    assert (found.weights, found.gradients, found.states) == (2 * parameters, 2 * copied, 10 * copied)


def halves(folder: Path) -> None:
    as_launched()
    found, parameters, copied = measured(folder, Fsdp2Trainer)
    expected = torch.tensor([2 * parameters, 2 * copied, 10 * copied])
    mine = torch.tensor([found.weights, found.gradients, found.states])
    dist.all_reduce(both := mine.clone())
    assert torch.equal(both, expected) and torch.equal(mine * 2, expected), (mine, expected)


def test_fsdp2_halves_them_on_two_processes(tmp_path: Path) -> None:
    in_processes(2, tmp_path, halves, tmp_path)


def test_the_figures_of_an_8b_model() -> None:
    h, m, k, a, layers, vocabulary = 4096, 14336, 1024, 32, 32, 128256
    layer = 2 * h * h + 2 * h * k + 3 * h * m + 2 * h
    copied = 4 * layer
    parameters = (layers + 4) * layer + 2 * vocabulary * h + h
    tokens, frozen = 4 * 1024, 17
    activations = tokens * (frozen * frozen_layer(h, m, k, a) + 4 * copy(h, m, k, a))
    rows = {
        "weights | 2 P / N": (2 * parameters, 2 * parameters / 8),
        "gradients of the copies | 2 C / N": (2 * copied, 2 * copied / 8),
        "moments (fp32) and masters | 10 C / N": (10 * copied, 10 * copied / 8),
        "together |": (2 * parameters + 14 * copied, (2 * parameters + 12 * copied) / 8),
        "at a refresh, instead of activations | 4 C / N and one parameter's gradient": (4 * copied, 4 * copied / 8),
        "activations of 4 x 1024 tokens, 17 frozen layers and 4 copies |": (activations, activations),
        "the same with gradient checkpointing | 2 h per token and layer, one layer recomputed": (2 * h * tokens * 21,) * 2,
    }
    for row, (ddp, fsdp) in rows.items():
        assert f"| {row} | {ddp / 1e9:.1f} GB | {fsdp / 1e9:.1f} GB |" in SCALE, (row, ddp / 1e9, fsdp / 1e9)
    assert f"gathers two layers at a time ({4 * layer / 1e9:.1f} GB)" in SCALE
