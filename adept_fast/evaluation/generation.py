"""Let a model go on from prompts, through transformers' generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adept_fast.errors import InputError
from adept_fast.models.decoder_layers import device_of, evaluating
from adept_fast.models.unwrap import unwrapped
from adept_fast.runtime.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 16  # prompts


class GenerationFailed(InputError):
    """A model that cannot generate."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    title: str = "generating",
) -> list[str]:
    """Return the text with which the model goes on from each prompt, without control tokens.

    prompts: token ids, each of at least one, run in batches of 16
    max_new_tokens: for each prompt; a model may stop earlier
    temperature: 0 takes the likeliest token each time; above, tokens are drawn, the same ones for the same seed
    title: of the progress bar, and of the message where generation fails

    What else decoding depends on (the tokens that end an answer, top_p) is the model's own generation_config. Raises GenerationFailed.
    """
    from transformers import GenerationConfig

    model = unwrapped(model)
    own = model.generation_config
    ends = own.eos_token_id if own and own.eos_token_id is not None else tokenizer.eos_token_id
    pad = next((token for token in (tokenizer.pad_token_id, ends) if isinstance(token, int)), 0)
    how = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=temperature > 0, num_beams=1, eos_token_id=ends, pad_token_id=pad)
    if temperature > 0:
        how.temperature = float(temperature)
    written: list[str] = []
    batches = [prompts[at : at + BATCH] for at in range(0, len(prompts), BATCH)]
    with evaluating(model), Progress(total=max_new_tokens * len(batches), desc=title, unit="token") as bar, torch.random.fork_rng():

        def count(tokens: Tensor, scores: Tensor, **_: object) -> Tensor:
            bar.update(1)
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

        torch.manual_seed(seed)
        for batch in batches:
            longest, device = max(map(len, batch)), device_of(model)
            ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in batch], device=device)
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch], device=device)
            try:
                run: Any = model.generate
                answers = run(inputs=ids, attention_mask=mask, generation_config=how, stopping_criteria=[count])
            except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise GenerationFailed(f"{title}: generation failed ({reason[:300]})") from error
            written += [str(tokenizer.decode(row, skip_special_tokens=True)) for row in answers[:, longest:].tolist()]
    return written
