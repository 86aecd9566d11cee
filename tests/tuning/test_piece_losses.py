"""First and later pieces of documents are compared as blocks have them, and what parts them more than chance is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adept_fast.data.documents import Documents
from adept_fast.data.encoding import Encoder
from adept_fast.data.items import IGNORE
from adept_fast.data.packing import Blocks, flattened
from adept_fast.tuning.piece_losses import compare_pieces, pieces_of, warning
from tests.support import tiny_models

BOS, LENGTH, BLOCK = 1, 100, 32


def blocks(first: int, later: int, begin: tuple[int, ...] = (BOS,)) -> Blocks:
    """Documents of random tokens below `first` for as long as a block is, and below `later` behind that."""
    random, count = np.random.default_rng(3), 40
    ids = np.concatenate([[*begin, *random.integers(3, first, BLOCK), *random.integers(3, later, LENGTH)] for _ in range(count)])
    starts = np.arange(count + 1) * (len(ids) // count)
    return Blocks(Documents(ids.astype(np.int32), starts, np.array(begin, np.int32)), np.arange(count), BLOCK, one_per_row=True)


def test_pieces_are_compared_by_the_plain_formula_and_a_difference_is_said() -> None:
    model = tiny_models.model()
    with torch.no_grad():
        hidden = model.model(torch.randint(3, 300, (8, 32), generator=torch.Generator().manual_seed(0))).last_hidden_state.mean((0, 1))
        model.lm_head.weight[3:20] += hidden / hidden.norm()  # likelier than others behind any text
    even, uneven = blocks(20, 300), blocks(300, 20)
    found = compare_pieces(model, even)
    for later, mean in ((False, found.first), (True, found.later)):
        items = [item for item, goes_on in pieces_of(even, 256) if goes_on == later and len(item.input_ids) >= BLOCK // 2][:24]
        with torch.no_grad():
            losses = [
                torch.nn.functional.cross_entropy(
                    model(torch.tensor([item.input_ids]), use_cache=False).logits[0, :-1], torch.tensor(item.labels[1:]), reduction="none"
                )[torch.tensor(item.labels[1:]) != IGNORE]
                for item in items
            ]
        assert mean == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)
    assert (found.first_pieces, found.later_pieces) == (24, 24) and found.differ and not compare_pieces(model, uneven).differ
    said = warning(found, Encoder(tiny_models.tokenizer(begins=True)))
    assert said.startswith(f"warning: first pieces {found.first:.2f} +- ") and said.endswith("pieces that begin with '<s>'")
    assert "set add_bos_token in tokenizer_config.json" in warning(found, Encoder(tiny_models.tokenizer()))
    assert warning(compare_pieces(model, uneven), Encoder(tiny_models.tokenizer())) is None


def test_documents_of_one_piece_are_not_compared() -> None:
    short = Documents(np.arange(3, 123, dtype=np.int32), np.arange(0, 121, 20))
    assert compare_pieces(tiny_models.model(), Blocks(short, np.arange(6), BLOCK, one_per_row=True)) is None


def test_flattened_pieces_begin_as_texts_do() -> None:
    made = blocks(300, 300)
    row = flattened([made[index] for index in range(9)])
    starts = row["cu_seq_lens_q"][:-1].long()
    texts = row["labels"][0, starts[:, None] + torch.arange(3)].ne(IGNORE).any(1)  # the others are padding
    assert (row["input_ids"][0, starts[texts]] == BOS).all() and int(texts.sum()) >= 9
