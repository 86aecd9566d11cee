"""Count the memory of training from shapes.

    weights      P s              P parameters of the model with its copies, C of them trained, s bytes of an element
    gradients    C s
    states       C (8 + m)        two moments in fp32 (fp64 for fp64), and m bytes of an exact master: 2 for bf16, 4 for fp16
    activations  tokens of a step times the bytes that the forward of a token keeps for backward

The activations of a Llama-like layer of width h, MLP width w, width k of its keys, a heads, in elements of two bytes: 12 h + 6 w + 4 k +
4 a + 8 bytes a token if it is frozen, 20 h + 8 w + 4 k + 4 a + 8 if it trains; in elements of four bytes twice that at most. Layers below
the lowest trained one keep none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MASTERS = {torch.bfloat16: 2, torch.float16: 4}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step."""

    weights: int
    gradients: int
    states: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.states + self.activations


def training_memory(parameters: int, trained: int, dtype: torch.dtype, activations: float) -> TrainingMemory:
    """Count a training step by one process. parameters: all, trained ones included. activations: bytes kept for backward."""
    size = dtype.itemsize
    return TrainingMemory(parameters * size, trained * size, trained * (2 * max(4, size) + MASTERS.get(dtype, 0)), round(activations))


def kept_by_layer(config: PretrainedConfig, trained: bool, dtype: torch.dtype) -> float:
    """Return the bytes a token that a Llama-like layer keeps for backward. config: of the text model."""
    heads, width = config.num_attention_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or width // heads
    keys = head * (getattr(config, "num_key_value_heads", None) or heads)
    mlp = getattr(config, "intermediate_size", None) or 4 * width
    own = 20 * width + 8 * mlp if trained else 12 * width + 6 * mlp
    return (own + 4 * keys + 4 * heads + 8) * dtype.itemsize / 2
