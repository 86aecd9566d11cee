"""AdamW with one learning rate per unit, a drop-in for torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.ops.adamw.memory_order import Operands
from adept_fast.ops.adamw.op import launch, sum_of_squares
from adept_fast.ops.adamw.reference import clip_scale
from adept_fast.optim.arguments import (
    check_dtypes,
    check_hyperparameters,
    check_own_arguments,
    check_torch_arguments,
    checked_multipliers,
    checked_rates,
    checked_scale,
    refuse_sparse,
)  # fmt: skip
from adept_fast.optim.state import RATES, Settings, protect_from_cast, rates_into_state, restored, state_format, widen_sharded_remainders
from adept_fast.optim.update_collection import StepUpdates, UpdateCollector, backend_of, options_of, scalar
from adept_fast.runtime import dtensor

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

# torch 2.8's name, and the one that followed it.
_check_capture = getattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", None) or (
    torch.optim.Optimizer._cuda_graph_capture_health_check
)


class AdamW(torch.optim.Optimizer):
    r"""AdamW with a learning-rate multiplier per unit (row, column, expert, parameter), exact low-precision masters and fused clipping.

        m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
        w <- (1 - rate weight_decay) w          rate = lr * multiplier
        w <- w - rate / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Drop-in for torch.optim.AdamW: same arguments, defaults, errors, closures, hooks, schedulers and state dict, which loads from and
    into torch's in mid-run. Arithmetic is fp32 (fp64 for fp64 parameters), each operation rounded once, in the same order by every
    backend: they give the same bits. Results are rounded to the dtypes kept. DTensor parameters are updated shard by shard.

    Arguments beyond torch's:
        state_dtype: dtype of exp_avg, exp_avg_sq and max_exp_avg_sq; None = the parameter's. Complex parameters keep theirs.
        master_weights: what bf16 and fp16 parameters are updated through, so that small steps are not lost (bytes per parameter):
            None          the parameter alone (0); steps below 2^-9 of a bf16 weight vanish
            "copy"        fp32 master, state key `master` (4); re-syncs where the parameter no longer equals the rounded master
            "remainder"   bf16 only: the lower half of an exact fp32 master, int16, state key `remainder` (2); ties round away from zero
            "kahan"       rounding error in the parameter's dtype, state key `compensation` (2): about 16 bits of mantissa
            "stochastic"  bf16 only: unbiased rounding keyed by position, step and element (0); reproducible
            "remainder" and "kahan" are reset when the parameter's version counter shows an in-place edit since the last step; an edit
            through `.data` shows no such sign and keeps them, at most half a unit in the last place. fp32 parameters need no master.
        max_grad_norm: clip the 2-norm of all gradients of this optimizer, as torch.nn.utils.clip_grad_norm_ but leaving `.grad` as it is.
        backend: "cuda", "triton", "cpu" or "torch"; None chooses per device.
    The state is 2 (3 with amsgrad) tensors of the parameter's shape in state_dtype, the master, and `step` (fp32, 0-d).

    Of torch's keywords, foreach and fused choose nothing here; fused, capturable, and backends "cuda" and "triton" keep `step` on the
    parameter's device, where lr and betas given as tensors are read too; differentiable=True takes the plain path. GradScaler's
    grad_scale and found_inf are applied inside; a step with infinities changes nothing and is not counted.

    Raises InputError (a ValueError) for arguments out of range and unknown backends; at a step for gradients, moments, masters or steps
    that do not have the shape, device or memory of their parameter, naming group and position, and for lr, betas, eps or weight_decay
    that were set out of range since. RuntimeError for a forced backend that is not available and for sparse gradients.

    Example: the first 64 rows at half the rate, the next 64 frozen, the rest at the full one
        >>> opt = AdamW(model.parameters(), lr=2e-4, weight_decay=0.1, master_weights="remainder")
        >>> rates = torch.ones(model.proj.weight.shape[0])
        >>> rates[:64], rates[64:128] = 0.5, 0.0
        >>> opt.set_unit_lr(model.proj.weight, rates)
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        state_dtype: torch.dtype | None = None,
        master_weights: str | None = None,
        max_grad_norm: float | None = None,
        backend: str | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        check_torch_arguments(lr, betas, eps, weight_decay, foreach, fused, capturable, differentiable)
        check_own_arguments(state_dtype, master_weights, max_grad_norm)
        self.state_dtype, self.master_weights = state_dtype, master_weights
        self.max_grad_norm, self.backend = max_grad_norm, backend
        self._collector = UpdateCollector()
        defaults = {
            "lr": lr,
            "betas": tuple(scalar(beta) for beta in betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,  # unused here; torch.optim.Adam reads it from a state dict
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does. Raises InputError where its hyperparameters, backend or master weights cannot serve it."""
        super().add_param_group(param_group)
        number, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            check_hyperparameters(number, group)
            for position, param in enumerate(group["params"]):
                check_dtypes(f"group {number}, parameter {position}", param, self.master_weights)
                backend_of(self._settings(), param)
            if RATES in group:
                group[RATES] = checked_rates(f"group {number}", group, group[RATES])
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise

    def set_unit_lr(self, param: Tensor, multipliers: Tensor | float | None, dim: int = 0) -> None:
        """Scale lr (and with it weight decay) of each unit of `param`: rate = lr * multiplier. None removes the rates.

        multipliers: finite, >= 0, stored as fp32 on the parameter's device; [param.shape[dim]] for one per index of dimension `dim`, or
            [experts, rows] and the like for one per index of dimensions dim, dim + 1, ...; a number or 0-d tensor for the whole parameter.
        A multiplier of 0 freezes its unit bit for bit, even with NaN gradients, while the moments move; lr = 0 does as torch does.
        Rates belong to the position in `param_groups`, so they outlive a swap of the tensors in group["params"] and a load of a state
        dict that has none.

        Raises InputError where `param` is not of this optimizer or the multipliers do not fit it.
        """
        group, position = self._locate(param)
        if multipliers is None:
            group.get(RATES, {}).pop(position, None)
            if not group.get(RATES, True):
                del group[RATES]
            return
        values, dim = checked_multipliers(param, multipliers, dim)
        held = group.setdefault(RATES, {}).get(position)
        if held is not None and held[0].shape == values.shape and held[0].device == values.device and held[1] == dim:
            held[0].copy_(values)  # at the same address, so that a captured or compiled step sees them
        else:
            group[RATES][position] = (values, dim)

    def unit_lr(self, param: Tensor) -> tuple[Tensor, int] | None:
        """Return (multipliers, dim) of `param`, dim counted from the front, or None. Raises InputError for an unknown parameter."""
        group, position = self._locate(param)
        rates: dict[int, tuple[Tensor, int]] = group.get(RATES, {})
        return rates.get(position)

    def _locate(self, param: Tensor) -> tuple[dict[str, Any], int]:
        for group in self.param_groups:
            for position, candidate in enumerate(group["params"]):
                if candidate is param:
                    return group, position
        found = f"shape {tuple(param.shape)}" if isinstance(param, Tensor) else f"{param!r}, not a Tensor"
        raise InputError(f"param: in none of this optimizer's groups ({found}); give the parameter itself, add it with add_param_group")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure`, called first with gradients enabled, returns."""
        _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._update()
        return loss

    def _update(self) -> None:
        settings = self._settings()
        if torch.compiler.is_compiling() or settings.differentiable:
            updates = self._described(settings)
        else:
            updates = self._collector.collect(settings, self.param_groups, self.state)
        if not updates.batches:
            return
        found_inf = checked_scale("found_inf", getattr(self, "found_inf", None), torch.float32)
        grad_scale = checked_scale("grad_scale", getattr(self, "grad_scale", None), torch.float64)
        scale = None if grad_scale is None else grad_scale.reciprocal()
        if settings.max_grad_norm is not None:
            summed_by = next((backend for device, backend in updates.batches if device.type == "cpu"), "torch")
            squares = dtensor.total(partial(sum_of_squares, backend=summed_by), updates.grads, updates.meshes)
            scale = clip_scale(squares, settings.max_grad_norm, scale)
        for (device, backend), batch in updates.batches.items():
            scale_there, found_there = (x if x is None else x.to(device) for x in (scale, found_inf))
            launch(backend, batch.updates, scale_there, found_there, batch.table)
        for original, copy in updates.copies:
            original.copy_(copy)
        if settings.master_weights in ("remainder", "kahan") and not torch.compiler.is_compiling():
            self._collector.note_versions(self.param_groups)

    def _settings(self) -> Settings:
        differentiable = self.defaults["differentiable"]
        return Settings(self.state_dtype, self.master_weights, self.max_grad_norm, self.backend, differentiable)

    def _described(self, settings: Settings) -> StepUpdates:
        """Find the updates of this step without plans, through a method that torch.compile knows."""
        updates, first = StepUpdates(settings.max_grad_norm is not None), 0
        for number, group in enumerate(self.param_groups):
            columns: list[list[Any]] = [[] for _ in Operands._fields]
            self._init_group(group, first, number, *columns)
            options = options_of(group, settings)
            for fields in zip(*columns, strict=True):
                updates.add_described(Operands(*fields), options)
            first += len(group["params"])
        return updates

    def _init_group(self, group: dict[str, Any], first: int, number: int, *columns: list[Any]) -> None:
        """Append to `columns`, one per field of Operands, what each parameter with a gradient has.

        torch.compile runs a method of this name while it traces, and guards what the lists then hold.
        """
        check_hyperparameters(number, group)
        refuse_sparse(group["params"])
        for position, param in enumerate(group["params"]):
            if param.grad is not None:
                given = self._collector.describe(self._settings(), number, group, position, first, self.state)
                for column, value in zip(columns, given, strict=True):
                    column.append(value)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict with the rates: `unit_lr` (fp32, the shape set) and `unit_dim` in the state of each updated parameter.

        Rates of other parameters stand in their group as `unit_lr`: {position: (multipliers, dim)}.
        """
        # A hook, so that the user's own hooks see the rates too.
        hooks = [self.register_state_dict_post_hook(hook, prepend=True) for hook in (rates_into_state, widen_sharded_remainders)]
        try:
            return super().state_dict()
        finally:
            for hook in hooks:
                hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, from this class or torch.optim.AdamW, except that tensors are copied and each key gets the dtype it has here: moments
        `state_dtype`, multipliers fp32, masters their own. A master of another mode, or one that was cast on the way, is dropped and
        starts again from the parameter. A state dict without any rates leaves those set here.

        Raises InputError for a state of another shape than its parameter's, without one of AdamW's keys or without values, for rates that
        are not finite and >= 0 or do not fit, and for hyperparameters out of range, naming group and position; the optimizer is then as
        it was."""
        hook = self.register_load_state_dict_pre_hook(protect_from_cast)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = ("state_dtype", "master_weights", "max_grad_norm", "backend")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.copy()
        try:
            self._set_state(state)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _set_state(self, state: dict[str, Any]) -> None:
        before = [group.get(RATES) for group in self.__dict__.get("param_groups", [])]
        super().__setstate__(state)
        self._collector = UpdateCollector()
        settings = self._settings()
        for number, group in enumerate(self.param_groups):
            for name in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"):
                group.setdefault(name, self.defaults[name])
            group["decoupled_weight_decay"] = True
            check_hyperparameters(number, group)
            rates = checked_rates(f"group {number}", group, group.pop(RATES, {}))
            for position, param in enumerate(group["params"]):
                if param in self.state:
                    where = f"group {number}, parameter {position}"
                    kept = restored(where, param, self.state[param], state_format(settings, group, param, backend_of(settings, param)))
                    if "unit_lr" in kept:
                        given = kept.pop("unit_lr"), kept.pop("unit_dim", 0)
                        rates[position] = checked_multipliers(param, *given, where=f"{where}: unit_lr")
                    self.state[param] = kept
            if rates:
                group[RATES] = rates
        if not any(group.get(RATES) for group in self.param_groups):
            for group, rates in zip(self.param_groups, before, strict=False):
                if rates:
                    group[RATES] = rates
