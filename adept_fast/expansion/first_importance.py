"""Measure the importances for the first unit rates on the copied layers, before training.

Every |theta g| of a silent copy is 0: where theta is not 0, the gradient is. So the layer that was copied is measured in its place. The
checkpoint stores its sums along each dimension, from which the importances of units of any granularity are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from adept_fast.checkpoints.adept_config import record_of
from adept_fast.data.items import Item
from adept_fast.errors import InputError
from adept_fast.models.decoder_layers import layers_path
from adept_fast.ops.gradient_sums.op import Dims
from adept_fast.scoring.unit_importance import Sums, parameter_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "adept_first_importance.safetensors"


def first_importance(model: PreTrainedModel, items: Sequence[Item], share: bool = False) -> dict[tuple[str, Dims], Sums]:
    """Sum |theta g| and g^2 over the layers that a freshly expanded model copied, and return them under their copies' parameter names.

    Returns (name, dim) -> Sums. share: as in `adept_fast.scoring.unit_importance.parameter_sums`.
    """
    record, path = record_of(model), layers_path(model)
    dims: dict[str, list[Dims]] = {}
    copy_name: dict[str, str] = {}
    for entry in (entry for entry in record.inserted if entry.layer in record.trained):
        original = f"{path}.{record.original(entry.copied_from)}"
        for name, parameter in model.get_submodule(original).named_parameters():
            source = f"{original}.{name}"
            copy_name[source] = f"{path}.{entry.layer}.{name}"
            dims[source] = [*range(parameter.ndim), *([(0, 1)] if parameter.ndim == 3 else [])]
    sums = parameter_sums(model, items, dims, "first importances", share)
    return {(copy_name[name], dim): entry for (name, dim), entry in sums.items()}


def as_tensors(sums: dict[tuple[str, Dims], Sums]) -> dict[str, Tensor]:
    """Name the sums for safetensors: "name|dim|abs_taylor" and "name|dim|fisher", where dim is "0", or "0,1" for two dimensions."""
    return {
        f"{name}|{dim if isinstance(dim, int) else ','.join(map(str, dim))}|{kind}": tensor
        for (name, dim), entry in sums.items()
        for kind, tensor in (("abs_taylor", entry.abs_taylor), ("fisher", entry.fisher))
    }


def load_first_importance(folder: Path) -> dict[tuple[str, Dims], Sums]:
    """Read the sums that `expand_checkpoint` stored. Raises InputError when they are missing or malformed."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{path}: missing: expand the model again")
    try:
        tensors = load_file(path)
        keys = {tuple(key.split("|")[:2]) for key in tensors}
        return {(name, _dims(dim)): Sums(tensors[f"{name}|{dim}|abs_taylor"], tensors[f"{name}|{dim}|fisher"]) for name, dim in keys}
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path}: corrupt ({error}): expand the model again") from None


def _dims(text: str) -> Dims:
    first, _, second = text.partition(",")
    return (int(first), int(second)) if second else int(first)
