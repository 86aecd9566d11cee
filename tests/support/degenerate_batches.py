"""Batches at the edge of what a training run or a corpus may hold, as a model takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from adept_fast.data.items import IGNORE, Item
from tests.support import tiny_models

ROWS, LENGTH = 2, 9


def batches() -> dict[str, dict[str, Tensor]]:
    """By name: input_ids and labels, each [rows, tokens], and what else the batch has."""
    ids = torch.randint(3, tiny_models.VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    none = torch.full_like(ids, IGNORE)
    at = torch.arange(LENGTH).expand(ROWS, -1)
    padding = torch.where(at < torch.tensor([[4], [LENGTH]]), IGNORE, ids)
    return {
        "no target": {"input_ids": ids, "labels": none},
        "one target": {"input_ids": ids, "labels": torch.where((at == 5) & (torch.arange(ROWS)[:, None] == 1), ids, IGNORE)},
        "a target at the first position only": {"input_ids": ids, "labels": torch.where(at == 0, ids, IGNORE)},
        "one row without a target": {"input_ids": ids, "labels": torch.where(torch.arange(ROWS)[:, None] == 1, ids, IGNORE)},
        "one token": {"input_ids": ids[:1, :1], "labels": ids[:1, :1]},
        "two tokens": {"input_ids": ids[:1, :2], "labels": ids[:1, :2]},
        "all targets alike": {"input_ids": ids, "labels": torch.full_like(ids, 7)},
        "all tokens alike": {"input_ids": torch.full_like(ids, 7), "labels": torch.full_like(ids, 7)},
        "an empty row": {
            "input_ids": ids,
            "labels": torch.where(torch.arange(ROWS)[:, None] == 1, ids, IGNORE),
            "attention_mask": torch.arange(ROWS)[:, None].expand(-1, LENGTH),
        },
        "padding in front": {"input_ids": ids, "labels": padding, "attention_mask": (padding != IGNORE).long()},
        "documents of one token": {"input_ids": ids, "labels": none, "position_ids": torch.zeros_like(ids)},
        "documents of one and of eight tokens": {
            "input_ids": ids,
            "labels": torch.where(at < 2, IGNORE, ids),
            "position_ids": (at - 1).clamp_min(0),
        },
    }


BATCHES = batches()


def targets(batch: dict[str, Tensor]) -> int:
    """How many tokens count in the loss: the first of a row is never predicted."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def _item(tokens: str, targets: str) -> Item:
    """A letter a token; targets: "x" where one counts."""
    ids = [3 + ord(token) for token in tokens]
    return Item(tuple(ids), tuple(token if there == "x" else IGNORE for token, there in zip(ids, targets, strict=True)))


# Corpora, at least one item of each supervised.
ITEMS = {
    "two tokens": [_item("ab", "-x")],
    "one target in the middle": [_item("abcdef", "--x---"), _item("uvwxyz", "xxxxxx")],
    "the last token alone": [_item("abcdef", "-----x")],
    "the first and the last token": [_item("abcdef", "x----x")],
    "all tokens alike": [_item("a" * 20, "x" * 20), _item("a" * 7, "-" * 6 + "x")],
    "one item again and again": [_item("abcdef", "---xxx")] * 5,
    "many of two tokens": [_item(f"a{chr(98 + number)}", "-x") for number in range(9)],
    "items without a target": [_item("abc", "x--"), _item("defg", "-xx-"), _item("h", "x"), _item("", ""), _item("ijk", "---")],
    "a long and a short one": [_item("abcdefgh" * 12, "-x" * 48), _item("zy", "xx")],
}
