"""The proof that copies are silent: the expanded model gives the base's logits, bit for bit, with and without a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adept_fast.errors import ExpansionError
from adept_fast.families import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = (2, 33)  # shape of the random inputs: two rows, an odd length


def random_inputs(model: PreTrainedModel, seed: int = 0) -> Tensor:
    """Random token ids [2, 33] from the model's vocabulary, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, TOKENS, generator=generator).to(device_of(model))


@torch.no_grad()
def verify_expansion(base: PreTrainedModel, expanded: PreTrainedModel, inputs: Tensor | None = None) -> None:
    """Raise ExpansionError with the largest logit difference unless both models agree bit for bit on `inputs` (token ids
    [rows, tokens], default random ones): in one forward, and token by token through the cache."""
    inputs = random_inputs(base) if inputs is None else inputs.to(device_of(base))
    training = (base.training, expanded.training)
    base.eval()
    expanded.eval()
    try:
        _compare(base(inputs, use_cache=False).logits, expanded(inputs, use_cache=False).logits, "in one forward")
        split = max(1, inputs.shape[1] - 3)
        caches = [None, None]
        for start, stop in ((0, split), *((at, at + 1) for at in range(split, inputs.shape[1]))):
            outputs = [
                model(inputs[:, start:stop], past_key_values=cache, use_cache=True)
                for model, cache in zip((base, expanded), caches, strict=True)
            ]
            _compare(outputs[0].logits, outputs[1].logits, "decoding through the cache")
            caches = [output.past_key_values for output in outputs]
    finally:
        base.train(training[0])
        expanded.train(training[1])


def _compare(expected: Tensor, found: Tensor, how: str) -> None:
    if expected.shape != found.shape or not torch.equal(expected, found):
        difference = "shapes differ" if expected.shape != found.shape else f"{float((expected.float() - found.float()).abs().max()):.3g}"
        raise ExpansionError(f"the expanded model does not compute what its base computes {how}: largest logit difference {difference}")
