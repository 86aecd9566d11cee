"""Verify that copies are silent: the expanded model gives the base's logits, bit for bit, with and without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adept_fast.errors import ExpansionError, InputError
from adept_fast.models.decoder_layers import device_of, evaluating, vocabulary_of
from adept_fast.models.unwrap import unwrapped
from adept_fast.settings.validation import require_made

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = (2, 33)  # shape of the random inputs: two rows, an odd length
DECODED = 4  # tokens


def random_inputs(model: PreTrainedModel) -> Tensor:
    """Draw token ids [2, 33] from the model's vocabulary, the same ones in each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary_of(model), TOKENS, generator=generator).to(device_of(model))


def verify_expansion(base: PreTrainedModel, expanded: PreTrainedModel, inputs: Tensor | None = None) -> None:
    """Require that two models give the same logits, bit for bit, in one forward pass and in greedy decoding with the cache.

    Args:
        base: the model before expansion.
        expanded: the model with copies.
        inputs: token ids, int64 [rows, tokens]; default: 2 rows of 33 random tokens.

    Raises:
        ExpansionError: a logit differs; the message has the largest difference.
        InputError: `inputs` are not token ids of the base.

    >>> verify_expansion(model, expand_model(model, [1]))
    """
    base, expanded = unwrapped(base, "base"), unwrapped(expanded, "expanded")
    if inputs is not None:
        _require_tokens(inputs, vocabulary_of(base))
    inputs = random_inputs(base) if inputs is None else inputs.to(device_of(base))
    require_equal_logits(compute_logits(base, inputs), compute_logits(expanded, inputs))


def _require_tokens(inputs: Tensor, vocabulary: int) -> None:
    require_made("inputs", inputs, Tensor, "give token ids, int64 [rows, tokens]")
    if inputs.dtype != torch.int64 or inputs.ndim != 2 or not inputs.numel() or inputs.is_meta:
        found = f"{inputs.dtype} of shape {tuple(inputs.shape)} on {inputs.device}"
        raise InputError(f"inputs must be token ids, int64 [rows, tokens], one at least, found {found}")
    if not 0 <= int(inputs.min()) <= int(inputs.max()) < vocabulary:
        raise InputError(f"inputs must be from 0 to {vocabulary - 1}, found {int(inputs.min())} to {int(inputs.max())}")


def largest_difference(base: PreTrainedModel, expanded: PreTrainedModel) -> float:
    """Return the largest logit difference in one forward pass over random tokens, for copies that are not silent by design."""
    base, expanded = unwrapped(base, "base"), unwrapped(expanded, "expanded")
    inputs = random_inputs(base)
    with torch.no_grad():
        ours, theirs = (model(input_ids=inputs, use_cache=False).logits.float() for model in (base, expanded))
    return float((ours - theirs.to(ours.device)).abs().max())


@torch.no_grad()
def compute_logits(model: PreTrainedModel, inputs: Tensor) -> list[tuple[str, Tensor]]:
    """Return (how, logits) in eval mode: of one forward pass, then of each greedily decoded token."""
    from transformers import GenerationConfig

    with evaluating(model):
        seen = [("in one forward", model(input_ids=inputs, use_cache=False).logits)]
        greedy = GenerationConfig(
            max_new_tokens=DECODED, do_sample=False, use_cache=True, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )
        own, model.generation_config = model.generation_config, greedy  # the model's own would add sampling and an end of text
        try:
            generate: Any = model.generate
            decoded = generate(inputs, attention_mask=torch.ones_like(inputs))
        finally:
            model.generation_config = own
        return seen + [("in greedy decoding", logits) for logits in decoded.logits]


def require_equal_logits(base: Sequence[tuple[str, Tensor]], expanded: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ExpansionError unless the logits that `compute_logits` found of two models have the same bits."""
    for (how, expected), (_, found) in zip(base, expanded, strict=True):
        if expected.shape != found.shape or not torch.equal(expected, found):
            largest = "shapes differ" if expected.shape != found.shape else f"{float((expected.float() - found.float()).abs().max()):.3g}"
            raise ExpansionError(f"the expanded model does not compute what its base computes {how}: largest logit difference {largest}")
