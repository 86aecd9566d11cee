"""The proof that copies are silent: the expanded model gives the base's logits, bit for bit, with and without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adept_fast.errors import ExpansionError, InputError
from adept_fast.models import device_of, evaluating, unwrapped, vocabulary_of
from adept_fast.settings.validation import require_made

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = (2, 33)  # shape of the random inputs: two rows, an odd length
DECODED = 4  # tokens


def random_inputs(model: PreTrainedModel, seed: int = 0) -> Tensor:
    """Random token ids [2, 33] from the model's vocabulary, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, TOKENS, generator=generator).to(device_of(model))


def verify_expansion(base: PreTrainedModel, expanded: PreTrainedModel, inputs: Tensor | None = None) -> None:
    """Raise ExpansionError with the largest logit difference unless both models agree bit for bit on `inputs` (token ids
    [rows, tokens], default random ones): in one forward, and in greedy decoding through the family's own cache. Raises InputError for
    inputs that are no tokens of the base, or none."""
    base, expanded = unwrapped(base, "base"), unwrapped(expanded, "expanded")
    if inputs is not None:
        _require_tokens(inputs, vocabulary_of(base))
    inputs = random_inputs(base) if inputs is None else inputs.to(device_of(base))
    compare(observe(base, inputs), observe(expanded, inputs))


def _require_tokens(inputs: Tensor, vocabulary: int) -> None:
    require_made("inputs", inputs, Tensor, "give token ids, int64 [rows, tokens]")
    if inputs.dtype != torch.int64 or inputs.ndim != 2 or not inputs.numel() or inputs.is_meta:
        found = f"{inputs.dtype} of shape {tuple(inputs.shape)} on {inputs.device}"
        raise InputError(f"inputs must be token ids, int64 [rows, tokens], one at least, found {found}")
    if not 0 <= int(inputs.min()) <= int(inputs.max()) < vocabulary:
        raise InputError(f"inputs must be from 0 to {vocabulary - 1}, found {int(inputs.min())} to {int(inputs.max())}")


def largest_difference(base: PreTrainedModel, expanded: PreTrainedModel, inputs: Tensor | None = None) -> float:
    """The largest logit difference of one forward, for copies that are not silent by design."""
    base, expanded = unwrapped(base, "base"), unwrapped(expanded, "expanded")
    inputs = random_inputs(base) if inputs is None else inputs.to(device_of(base))
    with torch.no_grad():
        ours, theirs = (model(input_ids=inputs, use_cache=False).logits.float() for model in (base, expanded))
    return float((ours - theirs.to(ours.device)).abs().max())


@torch.no_grad()
def observe(model: PreTrainedModel, inputs: Tensor) -> list[tuple[str, Tensor]]:
    """What a model computes, in eval mode: (how, logits) in one forward, then for each greedily decoded token."""
    from transformers import GenerationConfig

    with evaluating(model):
        seen = [("in one forward", model(input_ids=inputs, use_cache=False).logits)]
        greedy = GenerationConfig(
            max_new_tokens=DECODED, do_sample=False, use_cache=True, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )
        own, model.generation_config = model.generation_config, greedy  # the model's own would fill in its sampling and its end of text
        try:
            decoded = model.generate(inputs, attention_mask=torch.ones_like(inputs))
        finally:
            model.generation_config = own
        return seen + [("in greedy decoding", logits) for logits in decoded.logits]


def compare(base: Sequence[tuple[str, Tensor]], expanded: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ExpansionError unless two models were observed to compute the same bits."""
    for (how, expected), (_, found) in zip(base, expanded, strict=True):
        if expected.shape != found.shape or not torch.equal(expected, found):
            largest = "shapes differ" if expected.shape != found.shape else f"{float((expected.float() - found.float()).abs().max()):.3g}"
            raise ExpansionError(f"the expanded model does not compute what its base computes {how}: largest logit difference {largest}")
