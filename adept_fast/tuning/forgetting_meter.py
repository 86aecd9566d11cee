"""The forgetting meter: how much general loss rose since the last reading, against what its gradient foretold, unit by unit.

    predicted(U) = g_U . (theta_U - theta'_U)        bound(U) = |g_U| |theta_U - theta'_U|        measured = loss(theta) - loss(theta')

theta' are the copies at the last reading and g the gradient there of the token-weighted mean loss of the meter's items, nats per token.
Source: the first-order analysis of forgetting in ADEPT (arXiv 2510.10071); the bound is Cauchy and Schwarz's, unit by unit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from adept_fast.data.items import Item
from adept_fast.errors import InputError
from adept_fast.models.finite import likely_cause, require_finite_tensors
from adept_fast.models.gradient_scope import only_these_require_grad
from adept_fast.models.losses import batch_loss
from adept_fast.ops.gradient_sums.op import whole_sums
from adept_fast.runtime import distributed
from adept_fast.runtime.dtensor import in_shards, local, shard_of, whole
from adept_fast.runtime.input_files import making_sense, regular
from adept_fast.runtime.progress import Progress
from adept_fast.runtime.strict_json import dumps
from adept_fast.scoring.units import Units
from adept_fast.settings.validation import check
from adept_fast.tuning.settings import Tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "adept_meter.safetensors"


@dataclass(frozen=True)
class Reading:
    """loss: nats per token; rise: since the first reading; predicted, bound: of the rise since the last one, fp64 [units], or None."""

    loss: float
    rise: float
    predicted: Tensor | None
    bound: Tensor | None


@dataclass
class _State:
    first: float | None = None
    scale: float = 1.0
    stopped: bool = False


class Meter:
    """items: general text that neither trains nor steers. limit: the rise of its loss, nats per token, that calls for action: "stop" ends
    training there, "cut" halves all unit rates at each reading above it. Between readings the gradient and the copies as they were (fp32
    and their own dtype) lie in host memory, and in checkpoints."""

    def __init__(self, items: Sequence[Item], limit: float | None = None, action: str = Tuning.general_action) -> None:
        self.items = [item for item in items if item.supervised]
        if not self.items:
            raise InputError("a forgetting meter needs items with a supervised token")
        check(Tuning, "general_", limit=limit, action=action)
        self.limit, self.action = limit, action
        self._state = _State()
        self._before: dict[str, Tensor] = {}  # "theta.NAME" and "gradient.NAME"

    @property
    def scale(self) -> float:
        """What unit rates are to be multiplied by."""
        return self._state.scale

    @property
    def stopped(self) -> bool:
        return self._state.stopped

    def restart(self) -> None:
        """Forget all readings: the next one is the first of a run."""
        self._state, self._before = _State(), {}

    def kept(self) -> tuple[_State, dict[str, Tensor]]:
        """Its readings so far, for `put_back`."""
        return replace(self._state), dict(self._before)

    def put_back(self, kept: tuple[_State, dict[str, Tensor]]) -> None:
        self._state, self._before = kept

    @torch.no_grad()
    def read(self, model: PreTrainedModel, units: Units) -> Reading:
        """Measure, compare with the last reading, and remember. Leaves .grad, RNG and training mode as they were. Processes that hold the
        same model (DDP) share the items out; of a sharded one (FSDP2) all run all of them."""
        loss, gradients = self._gradients(model, units)
        state = self._state
        state.first = loss if state.first is None else state.first
        predicted = bound = None
        if self._before:
            predicted, bound = self._predict(model, units)
        for name, gradient in gradients.items():
            self._before[f"gradient.{name}"] = gradient.cpu()
            self._before[f"theta.{name}"] = local(model.get_parameter(name).detach()).to("cpu", copy=True)
        rise = loss - state.first
        if self.limit is not None and rise > self.limit:
            if self.action == "stop":
                state.stopped = True
            else:
                state.scale /= 2
        return Reading(loss, rise, predicted, bound)

    def _gradients(self, model: PreTrainedModel, units: Units) -> tuple[float, dict[str, Tensor]]:
        """Mean loss and its gradient, fp32, of this process's part of each parameter."""
        parameters = {name: model.get_parameter(name) for name in units.slices}
        tokens, total = sum(item.supervised for item in self.items), torch.zeros((), dtype=torch.float64)
        share = not in_shards(model)
        items = distributed.share(self.items) if share else self.items
        sums = {name: torch.zeros_like(local(parameter.detach()), dtype=torch.float32) for name, parameter in parameters.items()}
        with only_these_require_grad(model, parameters.values()):
            for item in Progress(items, desc="forgetting meter", unit="item"):
                loss = batch_loss(model, [item])
                loss.backward()
                total += loss.detach().double().cpu()
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        if parameter.grad is not None:
                            sums[name] += local(parameter.grad, parameter)
                            parameter.grad = None
        if share:
            total = distributed.total(total)
            for name, gradient in sums.items():
                sums[name] = distributed.total(gradient)
        if not bool(total.isfinite()):
            raise InputError(f"the forgetting meter's loss is not finite: {likely_cause(model)}")
        require_finite_tensors(sums.items(), "the forgetting meter's gradient", "though its loss is finite: try float32")
        return float(total) / tokens, {name: gradient / tokens for name, gradient in sums.items()}

    def _predict(self, model: PreTrainedModel, units: Units) -> tuple[Tensor, Tensor]:
        found: list[dict[str, Tensor]] = [{}, {}, {}]
        for name, cut in units.slices.items():
            parameter = model.get_parameter(name)
            theta = local(parameter.detach()).double()
            gradient = self._before[f"gradient.{name}"].to(theta.device).double()
            change = theta - self._before[f"theta.{name}"].to(theta.device).double()
            kept = (cut.dims,) if isinstance(cut.dims, int) else cut.dims
            others = [dim + 1 for dim in range(theta.ndim) if dim not in kept]
            products = torch.stack([gradient * change, gradient.square(), change.square()])
            sums = (products.sum(others) if others else products).flatten(1)
            for kind, values in zip(found, whole_sums(sums, parameter, cut.dims), strict=True):
                kind[name] = values
        predicted, squares, changes = (units.gather(kind) for kind in found)
        return predicted, (squares * changes).sqrt()

    @torch.no_grad()
    def save(self, folder: Path, model: PreTrainedModel) -> None:
        """Into a checkpoint's folder, where it is not yet, so that a resumed run goes on with the same readings, on any number of
        processes. Every process of a sharded run must call this."""
        path = folder / FILE
        if not self._before or path.exists():
            return
        kept = {}
        for key, part in self._before.items():
            tensor = whole(part, model.get_parameter(key.partition(".")[2]))
            if distributed.rank() == 0:
                kept[key] = tensor.contiguous()
        if kept:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(kept, path, metadata={"state": dumps(asdict(self._state))})

    def load(self, folder: Path, model: PreTrainedModel) -> None:
        """What `save` wrote; of a sharded parameter its part."""
        path = folder / FILE
        if not path.is_file():
            return
        with making_sense(path, "delete the checkpoint to start again"), safe_open(regular(path), "pt") as file:
            self._state = _State(**json.loads(file.metadata()["state"]))
            for key in file.keys():
                shard = shard_of(model.get_parameter(key.partition(".")[2]))
                held = () if shard is None else tuple(slice(first, first + count) for first, count in shard.held)
                self._before[key] = file.get_tensor(key)[held].clone()


def stopped_in(folder: Path) -> bool:
    """Whether the run that wrote this checkpoint ended there because general loss had passed its limit."""
    path = folder / FILE
    if not path.is_file():
        return False
    with making_sense(path, "delete the checkpoint to start again"), safe_open(regular(path), "pt") as file:
        return bool(json.loads(file.metadata()["state"])["stopped"])
