"""AdamW with one learning rate per unit, a drop-in for torch.optim.AdamW."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from adept_fast import backend as backends
from adept_fast.errors import InputError
from adept_fast.optim_arguments import check_torch_arguments
from adept_fast.optim_state import MASTER_KEYS, MOMENTS, RATES, Kept, protect_from_cast, rates_into_state, restored
from adept_fast.reference import AdamWOptions, AdamWTensors, adamw_update_, clip_scale, needs_master

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


def _torch_step(updates: list[AdamWTensors], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    if found_inf is not None and found_inf.item() != 0:
        return
    for update in updates:
        update.step.add_(1)
        # Blocks keep the temporaries in a CPU's cache, and small everywhere; autograd could not follow in-place updates of views of leaves.
        elements = update.param.numel()
        block = 2**17 if update.param.device.type == "cpu" else 2**26
        if torch.is_grad_enabled() or elements <= block:
            adamw_update_(update, grad_scale)
            continue
        length = update.param.shape[0]
        rows = max(1, block * length // elements)
        for start in range(0, length, rows):
            adamw_update_(update.rows(start, min(rows, length - start)), grad_scale)


# backend -> function that advances `step` and updates one device's tensors; gradients are multiplied by grad_scale (fp32, 0-d) first, and
# nothing is stored where found_inf (fp32, 0-d) is not 0.
_STEPS: dict[str, Callable[[list[AdamWTensors], Tensor | None, Tensor | None], None]] = {"torch": _torch_step}


class AdamW(torch.optim.Optimizer):
    r"""AdamW with a learning-rate multiplier per unit (row, column, expert, parameter), exact low-precision masters and fused clipping.

        m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
        w <- (1 - rate weight_decay) w          rate = lr * multiplier
        w <- w - rate / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Drop-in for torch.optim.AdamW: same arguments, defaults, errors, closures, hooks, schedulers and state dict, which loads from and
    into torch's in mid-run. Arithmetic is fp32 (fp64 for fp64 parameters), results are rounded to the dtypes kept.

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

    Of torch's keywords, foreach and fused choose nothing here; fused and capturable keep `step` on the parameter's device, as in torch,
    so that state dicts interchange; capturable also keeps lr and betas given as tensors there; differentiable=True takes the plain path.
    GradScaler's grad_scale and found_inf are applied inside; a step with infinities changes nothing and is not counted.

    Raises InputError (a ValueError) for arguments out of range and unknown backends, RuntimeError for a forced backend that is not
    available and for sparse gradients.

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
        if state_dtype is not None and not (isinstance(state_dtype, torch.dtype) and state_dtype.is_floating_point):
            raise InputError(f"state_dtype: {state_dtype!r} is not a floating-point dtype; give for example torch.float32, or None")
        if master_weights not in (None, "copy", "remainder", "kahan", "stochastic"):
            raise InputError(f'master_weights: {master_weights!r} is none of None, "copy", "remainder", "kahan", "stochastic"')
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise InputError(f"max_grad_norm: {max_grad_norm} is not positive; None switches clipping off")
        self.state_dtype, self.master_weights = state_dtype, master_weights
        self.max_grad_norm, self.backend = max_grad_norm, backend
        self._written = WeakIdKeyDictionary()
        defaults = {
            "lr": lr,
            "betas": tuple(_scalar(beta) for beta in betas),
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
        """torch's, and checks that this optimizer's backend and master weights can serve the parameters."""
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        try:
            if self.master_weights in ("remainder", "stochastic"):
                for position, param in enumerate(params):
                    if needs_master(param) and param.dtype != torch.bfloat16:
                        raise InputError(
                            f"group {len(self.param_groups) - 1}, parameter {position}: master_weights={self.master_weights!r} needs "
                            f"bfloat16, not {param.dtype}; use 'copy' or 'kahan'"
                        )
            for device in {param.device for param in params}:
                backends.resolve("adamw", device, self.backend)
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
        values = torch.as_tensor(multipliers).detach().to(param.device, torch.float32, copy=True)
        if values.ndim == 0:
            dim = 0
        elif not -param.ndim <= dim < param.ndim:
            raise InputError(f"dim: {dim} is not a dimension of a parameter of shape {tuple(param.shape)}")
        else:
            dim %= param.ndim
        expected = param.shape[dim : dim + values.ndim]
        if values.shape != expected:
            raise InputError(
                f"multipliers: shape {tuple(values.shape)} from dim={dim} does not fit a parameter of shape {tuple(param.shape)}, "
                f"whose dimensions there are {tuple(expected)}"
            )
        if not bool(((values >= 0) & values.isfinite()).all()):
            raise InputError("multipliers: every one must be finite and >= 0")
        group.setdefault(RATES, {})[position] = (values, dim)

    def unit_lr(self, param: Tensor) -> tuple[Tensor, int] | None:
        """(multipliers, dim) of `param` as set, dim counted from the front, or None. Raises InputError for a parameter that is not here."""
        group, position = self._locate(param)
        return group.get(RATES, {}).get(position)

    def _locate(self, param: Tensor) -> tuple[dict[str, Any], int]:
        for group in self.param_groups:
            for position, candidate in enumerate(group["params"]):
                if candidate is param:
                    return group, position
        raise InputError(f"param: in none of this optimizer's groups (shape {tuple(param.shape)}); add it with add_param_group")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure`, called first with gradients enabled, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._update()
        return loss

    def _update(self) -> None:
        due = list(self._with_gradient())
        if not due:
            return
        found_inf = getattr(self, "found_inf", None)
        grad_scale = getattr(self, "grad_scale", None)
        scale = None if grad_scale is None else grad_scale.double().reciprocal().float()
        if self.max_grad_norm is not None:
            clip = clip_scale([param.grad for _, _, _, param in due], self.max_grad_norm, scale)
            scale = clip if scale is None else clip * scale.to(clip.device)
        by_device: dict[torch.device, list[AdamWTensors]] = defaultdict(list)
        options = {id(group): self._options(group) for group, _, _, _ in due}
        for group, position, ordinal, param in due:
            by_device[param.device].append(self._tensors(group, position, ordinal, param, options[id(group)]))
        for device, updates in by_device.items():
            name = "torch" if self.defaults["differentiable"] else backends.resolve("adamw", device, self.backend)
            _STEPS[name](updates, *(x if x is None else x.to(device) for x in (scale, found_inf)))
        if self.master_weights in ("remainder", "kahan"):
            for _, _, _, param in due:
                self._written[param] = param._version

    def _with_gradient(self) -> Iterator[tuple[dict[str, Any], int, int, Tensor]]:
        ordinal = 0
        for group in self.param_groups:
            for position, param in enumerate(group["params"]):
                if param.grad is not None:
                    if param.grad.layout != torch.strided:
                        raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
                    yield group, position, ordinal, param
                ordinal += 1

    def _options(self, group: dict[str, Any]) -> AdamWOptions:
        on_device = bool(group["capturable"] or self.defaults["differentiable"])
        lr, beta1, beta2 = (_scalar(x) if on_device else float(x) for x in (group["lr"], *group["betas"]))
        return AdamWOptions(lr, beta1, beta2, group["eps"], group["weight_decay"], group["maximize"], self.master_weights, on_device)

    def _tensors(self, group: dict[str, Any], position: int, ordinal: int, param: Tensor, options: AdamWOptions) -> AdamWTensors:
        state, kept = self.state[param], self._kept(group, param)
        if "step" not in state:
            state["step"] = torch.zeros((), device=kept.step_device)
        for key in MOMENTS[: 3 if group["amsgrad"] else 2]:
            if key not in state:
                state[key] = torch.zeros_like(param, dtype=kept.moments, memory_format=torch.preserve_format).detach()
        master, key = None, kept.master_key
        if key is not None:
            if key not in state:
                start = param.detach().to(kept.master) if key == "master" else torch.zeros_like(param, dtype=kept.master).detach()
                state[key] = start
            elif key != "master" and self._written.get(param, param._version) != param._version:
                state[key].zero_()
            master = state[key]
        multipliers, dim = group.get(RATES, {}).get(position, (None, 0))
        if multipliers is not None:
            if multipliers.shape != param.shape[dim : dim + multipliers.ndim]:
                raise InputError(
                    f"unit_lr: multipliers of shape {tuple(multipliers.shape)} from dim={dim} no longer fit parameter {position} of its "
                    f"group, now of shape {tuple(param.shape)}; set them again with set_unit_lr"
                )
            multipliers = multipliers.to(param.device)
        vmax = state["max_exp_avg_sq"] if group["amsgrad"] else None
        moments = (state["exp_avg"], state["exp_avg_sq"], vmax)
        return AdamWTensors(param, param.grad, state["step"], *moments, master, multipliers, dim, ordinal, options)

    def _kept(self, group: dict[str, Any], param: Tensor) -> Kept:
        """How the state of `param` is kept here."""
        moments = param.dtype if self.state_dtype is None or param.is_complex() else self.state_dtype
        key = MASTER_KEYS.get(self.master_weights) if needs_master(param) else None
        master = {"copy": torch.float32, "remainder": torch.int16}.get(self.master_weights, param.dtype)
        on_device = group["capturable"] or group["fused"]
        return Kept(param.device if on_device else torch.device("cpu"), moments, key, master)

    def state_dict(self) -> dict[str, Any]:
        """torch's. Per parameter that has been updated the keys `unit_lr` (fp32, the shape given) and `unit_dim` stand beside its state;
        rates of the others stand in their group as `unit_lr`: {position: (multipliers, dim)}."""
        # A hook, so that the user's own hooks see the rates too.
        hook = self.register_state_dict_post_hook(rates_into_state, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, from this class or torch.optim.AdamW, except that tensors are copied and each key gets the dtype it has here: moments
        `state_dtype`, multipliers fp32, masters their own. A master of another mode, or one that was cast on the way, is dropped and
        starts again from the parameter. A state dict without any rates leaves those set here."""
        hook = self.register_load_state_dict_pre_hook(protect_from_cast)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = ("state_dtype", "master_weights", "max_grad_norm", "backend")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = [group.get(RATES) for group in self.__dict__.get("param_groups", [])]
        super().__setstate__(state)
        self._written = WeakIdKeyDictionary()
        for group in self.param_groups:
            for name in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"):
                group.setdefault(name, self.defaults[name])
            group["decoupled_weight_decay"] = True
            for position, param in enumerate(group["params"]):
                if param in self.state:
                    kept = self.state[param] = restored(self.state[param], self._kept(group, param), param.device)
                    if "unit_lr" in kept:
                        group.setdefault(RATES, {})[position] = (kept.pop("unit_lr"), kept.pop("unit_dim"))
        if not any(group.get(RATES) for group in self.param_groups):
            for group, rates in zip(self.param_groups, before, strict=False):
                if rates:
                    group[RATES] = rates


def _scalar(value: float | Tensor) -> float | Tensor:
    return value.squeeze() if isinstance(value, Tensor) else value
