"""AdamW with one learning rate per unit, a drop-in for torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.ops.adamw.memory_order import Operands
from adept_fast.ops.adamw.op import launch
from adept_fast.optim import arguments
from adept_fast.optim.gradient_scale import gradient_scale
from adept_fast.optim.state import MASTER_KEYS, RATES, STALE_AFTER_EDIT, Settings
from adept_fast.optim.state_dict import POST_HOOKS, restore, wrap_tensors
from adept_fast.optim.unit_lr import located, set_rates
from adept_fast.optim.update_collection import StepUpdates, UpdateCollector
from adept_fast.optim.update_lookup import backend_of, operands_of, options_of, scalar

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

# torch 2.8 has the second name, later releases the first.
_check_capture = getattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", None) or (
    torch.optim.Optimizer._cuda_graph_capture_health_check
)


class AdamW(torch.optim.Optimizer):
    r"""AdamW with one learning-rate multiplier per unit (row, column, expert, parameter): a drop-in for torch.optim.AdamW.

        m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
        w <- (1 - rate weight_decay) w          rate = lr * multiplier
        w <- w - rate / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Arguments, defaults, errors, closures, hooks, schedulers and the state dict are torch's; a state dict loads from and into torch's
    AdamW in mid-run. All backends compute in fp32 (fp64 for fp64 parameters) with the same operations in the same order, and give the
    same bits. DTensor parameters are updated shard by shard.

    Args:
        params: parameters or parameter groups, as in torch: fp32, bf16, fp16, fp64 or complex.
        lr: learning rate, >= 0; a number or a 0-d tensor.
        betas: decay rates of m and v, in [0, 1); two numbers or two 0-d tensors.
        eps: added to the denominator, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        amsgrad: divide by the largest v so far.
        maximize: step along the gradient instead of against it.
        capturable: keep `step` on the parameter's device, as CUDA graphs need it.
        state_dtype: dtype of exp_avg, exp_avg_sq and max_exp_avg_sq. None: the parameter's; complex parameters always have that. "int8":
            8-bit codes with a scale per 64 elements of a row, 2.1 bytes per element for both moments. Vectors, and matrices with rows of
            fewer than 16 elements, then have fp32 moments, fp64 parameters fp64 ones. Without amsgrad and differentiable.
        master_weights: how bf16 and fp16 parameters keep updates that are smaller than their resolution (extra bytes per element). An
            in-place edit of the parameter resets "remainder" and "kahan". An edit through `.data` is not seen: it keeps them, an error
            of at most half a unit in the last place.
            None (0): they do not; a bf16 weight loses updates below 2^-9 of its size.
            "copy" (4): fp32 master in state `master`. It is taken anew from a parameter that was edited in place.
            "remainder" (2): lower half of an exact fp32 master, int16, in state `remainder`. bf16 only; ties round away from zero.
            "remainder8" (1): the upper half of that, int8: a master of 24 bits, rounded without bias, in state `remainder8`.
            "kahan" (2): rounding error in the parameter's dtype, in state `compensation`: about 16 bits of mantissa.
            "stochastic" (0): unbiased rounding, bf16 only, reproducible: its noise is a hash of parameter number, step and element.
        max_grad_norm: clip the 2-norm of all gradients to this, as torch.nn.utils.clip_grad_norm_, but without changing `.grad`.
        backend: "cuda", "triton", "cpu" or "torch". None: ADEPT_FAST_BACKEND, else the fastest that is available for each device.
        foreach, fused: accepted for compatibility; they choose no backend. fused=True keeps `step` on the parameter's device, and lets the
            step apply GradScaler's scale, as torch's does; otherwise GradScaler unscales gradients before the step.
        differentiable: step in plain torch under autograd.

    State per parameter: `step` (fp32, 0-d; on the parameter's device with capturable, fused, "cuda" or "triton"), 2 moments (3 with
    amsgrad) of the parameter's shape, and the master. Under GradScaler a step whose gradients have infinities changes nothing and is not
    counted.

    Raises:
        InputError: an argument out of range or an unknown backend. At a step, naming group and position: a gradient, moment, master or
            `step` that does not fit its parameter, or lr, betas, eps or weight_decay that were set out of range.
        RuntimeError: a backend that was asked for and is not available; a sparse gradient.

    Source: Loshchilov and Hutter, arXiv 1711.05101; Reddi et al. (amsgrad), arXiv 1904.09237.

    >>> layer = torch.nn.Linear(64, 256, dtype=torch.bfloat16)
    >>> optimizer = AdamW(layer.parameters(), lr=2e-4, weight_decay=0.1, master_weights="remainder")
    >>> rates = torch.ones(256)
    >>> rates[:64], rates[64:128] = 0.5, 0.0  # half the rate for 64 rows, the next 64 frozen
    >>> optimizer.set_unit_lr(layer.weight, rates)
    >>> before = layer.weight.detach().clone()
    >>> layer(torch.randn(8, 64, dtype=torch.bfloat16)).square().mean().backward()
    >>> optimizer.step()
    >>> bool((layer.weight[64:128] == before[64:128]).all())
    True
    """

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
        state_dtype: torch.dtype | str | None = None,
        master_weights: str | None = None,
        max_grad_norm: float | None = None,
        backend: str | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        arguments.check_torch_arguments(params, lr, betas, eps, weight_decay, foreach, fused, capturable, differentiable)
        arguments.check_own_arguments(state_dtype, master_weights, max_grad_norm)
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

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells GradScaler that the step unscales, and Lightning that gradients cannot be clipped before it."""
        return bool(self.defaults["fused"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does. Raises InputError if this optimizer cannot update it with its hyperparameters and dtypes."""
        super().add_param_group(param_group)
        number, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            arguments.check_hyperparameters(number, group)
            arguments.check_flags(number, group, self._settings().state_dtype)
            for position, param in enumerate(group["params"]):
                arguments.check_dtypes(f"group {number}, parameter {position}", param, self.master_weights)
                backend_of(self._settings(), param)
            if RATES in group:
                group[RATES] = arguments.checked_rates(f"group {number}", group, group[RATES])
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise

    def set_unit_lr(
        self, param: Tensor | str | Mapping[Any, Tensor | float | None], multipliers: Tensor | float | None = None, dim: int = 0
    ) -> None:
        """Multiply lr, and with it weight decay, by one factor per unit of a parameter.

        Args:
            param: a parameter of this optimizer; a pattern of names, such as "model.layers.*.mlp.*", where the optimizer was given
                `model.named_parameters()`; or a dict of parameter or pattern -> multipliers, all of which are checked before any is set.
            multipliers: finite, >= 0, copied to the parameter's device as fp32; None removes them.
                [param.shape[dim]]: one per index of dimension `dim`.
                [param.shape[dim], param.shape[dim + 1], ...]: one per index of several dimensions, such as [experts, rows].
                A number or 0-d tensor: one for the whole parameter.
            dim: the first dimension that `multipliers` covers.

        A multiplier of 0 freezes its unit bit for bit, even with NaN gradients, while its moments move. lr = 0 does as in torch.
        The rates belong to the position in `param_groups`. They stay when the tensors in group["params"] are swapped, and when a state
        dict without rates is loaded.

        Raises:
            InputError: `param` is not in this optimizer, a pattern matches no name, or the multipliers do not fit.
        """
        if isinstance(param, Mapping) and multipliers is not None:
            raise InputError("multipliers: param is a dict, which has them: leave multipliers out")
        set_rates(self.param_groups, param if isinstance(param, Mapping) else {param: multipliers}, dim)

    def unit_lr(self, param: Tensor | str) -> tuple[Tensor, int] | None:
        """Return (multipliers, first dimension that they cover) of a parameter, given itself or by name; None if it has none.

        Raises InputError for an unknown parameter, or a pattern of several names.
        """
        found = located(self.param_groups, param)
        if len(found) > 1:
            raise InputError(f"param: {param!r} matches {len(found)} parameters: give one name")
        group, position = found[0]
        rates: dict[int, tuple[Tensor, int]] = group.get(RATES, {})
        return rates.get(position)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Calls `closure` first, with gradients enabled, and returns its result."""
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
        found_inf = arguments.checked_scale("found_inf", getattr(self, "found_inf", None), torch.float32)
        scale = self._scale(updates)
        for (device, backend), batch in updates.batches.items():
            scale_there, found_there = (x if x is None else x.to(device) for x in (scale, found_inf))
            launch(backend, batch, scale_there, found_there)
        for original, copy in updates.copies:
            original.copy_(copy)
        if MASTER_KEYS.get(settings.master_weights or "") in STALE_AFTER_EDIT and not torch.compiler.is_compiling():
            self._collector.note_versions(self.param_groups)

    def _scale(self, updates: StepUpdates) -> Tensor | None:
        on_cpu = [backend for device, backend in updates.batches if device.type == "cpu"]
        return gradient_scale(self, updates.grads, updates.meshes, on_cpu)

    def _settings(self) -> Settings:
        state_dtype = torch.int8 if self.state_dtype == "int8" else cast("torch.dtype | None", self.state_dtype)
        return Settings(state_dtype, self.master_weights, self.max_grad_norm, self.backend, self.defaults["differentiable"])

    def _described(self, settings: Settings) -> StepUpdates:
        """Collect this step's updates without cached plans, through a method that torch.compile can trace."""
        arguments.check_own_arguments(settings.state_dtype, settings.master_weights, settings.max_grad_norm)
        step, first = StepUpdates(), 0
        for number, group in enumerate(self.param_groups):
            columns: list[list[Any]] = [[] for _ in Operands._fields]
            self._init_group(group, first, number, *columns)
            step.add([Operands(*fields) for fields in zip(*columns, strict=True)], options_of(group, settings))
            first += len(group["params"])
        return step

    def _init_group(self, group: dict[str, Any], first: int, number: int, *columns: list[Any]) -> None:
        """Append the operands of each parameter with a gradient to `columns`, one list per field of Operands.

        torch.compile runs a method of this name while it traces, and guards the contents of the lists.
        """
        arguments.check_group(number, group)
        arguments.refuse_sparse(group["params"])
        for position, param in enumerate(group["params"]):
            if param.grad is not None:
                given = operands_of(self._settings(), number, group, position, first, self.state)
                self._collector.reset_edited([param], self.state, self.master_weights)
                for column, value in zip(columns, given, strict=True):
                    column.append(value)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict with the rates.

        `state[i]["unit_lr"]` (fp32, the shape that was set) and `state[i]["unit_dim"]` are the rates of a parameter that has a state.
        `param_groups[j]["unit_lr"]`, {position: (multipliers, dim)}, has those of the others.
        """
        # Hooks, so that the user's own hooks see the rates too.
        hooks = [self.register_state_dict_post_hook(hook, prepend=True) for hook in POST_HOOKS]
        try:
            return super().state_dict()
        finally:
            for hook in hooks:
                hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch.optim.AdamW. Tensors are copied, each in its own dtype.

        Moments are converted to `state_dtype`, rates stay fp32. A master of another mode, or one whose dtype was changed, is dropped and
        starts again from the parameter. A state dict without rates leaves the current ones.

        Raises:
            InputError: naming group and position, a state that does not fit its parameter or lacks a key, rates that do not fit or are not
                finite and >= 0, or a hyperparameter out of range. The optimizer is then unchanged.
        """
        hook = self.register_load_state_dict_pre_hook(wrap_tensors)
        try:
            super().load_state_dict(arguments.checked_state_dict(state_dict))
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = ("state_dtype", "master_weights", "max_grad_norm", "backend")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.copy()
        earlier_rates = [group.get(RATES) for group in before.get("param_groups", [])]
        try:
            super().__setstate__(state)
            self._collector = UpdateCollector()
            for group in self.param_groups:
                for name in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"):
                    group.setdefault(name, self.defaults[name])
                group["decoupled_weight_decay"] = True
            restore(self._settings(), self.param_groups, self.state, earlier_rates)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
