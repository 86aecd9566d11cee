"""Mean over sequences of the sums that GradientSums takes of each sequence's own gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from adept_fast.data.items import Item
from adept_fast.models.gradient_scope import only_these_require_grad
from adept_fast.models.losses import batch_loss
from adept_fast.ops.gradient_sums.op import Dims, GradientSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sequence_sums(
    model: PreTrainedModel, items: Sequence[Item], dims: Mapping[str, Sequence[Dims]], batch: int = 1
) -> dict[tuple[str, Dims], Tensor]:
    """(name, dim) -> means of sum g^2, sum |theta g| and sum theta g over batches of as many items, fp32 [3, indices]."""
    parameters = {name: model.get_parameter(name) for name in dims}
    batches = [items[at : at + batch] for at in range(0, len(items), batch)]
    with only_these_require_grad(model, parameters.values()), GradientSums(parameters, dims, products=True, running=False) as sums:
        for each in batches:
            sums.backward(batch_loss(model, each))
        return {key: (found / len(batches)).float() for key, (found, _) in sums.read(1).items()}
