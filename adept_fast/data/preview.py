"""The first documents of a training corpus, as the model will see them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from adept_fast.data.packing import Blocks
from adept_fast.data.records import IGNORE
from adept_fast.data.stream import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = (400, 200)  # characters of the begin and the end of a long one


def preview(blocks: Blocks | Stream, tokenizer: PreTrainedTokenizerBase, documents: int = 2) -> list[str]:
    """Lines that show so many documents of the first blocks: their tokens decoded, with what stands at their boundaries, every control
    token by its name. One that does not fit a block is shown as far as the block has it."""
    lines = []
    pieces = _pieces(blocks.head(documents) if isinstance(blocks, Stream) else blocks)
    for number, ids in zip(range(1, documents + 1), pieces, strict=False):
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if len(text) > sum(SHOWN):
            text = f"{text[: SHOWN[0]]} [... {len(text) - sum(SHOWN):,} characters ...] {text[-SHOWN[1] :]}"
        lines += [f"document {number} as the model will see it ({len(ids):,} tokens):", *(f"  | {line}" for line in text.split("\n"))]
    return lines


def _pieces(blocks: Blocks) -> Iterator[list[int]]:
    """Token ids between the boundaries of documents: where positions begin again. Padding, which is not supervised, is none."""
    for index in range(len(blocks)):
        block = blocks[index]
        starts = [*(block["position_ids"] == 0).nonzero()[:, 0].tolist(), len(block["position_ids"])]
        for start, stop in zip(starts, starts[1:], strict=False):
            if (block["labels"][start:stop] != IGNORE).any():
                yield block["input_ids"][start:stop].tolist()
