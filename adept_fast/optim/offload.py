"""AdamW whose state is in host memory and whose update runs on the CPU, for parameters on a GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import ref

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.ops import dispatch
from adept_fast.optim.adamw import AdamW
from adept_fast.optim.arguments import checked_scale, refuse_sparse
from adept_fast.optim.arriving_gradients import ArrivingGradients
from adept_fast.optim.gradient_scale import gradient_scale
from adept_fast.optim.host_adamw import HostAdamW, HostCopy, buckets
from adept_fast.optim.state import Settings
from adept_fast.optim.transfers import Transfers, transfers_of
from adept_fast.runtime import distributed
from adept_fast.runtime.dtensor import is_sharded
from adept_fast.settings.validation import shown

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

HOST = torch.device("cpu")


class OffloadedAdamW(AdamW):
    """AdamW with its state in host memory, updated by the CPU, for parameters on a GPU. Untested on a GPU.

    Moments and masters take no memory of the GPU. Results have the bits of AdamW on the CPU, up to the order in which a GPU sums the norm
    of its gradients. Unit rates, clipping, masters, schedulers and the state dict are AdamW's: it loads from and into AdamW and torch's.

    Args:
        params: parameters or groups, on CUDA devices; on the CPU too, through copies, to try it out.
        args, kwargs: AdamW's arguments, without capturable and differentiable. backend: "cpu", "torch" or None.
        in_backward: what is done while backward runs.
            None: nothing. step() copies gradients to the host, updates, and copies parameters back, all at once in buckets.
            "copy": each gradient is copied to the host and freed on the device. Several backward passes add up there.
            "update": so, and buckets of parameters are updated ahead, if as many passes have arrived as before the last step and that did
                not clip. step() restores them and updates again if it finds that it clips, or that a further pass, a new learning rate or
                an edited parameter came in between. The bits are those of None.

    With "copy" and "update" `.grad` is None after backward: clip with max_grad_norm, and discard gradients with the zero_grad() of this
    optimizer. step() uses them up. GradScaler needs None, and so do several processes, which reduce gradients after they have arrived.

    Host memory per element of a bf16 parameter: 4 bytes for parameter and gradient, pinned; AdamW's state; with "update" a second copy of
    parameter and state. An edit of a parameter through `.data` is not seen: the next step overwrites it.

    Raises:
        InputError: as AdamW; an unknown `in_backward`; DTensors; GradScaler or several processes with `in_backward`; a copy or pickle.

    Source: Ren et al. (ZeRO-Offload), arXiv 2101.06840; updates ahead of the norm: Lian et al. (SuperOffload), arXiv 2509.21271.

    >>> layer = torch.nn.Linear(64, 256, dtype=torch.bfloat16)
    >>> optimizer = OffloadedAdamW(layer.parameters(), lr=2e-4, master_weights="remainder", max_grad_norm=1.0, in_backward="update")
    >>> for _ in range(3):
    ...     layer(torch.randn(8, 64, dtype=torch.bfloat16)).square().mean().backward()
    ...     optimizer.step()
    >>> optimizer.close()
    """

    def __init__(self, params: ParamsT, *args: Any, in_backward: str | None = None, **kwargs: Any) -> None:
        if in_backward not in (None, "copy", "update"):
            raise InputError(f'in_backward: {shown(in_backward)} is none of None, "copy", "update"', "in_backward")
        self.in_backward = in_backward
        self._host = HostAdamW()
        self._copies: dict[Tensor, HostCopy] = {}
        self._transfers: dict[torch.device, Transfers] = {}
        self._hooks: list[Any] = []
        self._arriving = ArrivingGradients(self._host, self._copies)
        super().__init__(params, *args, **kwargs)
        if refused := [name for name in ("capturable", "differentiable") if self.defaults[name]]:
            raise InputError(f"{refused[0]}: the update runs on the CPU, so no graph records it: leave it out")
        dispatch.resolve("adamw", HOST, self.backend)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True with in_backward, so that GradScaler calls step(), which refuses it, without looking for gradients."""
        return bool(self.in_backward or self.defaults["fused"])

    def _settings(self) -> Settings:
        return super()._settings()._replace(backend="torch")  # runs on every device; self.backend is that of the host

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as AdamW does. Raises InputError for DTensors, and for a device that is neither CUDA nor the CPU."""
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        try:
            for param in params:
                self._transfers_of(param)
        except InputError:
            self.param_groups.pop()
            raise
        this = ref(self)

        def arrived(param: Tensor) -> None:
            optimizer = this()
            if optimizer is not None:
                optimizer._arrived(param)

        if self.in_backward is not None:
            self._hooks += [param.register_post_accumulate_grad_hook(arrived) for param in params if param.requires_grad]

    def _transfers_of(self, param: Tensor) -> Transfers:
        if is_sharded(param):
            raise InputError("params: DTensors are not offloaded here, but by FSDP2: give fully_shard a CPUOffloadPolicy, and use AdamW")
        if param.device not in self._transfers:
            self._transfers[param.device] = transfers_of(param.device)
        return self._transfers[param.device]

    def _copy_of(self, param: Tensor) -> HostCopy:
        if param not in self._copies:
            self._copies[param] = HostCopy.of(param, self.state, self._transfers_of(param))
        copy = self._copies[param]
        copy.transfers = self._transfers_of(param)
        now, before = ((tuple(x.shape), x.dtype) for x in (param, copy.weight))
        if now != before:
            raise InputError(f"a parameter of {before[1]} and shape {before[0]} is {now[1]} and {now[0]} now: make a new optimizer")
        return copy

    def _arrived(self, param: Tensor) -> None:
        """Take the gradient that backward has just completed. Runs in a thread of backward."""
        if distributed.active():
            raise InputError("in_backward: several processes reduce gradients after they have arrived: leave it out")
        if param.grad is not None and param.grad.layout == torch.strided:  # step() refuses sparse ones
            self._arriving.take(self._copy_of(param), param.grad)
            self._arriving.start(self)

    def _update(self) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("OffloadedAdamW.step waits for copies, which no graph can: call it outside of torch.compile")
        self._arriving.wait()
        scaled = any(getattr(self, name, None) is not None for name in ("grad_scale", "found_inf"))
        if scaled and self.in_backward is not None:
            raise InputError("in_backward: GradScaler looks for infinities in gradients on the device: leave it out, or train in bf16")
        copies = self._waiting()
        if not copies:
            return
        self._host.follow(self, self._copies)
        self._host.update(copies, None, check_only=True)
        scale = gradient_scale(self, self._gradients(copies), [None] * len(copies), [dispatch.resolve("adamw", HOST, self.backend)])
        found_inf = checked_scale("found_inf", getattr(self, "found_inf", None), torch.float32)
        if found_inf is not None and found_inf.item():
            return
        clips = scale is not None and scale.item() != 1
        if clips or any(copy.edited() or copy.replaced() for copy in copies) or not self._arriving.holds(self):
            self._arriving.undo()
        self._arriving.ahead = self.in_backward == "update" and not clips
        for transfers in self._transfers.values():
            transfers.wait_for_uploads()
        late = [copy for copy in copies if not copy.ahead]
        for copy in copies:
            if copy.ahead:
                copy.upload()
            elif copy.edited():
                copy.take_edit()
        for bucket in buckets(late):
            for copy in bucket:
                if copy.copied is not None:
                    copy.copied.synchronize()
            self._host.update(bucket, scale)
            for copy in bucket:
                copy.upload()
        for transfers in self._transfers.values():
            transfers.finish()
        self._arriving.settled()

    def _waiting(self) -> list[HostCopy]:
        """Begin to copy the gradients that are on the device still. Returns the copies of all parameters with a gradient."""
        params = {param: None for group in self.param_groups for param in group["params"]}
        refuse_sparse(params)
        for param in params:
            if param.grad is not None:
                copy = self._copy_of(param)
                if copy.arrived:
                    self._arriving.take(copy, param.grad)
                else:
                    _, copy.copied = copy.download(param.grad)
        self._arriving.receive(self)
        held = [self._copies[param] for param in params if param in self._copies]
        return [copy for copy in held if copy.arrived or copy.param.grad is not None]

    def _gradients(self, copies: Sequence[HostCopy]) -> list[Tensor]:
        """Return what is clipped: gradients on a GPU, else their copies."""
        if self.max_grad_norm is None:
            return []
        for copy in copies:
            if copy.copied is not None and not copy.param.is_cuda:
                copy.copied.synchronize()
        grads = [copy.param.grad if copy.param.is_cuda and copy.param.grad is not None else copy.grad for copy in copies]
        return [torch.view_as_real(grad) if grad.is_complex() else grad for grad in grads]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard gradients, also those that have arrived in host memory."""
        self._arriving.wait()
        self._arriving.discard()
        super().zero_grad(set_to_none)

    def set_unit_lr(
        self, param: Tensor | str | Mapping[Any, Tensor | float | None], multipliers: Tensor | float | None = None, dim: int = 0
    ) -> None:
        """Set unit rates as AdamW does. `unit_lr` returns those that a step has used on the CPU."""
        self._arriving.wait()
        self._arriving.undo()
        super().set_unit_lr(param, multipliers, dim)

    def state_dict(self) -> dict[str, Any]:
        """Return AdamW's state dict, with tensors on the CPU."""
        self._arriving.wait()
        self._arriving.undo()
        return super().state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what load_state_dict has read, through the host's optimizer, which checks it before anything changes."""
        self._arriving.wait()
        self._arriving.undo()
        self._host.follow(self, self._copies)
        weights = {param: self._copy_of(param).weight for param in state["state"] if isinstance(param, Tensor)}
        self._host.__setstate__(
            {
                "state": defaultdict(dict, {weights.get(param, param): each for param, each in state["state"].items()}),
                "param_groups": [group | {"params": [weights.get(p, p) for p in group["params"]]} for group in state["param_groups"]],
            }
        )
        originals = {weight: param for param, weight in weights.items()}
        groups = zip(state["param_groups"], self._host.param_groups, strict=True)
        self.param_groups = [there | {"params": group["params"]} for group, there in groups]
        self.state = defaultdict(dict, {originals.get(key, key): each for key, each in self._host.state.items()})
        for copy in self._copies.values():
            copy.states, copy.kept = self.state, {}

    def __getstate__(self) -> NoReturn:
        raise InputError("OffloadedAdamW cannot be copied or pickled, because backward writes to it: save its state_dict()")

    def close(self) -> None:
        """End what is done in backward, and the thread. Later steps copy gradients in step(), as with in_backward=None."""
        self._arriving.wait()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._arriving.close()
        self.in_backward = None
