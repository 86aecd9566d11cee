"""Compute losses and gradients of a model in training without changing its modes, gradients or random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from adept_fast.errors import InputError
from adept_fast.models.decoder_layers import evaluating


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
    """Within the context, put the model in eval mode, but keep checkpointing activations as in training."""
    modes = [(module, module.training) for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    with evaluating(model):
        for module, mode in modes:  # transformers checkpoints in training mode only; a layer's own flag enables no dropout
            module.training = mode
        yield


@contextmanager
def only_these_require_grad(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the context, let only these parameters require grad, with all .grad None, in eval mode and with the RNG forked."""
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
