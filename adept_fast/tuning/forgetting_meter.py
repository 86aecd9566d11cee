"""The forgetting meter: measure how much general loss rose since the last reading, and predict that to first order, unit by unit.

    predicted(U) = g_U . (theta_U - theta'_U)        bound(U) = |g_U| |theta_U - theta'_U|        measured = loss(theta) - loss(theta')

theta' are the copies at the last reading. g is the gradient there of the token-weighted mean loss of the meter's items, nats per token.
Source: the first-order analysis of forgetting in ADEPT (arXiv 2510.10071); the bound is the Cauchy-Schwarz inequality of each unit.
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
from adept_fast.runtime.input_files import as_input_error, regular
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
    """One measurement, in nats per token.

    loss: the mean loss. rise: the loss minus that of the first reading. predicted, bound: of the rise since the last reading, fp64 [units];
    None at the first one.
    """

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
    """Measures forgetting on `items`, general text that neither trains nor sets rates.

    limit: the rise of the loss, nats per token, above which it acts: action "stop" ends training, "cut" halves all unit rates at each
    reading above it. Between readings the last gradient (fp32) and the last copies (their dtype) stay in host memory and in checkpoints.
    Raises InputError for items without a supervised token, and for a wrong limit or action.
    """

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
        """The factor for all unit rates."""
        return self._state.scale

    @property
    def stopped(self) -> bool:
        return self._state.stopped

    def reset(self) -> None:
        """Forget all readings: the next one is the first of a run."""
        self._state, self._before = _State(), {}

    def snapshot(self) -> tuple[_State, dict[str, Tensor]]:
        """Return the readings so far, for `restore`."""
        return replace(self._state), dict(self._before)

    def restore(self, snapshot: tuple[_State, dict[str, Tensor]]) -> None:
        self._state, self._before = snapshot

    @torch.no_grad()
    def read(self, model: PreTrainedModel, units: Units) -> Reading:
        """Measure, compare with the last reading, and store this one. .grad, RNG and training mode stay as they were.

        Processes that hold the same model (DDP) share the items; those of a sharded one (FSDP2) each run all of them.
        """
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
        """Return the mean loss and its gradient, fp32, for this process's shard of each parameter."""
        parameters = {name: model.get_parameter(name) for name in units.slices}
        tokens, total = sum(item.supervised for item in self.items), torch.zeros((), dtype=torch.float64)
        share = not in_shards(model)
        items = distributed.share(self.items) if share else self.items
        sums = {name: torch.zeros_like(local(parameter.detach()), dtype=torch.float32) for name, parameter in parameters.items()}
        with only_these_require_grad(model, parameters.values()), Progress(items, desc="forgetting meter", unit="item") as bar:
            for item in bar:
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
        """Write the readings, unsharded, to a checkpoint's folder that lacks them. Every process of a sharded run must call this."""
        path = folder / FILE
        if not self._before or path.exists():
            return
        tensors = {}
        for key, part in self._before.items():
            tensor = whole(part, model.get_parameter(key.partition(".")[2]))
            if distributed.rank() == 0:
                tensors[key] = tensor.contiguous()
        if tensors:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path, metadata={"state": dumps(asdict(self._state))})

    def load(self, folder: Path, model: PreTrainedModel) -> None:
        """Read what `save` wrote; of a sharded parameter this process's shard."""
        path = folder / FILE
        if not path.is_file():
            return
        with as_input_error(path, "delete the checkpoint to start again"), safe_open(regular(path), "pt") as file:
            self._state = _State(**json.loads(file.metadata()["state"]))
            for key in file.keys():
                shard = shard_of(model.get_parameter(key.partition(".")[2]))
                held = () if shard is None else tuple(slice(first, first + count) for first, count in shard.held)
                self._before[key] = file.get_tensor(key)[held].clone()


def stopped_in(folder: Path) -> bool:
    """Return whether the run that wrote this checkpoint stopped there because general loss had passed its limit."""
    path = folder / FILE
    if not path.is_file():
        return False
    with as_input_error(path, "delete the checkpoint to start again"), safe_open(regular(path), "pt") as file:
        return bool(json.loads(file.metadata()["state"])["stopped"])
