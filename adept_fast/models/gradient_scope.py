"""Losses and gradients of a model in training, of which nothing is touched: modes, gradients, random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from adept_fast.errors import InputError
from adept_fast.models import evaluating


def _refuse_reentrant(model: nn.Module) -> None:
    for name, module in model.named_modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise InputError(
                f"{name}: reentrant activation checkpointing hands gradients on in parts: importances need "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """For the time being; activations stay checkpointed where they are in training."""
    modes = [(module, module.training) for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    with evaluating(model):
        for module, mode in modes:  # transformers checkpoints activations in training mode only; a layer's own flag switches no dropout on
            module.training = mode
        yield


@contextmanager
def only_these_require_grad(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """For the time being, without gradients of their own, in eval mode and with the RNG forked: nothing of a training run is touched."""
    _refuse_reentrant(model)
    wanted = {id(parameter) for parameter in parameters}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    devices = {parameter.device for parameter, _, _ in before if parameter.device.type == "cuda"}
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        with in_eval_mode(model), torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
