"""AdamW of other packages: which set-ups of ours each does the same work as, and how it is made. A package that is missing is left out."""

from __future__ import annotations

from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from bench.adamw_setups import HYPER

QUANTISED = ("bf16 int8-moments", "fp32 int8-moments")


class Other(NamedTuple):
    """name: of the class in `module`. devices: where it works. moments, margin, master: see adamw_truth.distances."""

    package: str
    module: str
    name: str
    setups: tuple[str, ...]
    options: dict[str, Any] = {}
    moments: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    margin: str = "other"
    master: bool = False

    def make(self, params: list[Parameter]) -> Optimizer:
        return getattr(import_module(self.module), self.name)(params, **HYPER, **self.options)

    def missing(self, device: torch.device) -> str | None:
        """Return why it cannot be timed here."""
        if find_spec(self.package) is None:
            return f"not installed: pip install {self.package}"
        return None if device.type in self.devices else f"works on {' and '.join(self.devices)} only"


OTHERS = {
    "torchao": Other("torchao", "torchao.optim", "_AdamW", ("fp32", "bf16")),
    "torchao_stochastic": Other(
        "torchao", "torchao.optim", "_AdamW", ("bf16 stochastic",), {"bf16_stochastic_round": True}, margin="stochastic"
    ),
    "torchao_8bit": Other("torchao", "torchao.optim", "AdamW8bit", QUANTISED[:1], moments="8 bits"),
    "torchao_4bit": Other("torchao", "torchao.optim", "AdamW4bit", QUANTISED[:1], moments="4 bits"),
    "bitsandbytes": Other("bitsandbytes", "bitsandbytes.optim", "AdamW32bit", ("fp32", "bf16 fp32-moments")),
    "bitsandbytes_8bit": Other(
        "bitsandbytes", "bitsandbytes.optim", "AdamW8bit", QUANTISED, moments="8 bits"
    ),
    "deepspeed": Other("deepspeed", "deepspeed.ops.adam", "DeepSpeedCPUAdam", ("fp32", "bf16 fp32-moments"), devices=("cpu",)),
    "deepspeed_bf16": Other(
        "deepspeed", "deepspeed.ops.adam", "DeepSpeedCPUAdam", ("bf16",), {"fp32_optimizer_states": False}, devices=("cpu",)
    ),
    "flashoptim": Other(
        "flashoptim", "flashoptim", "FlashAdamW", QUANTISED, {"master_weight_bits": None}, "8 bits", ("cuda",)
    ),
    "flashoptim_24bit": Other(
        "flashoptim", "flashoptim", "FlashAdamW", ("bf16 int8-moments remainder8",), {}, "8 bits", ("cuda",), master=True
    ),
}  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    packages = ("torch", *dict.fromkeys(other.package for other in OTHERS.values()))
    return {package: metadata.version(package) for package in packages if find_spec(package)}
