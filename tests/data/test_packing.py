"""Packed documents are isolated: the same logits and losses as one by one, or the check says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import default_data_collator

from adept_fast.data.documents import Documents
from adept_fast.data.items import IGNORE, Item
from adept_fast.data.packing import Blocks, Piece, packed
from adept_fast.errors import InputError
from adept_fast.models.losses import corpus_loss
from adept_fast.tuning.collator import isolates_documents
from tests.support import tiny_models

LENGTHS = [1, 7, 30, 13, 2, 75, 9, 20]
BOS = 1


def documents(lengths: list[int] = LENGTHS, begin: tuple[int, ...] = ()) -> Documents:
    """Random ones; of those long enough each begins with `begin`."""
    ids = np.random.default_rng(0).integers(3, tiny_models.VOCABULARY, sum(lengths)).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for start in starts[:-1]:
        ids[start : start + len(begin)] = begin
    return Documents(ids, starts, np.array(begin, np.int32))


def pieces(blocks: Blocks) -> list[tuple[torch.Tensor, torch.Tensor, bool, int]]:
    """Of each piece its ids, its labels, whether it goes on with a document, and the room that its block had for it."""
    found = []
    for index in range(len(blocks)):
        block, at = blocks[index], 0
        assert torch.equal(block["position_ids"][: sum(blocks.documents(index))], torch.cat([*map(torch.arange, blocks.documents(index))]))
        for length, later in zip(blocks.documents(index), blocks.continues(index), strict=True):
            found.append((block["input_ids"][at : at + length], block["labels"][at : at + length], later, blocks.block_size - at))
            at += length
        assert (block["labels"][at:] == IGNORE).all()
    return found


@pytest.mark.parametrize("one_per_row", [False, True])
@pytest.mark.parametrize("begin", [(BOS,), (BOS, 2)])
@pytest.mark.parametrize("block_size", [24, 32, 128])
def test_every_piece_begins_as_texts_do_and_none_is_short(block_size: int, begin: tuple[int, ...], one_per_row: bool) -> None:
    lengths = [3, 7, 30, 13, 75, 9, 20, *range(3, 140)]
    source, ahead = documents(lengths, begin), len(begin)
    blocks = Blocks(source, np.arange(len(lengths)), block_size, one_per_row=one_per_row)
    shortest, again, count = ahead + min(16, block_size // 8), [], 0
    for ids, labels, later, room in pieces(blocks):
        assert tuple(ids[:ahead].tolist()) == begin
        assert len(ids) >= shortest or len(ids) == lengths[count], "a short piece is a whole document"
        known = ahead + 1 if later else 1
        assert (labels[:known] == IGNORE).all() and torch.equal(labels[known:], ids[known:]), "nothing of the document foretells its first"
        again.append(ids[ahead:] if later else ids)
        count += not later
        assert room == block_size or not one_per_row
    assert np.array_equal(torch.cat(again).numpy(), source.ids) and blocks.tokens == source.tokens == sum(lengths)
    filled = np.array([sum(blocks.documents(index)) for index in range(len(blocks) - 1)])
    assert one_per_row or (filled > block_size - 2 * shortest).all() and (filled <= block_size).all() and filled.mean() > 0.95 * block_size


def test_blocks_that_cannot_hold_a_begin_and_text_are_refused() -> None:
    for begin, least in (((BOS,), 8), ((BOS, 2), 12)):
        assert Blocks(documents([30], begin), np.arange(1), least).tokens == 30
        with pytest.raises(InputError, match=f"^block_size={least - 1}: too small .* with {len(begin)} tokens: give {least} or more"):
            Blocks(documents([30], begin), np.arange(1), least - 1)
    assert Blocks(documents([9]), np.arange(1), 3).tokens == 9


def test_every_token_is_packed_once_and_boundaries_are_not_supervised() -> None:
    source = documents()
    blocks = Blocks(source, np.arange(len(source)), 32)
    seen = []
    for index in range(len(blocks)):
        block, at = blocks[index], 0
        for length in blocks.documents(index):
            piece = slice(at, at + length)
            seen.append(block["input_ids"][piece])
            assert block["labels"][at] == IGNORE and torch.equal(block["labels"][piece][1:], block["input_ids"][piece][1:])
            assert torch.equal(block["position_ids"][piece], torch.arange(length))
            at += length
        assert (block["labels"][at:] == IGNORE).all() and all(tensor.shape == (32,) for tensor in block.values())
    assert np.array_equal(torch.cat(seen).numpy(), source.ids) and blocks.tokens == source.tokens


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_packed_losses_equal_those_of_documents_alone(family: str) -> None:
    model, source = tiny_models.model(family), documents()
    blocks = Blocks(source, np.arange(len(source)), 32)
    assert isolates_documents(model, blocks, default_data_collator)
    loss = tokens = 0.0
    alone = []
    for index in range(len(blocks)):
        block = {key: value[None] for key, value in blocks[index].items()}
        count = int((block["labels"][:, 1:] != IGNORE).sum())
        with torch.no_grad():
            loss += float(model(**block, use_cache=False).loss) * count
        tokens += count
        at = 0
        for length in blocks.documents(index):
            ids = tuple(blocks[index]["input_ids"][at : at + length].tolist())
            alone.append(Item(ids, ids))
            at += length
    expected = corpus_loss(model, alone)
    assert tokens == int(expected.tokens.sum())
    assert loss / tokens == pytest.approx(expected.mean, abs=2e-6)


def test_a_mask_of_ones_would_undo_it() -> None:
    """Why no attention_mask is ever passed: transformers then takes the block for one sequence."""
    model, source = tiny_models.model(), documents()
    block = {key: value[None] for key, value in Blocks(source, np.arange(len(source)), 32)[0].items() if key != "labels"}
    with torch.no_grad():
        isolated = model(**block, use_cache=False).logits
        leaking = model(**block, attention_mask=torch.ones_like(block["input_ids"]), use_cache=False).logits
    assert float((isolated - leaking).abs().max()) > 0.1


def test_the_check_finds_a_family_that_leaks() -> None:
    model = tiny_models.model("bloom", n_layer=2, n_head=4)
    assert not isolates_documents(model, Blocks(documents(), np.arange(len(LENGTHS)), 32), default_data_collator)


def test_blocks_with_nothing_to_predict_are_left_out() -> None:
    assert len(Blocks(documents([65]), np.arange(1), 64)) == 1 and len(Blocks(documents([1, 1]), np.arange(2), 8)) == 0


def test_padding_is_a_document_of_its_own() -> None:
    block = {name: tensor.tolist() for name, tensor in packed([Piece(np.array([5, 6])), Piece(np.array([7]))], 6, 9).items()}
    assert block == {"input_ids": [5, 6, 7, 9, 9, 9], "labels": [-100, 6, *[-100] * 4], "position_ids": [0, 1, 0, 0, 1, 2]}


def test_one_document_a_row_needs_no_isolation() -> None:
    source = documents()
    blocks = Blocks(source, np.arange(len(source)), 32, one_per_row=True)
    assert all(len(blocks.documents(index)) == 1 for index in range(len(blocks)))
    assert blocks.tokens == source.tokens - LENGTHS.count(1)
    assert isolates_documents(tiny_models.model("bloom", n_layer=2, n_head=4), blocks, default_data_collator)


def test_loss_of_unequal_items_equals_the_plain_formula() -> None:
    model, items = tiny_models.model("qwen3"), tiny_models.items(9)
    measured = corpus_loss(model, items, argmax=True)
    for index, item in enumerate(items):
        with torch.no_grad():
            logits = model(torch.tensor([item.input_ids]), use_cache=False).logits[0].double()
        labels = torch.tensor(item.labels[1:])
        plain = torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="sum")
        assert float(measured.sums[index]) == pytest.approx(float(plain), abs=1e-4)
        assert torch.equal(measured.argmax[index], logits.argmax(-1))
