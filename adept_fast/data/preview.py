"""Show the first documents of a training corpus as the model will see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adept_fast.data.packing import Blocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = (600, 200)  # characters from the start and the end of a long piece
BLOCKS_SHOWN = 2  # of a document that spans several


def preview(blocks: Blocks, documents: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return lines that show documents, given by index: decoded tokens with control tokens by name, begin, end, and block boundaries."""
    lines = []
    for document in documents:
        alone = blocks.alone(document)
        pieces = [alone[index]["input_ids"][: alone.documents(index)[0]].tolist() for index in range(len(alone))]
        if not pieces:
            continue
        size = f"{sum(map(len, pieces)):,} tokens" + (f", {len(pieces)} blocks if it begins one" if len(pieces) > 1 else "")
        lines.append(f"a document as the model will see it ({size}):")
        for number, ids in enumerate(pieces[:BLOCKS_SHOWN]):
            lines += ["  -- the next block --"] * bool(number) + [f"  | {line}" for line in _shortened(ids, tokenizer).split("\n")]
        lines += [f"  -- {len(pieces) - BLOCKS_SHOWN} blocks more --"] * (len(pieces) > BLOCKS_SHOWN)
    return lines


def _shortened(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if len(text) <= sum(SHOWN):
        return text
    return f"{text[: SHOWN[0]]} [... {len(text) - sum(SHOWN):,} characters ...] {text[-SHOWN[1] :]}"
