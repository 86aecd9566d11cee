"""Checks of the tensors of one update before native code gets their addresses: shape, device, dtype and memory.

They run when an update is looked up and when a state is loaded. A step with a cached plan compares addresses instead (table.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.ops.adamw.eight_bit import scale_shape
from adept_fast.ops.adamw.masters import needs_master
from adept_fast.ops.adamw.reference import Update

if TYPE_CHECKING:
    from adept_fast.ops.adamw.memory_order import Operands

REAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
MASTER_DTYPES = {"copy": torch.float32, "remainder": torch.int16, "remainder8": torch.int8}  # "kahan": the parameter's
CODES = ("exp_avg_8bit", "exp_avg_sq_8bit")  # other names than of moments, as torch's AdamW would take codes for moments
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
REMEDY = "load a state of this parameter, or `del optimizer.state[parameter]` to start it again"


def check_operands(where: str, given: Operands | Update, mode: str | None, backend: str) -> None:
    """Raise InputError if a tensor of `given` does not fit its parameter.

    where: names the parameter in the message, beside both shapes, dtypes or devices.
    mode: master_weights.
    """
    param, native = given.param, backend in ("cuda", "triton")
    numbers = COMPLEX if param.is_complex() else REAL
    eight_bit = given.exp_avg_scale is not None
    exp_avg, exp_avg_sq = CODES if eight_bit else ("exp_avg", "exp_avg_sq")
    check_form(where, exp_avg, given.exp_avg, param)
    first = given.exp_avg.dtype
    moments = (first,) if first in numbers and not (native and first == torch.float64) else numbers
    moments = (torch.uint8,) if eight_bit else moments
    _check_memory(where, "parameter", param, written=True)
    for name, tensor, dtypes in (
        ("gradient", given.grad, numbers),
        (exp_avg, given.exp_avg, moments),
        (exp_avg_sq, given.exp_avg_sq, moments),
        ("max_exp_avg_sq", given.max_exp_avg_sq, moments),
        ("master", given.master, (MASTER_DTYPES.get(mode or "", param.dtype),)),
    ):
        if tensor is not None or name in ("gradient", exp_avg_sq):
            present = cast(Tensor, tensor)  # check_like refuses None
            check_like(where, name, present, param, dtypes)
            _check_memory(where, name, present, written=name != "gradient")
    if eight_bit:
        if param.dtype == torch.float64:
            raise InputError(f"{where}: its moments have 8 bits, which a parameter of {param.dtype} cannot have; {REMEDY}")
        for name, scale in zip(SCALES, (given.exp_avg_scale, given.exp_avg_sq_scale), strict=True):
            check_scale(where, name, scale, param, param.device)
    if given.master is None and mode in ("copy", "remainder", "remainder8", "kahan") and needs_master(param):
        raise InputError(f"{where}: master_weights={mode!r} needs a master tensor, and the state has none; {REMEDY}")
    if native and given.exp_avg.dtype == torch.float64:
        raise InputError(f"{where}: exp_avg is torch.float64, which backend {backend!r} does not support; choose 'torch' or state_dtype")
    check_step(where, given.step, {param.device} if native else {param.device, torch.device("cpu")})
    if given.multipliers is not None:
        rates = given.multipliers
        if rates.dtype != torch.float32 or rates.device != param.device:
            raise InputError(f"{where}: unit_lr is {rates.dtype} on {rates.device}, not float32 on {param.device}; use set_unit_lr")
        _check_memory(where, "unit_lr", rates, written=False)


def check_form(where: str, name: str, tensor: Tensor, param: Tensor) -> None:
    """Raise InputError unless `tensor` is dense, of the shape of `param`, complex if it is, and not on meta if it is not."""
    if not isinstance(tensor, Tensor):
        raise InputError(f"{where}: {name} is a {type(tensor).__name__}, not a tensor of shape {tuple(param.shape)}; {REMEDY}")
    if tensor.shape != param.shape:
        raise InputError(f"{where}: {name} has shape {tuple(tensor.shape)}, its parameter {tuple(param.shape)}; {REMEDY}")
    if tensor.layout != torch.strided:
        raise InputError(f"{where}: {name} is {tensor.layout}, its parameter {param.layout}; {REMEDY}")
    if tensor.is_complex() != param.is_complex():
        raise InputError(f"{where}: {name} is {tensor.dtype}, its parameter {param.dtype}; {REMEDY}")
    if tensor.device.type == "meta" != param.device.type:
        raise InputError(f"{where}: {name} is on meta and has no values, its parameter is on {param.device}; {REMEDY}")


def check_like(where: str, name: str, tensor: Tensor, param: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise InputError unless `tensor` passes check_form, is on the device of `param` and has one of `dtypes`."""
    check_form(where, name, tensor, param)
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(f"{where}: {name} is {tensor.dtype}, and must be {wanted}, beside a parameter of {param.dtype}; {REMEDY}")
    if tensor.device != param.device:
        raise InputError(f"{where}: {name} is on {tensor.device}, its parameter on {param.device}; {REMEDY}")


def check_scale(where: str, name: str, scale: object, param: Tensor, device: torch.device) -> None:
    """Raise InputError unless `scale` has one fp32 per block of the rows of `param`, on `device` and in one piece."""
    shape = scale_shape(param.shape)
    if isinstance(scale, Tensor) and scale.layout == torch.strided and scale.dtype == torch.float32:
        if scale.shape == shape and scale.device == device and scale.is_contiguous():
            _check_memory(where, name, scale, written=True)
            return
    found = f"{scale.dtype} of shape {tuple(scale.shape)} on {scale.device}" if isinstance(scale, Tensor) else repr(scale)
    raise InputError(f"{where}: {name} is {found}; it must be float32 of shape {shape} on {device}, contiguous; {REMEDY}")


def check_step(where: str, step: object, devices: set[torch.device]) -> None:
    """Raise InputError unless `step` is one fp32 on one of `devices`, and a whole number >= 0 (checked on the CPU only)."""
    if not isinstance(step, Tensor) or step.numel() != 1 or step.dtype != torch.float32 or step.device not in devices:
        found = f"{step.dtype} of shape {tuple(step.shape)} on {step.device}" if isinstance(step, Tensor) else repr(step)
        where_to = " or ".join(sorted(map(str, devices)))
        raise InputError(f"{where}: step is {found}; it must be one float32 on {where_to}; {REMEDY}")
    _check_memory(where, "step", step, written=True)
    if step.device.type == "cpu":
        check_count(where, step.item())


def check_count(where: str, count: float) -> None:
    if not 0 <= count < 2**63 or count != int(count):
        raise InputError(f"{where}: step is {count}; it must be a whole number >= 0; {REMEDY}")


def _check_memory(where: str, name: str, tensor: Tensor, written: bool) -> None:
    """Raise InputError for a tensor larger than its storage, or one to be written whose elements overlap or are lazily negated."""
    if tensor.device.type == "meta":
        return
    elements = tensor.numel()
    if elements and not tensor.is_contiguous():
        elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if written and torch._debug_has_internal_overlap(tensor) == 1:
            raise InputError(f"{where}: elements of {name} share memory (stride {tensor.stride()}); copy it with .clone()")
    held = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    if elements > held:
        raise InputError(f"{where}: {name} of shape {tuple(tensor.shape)} needs {elements} elements, its storage has {max(held, 0)}")
    if written and (tensor.is_neg() or tensor.is_conj()):
        raise InputError(f"{where}: {name} is a lazy negation or conjugate, which cannot be written to; use resolve_neg, resolve_conj")
