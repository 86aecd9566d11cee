"""Checkpoints of a sharded (FSDP2) run: trained parameters, optimizer state and unit rates, through torch.distributed.checkpoint.

Each process writes its own shards. Any number of processes can read them, also a single one without FSDP.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from adept_fast.errors import InputError
from adept_fast.runtime.dtensor import is_sharded

if TYPE_CHECKING:
    from torch import nn

    from adept_fast.optim import AdamW

FOLDER = "sharded"
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def save(model: nn.Module, optimizer: AdamW, folder: Path) -> None:
    """Write folder/sharded. Every process of the run must call this."""
    dcp.save({**_copies(model), **_moments(model, optimizer)}, checkpoint_id=folder / FOLDER)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Read the trained parameters back. Raises InputError for a checkpoint of other parameters."""
    state = _read(_copies(model), folder)
    set_model_state_dict(model, state["copies"], options=TRAINED)


def load_optimizer(model: nn.Module, optimizer: AdamW, folder: Path) -> None:
    """Read moments and unit rates back. The optimizer needs rates of the saved shapes, of any value. Raises InputError for other units."""
    state = _read(_moments(model, optimizer), folder)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=TRAINED)


def _copies(model: nn.Module) -> dict[str, Any]:
    return {"copies": get_model_state_dict(model, options=TRAINED)}


def _moments(model: nn.Module, optimizer: AdamW) -> dict[str, Any]:
    return {"optimizer": get_optimizer_state_dict(model, optimizer, options=TRAINED)}


def _read(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        dcp.load(state, checkpoint_id=folder / FOLDER)
    except dcp.api.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise InputError(
            f"{folder / FOLDER}: does not fit this model and its units ({reason}): delete the checkpoint to start again"
        ) from None
    return state


@torch.no_grad()
def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Gather the trained parameters on the host, unsharded: name -> tensor. Every process must call this."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = (parameter.full_tensor() if is_sharded(parameter) else parameter).detach().cpu()
    return found
