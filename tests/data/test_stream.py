"""Streams: every document once a pass, shares met, state exact at every block, the same order for every reader and process."""

from __future__ import annotations

import copy
import gzip
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from adept_fast.data.documents import document_tokens
from adept_fast.data.readers import read, reader
from adept_fast.data.sources import Source
from adept_fast.data.stream import Stream
from adept_fast.data.streamed_text import StreamedText, shares
from adept_fast.errors import InputError
from tests.support import tiny_models

TEXTS = [f"{sentence} Note {number}." * (1 + number % 3) for number, sentence in enumerate(tiny_models.SENTENCES)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(tmp_path / "cache"))


def write(folder: Path, kind: str, texts: list[str] = TEXTS) -> str:
    path = folder / f"corpus.{kind}"
    lines = "\n\n".join(json.dumps({"text": text, "none": None}) for text in texts)
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        datasets.Dataset.from_dict({"text": texts}).to_parquet(path, batch_size=7)
    elif kind == "txt":
        path.write_bytes("\n \n\n".join(text.replace(". ", ".\n") for text in texts).encode())
    elif kind == "lines.txt":
        path.write_text("\n\n" + "\n".join(texts) + "\n\n\n")
    else:
        path.mkdir()
        for part in range(3):
            (path / f"train-{part}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[part::3]))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "txt", "lines.txt", "folder"])
def test_a_reader_gives_what_read_gives_and_goes_on_from_every_record(tmp_path: Path, kind: str) -> None:
    source = Source(write(tmp_path, kind))
    whole = [(record.content, record.where) for record in reader(source).records()]
    assert whole == [(record.content, record.where) for record in read(source)] and len(whole) > 1
    for count in range(len(whole) + 1):
        first = reader(source)
        assert len(list(islice(first.records(), count))) == count
        again = reader(source)
        again.position = json.loads(json.dumps(first.position))
        assert [(record.content, record.where) for record in again.records()] == whole[count:]


def text(folder: Path, *sources: Source, window: int = 9, without: str = "number 3 ") -> StreamedText:
    return StreamedText(sources, lambda document: without not in document, "none", window)


def stream(made: StreamedText, blocks: int = 60, mixture: list | None = None, **changes: object) -> Stream:
    settings = {"blocks": blocks, "block_size": 32, "seed": 5, **changes}
    return Stream(made, mixture or shares(made.sources, None), tiny_models.tokenizer(), **settings)


def ids(blocks: Stream) -> np.ndarray:
    return np.concatenate([blocks[index]["input_ids"].numpy() for index in range(len(blocks))])


def test_a_pass_holds_every_kept_document_once_shuffled_and_the_next_another_order(tmp_path: Path) -> None:
    made = text(tmp_path, Source(write(tmp_path, "jsonl")))
    expected = [tuple(tokens) for tokens in document_tokens([entry for entry in TEXTS if made.keep(entry)], tiny_models.tokenizer())]
    assert 0 < len(expected) < len(TEXTS)
    total = sum(map(len, expected))
    tokens = ids(stream(made, blocks=2 * total // 32))
    end = tiny_models.tokenizer().eos_token_id
    documents = [tuple(part) + (end,) for part in np.split(tokens, np.flatnonzero(tokens == end) + 1) for part in [part[:-1]]]
    first, second = documents[: len(expected)], documents[len(expected) : 2 * len(expected) - 1]
    assert sorted(first) == sorted(expected) and first != expected
    assert set(second) <= set(expected) and len(set(second)) == len(second) and second != first[: len(second)]
    for start in range(0, len(expected), 9):  # within windows
        assert set(first[start : start + 9]) == set(expected[start : start + 9])


def test_windows_are_permuted_by_seed_source_pass_and_window(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    made = text(tmp_path, Source(path, share=0.0), Source(path, share=1.0))
    documents = document_tokens([entry for entry in TEXTS if made.keep(entry)], tiny_models.tokenizer())
    expected = []
    for number in (0, 1):
        for window, start in enumerate(range(0, len(documents), 9)):
            these = documents[start : start + 9]
            order = np.random.default_rng([5, 1, number, window]).permutation(len(these))
            expected += [these[index] for index in order]
    expected = np.concatenate(expected)
    assert np.array_equal(ids(stream(made, blocks=len(expected) // 32)), expected[: len(expected) // 32 * 32])


def test_every_block_is_packed_and_isolated_like_blocks_in_memory(tmp_path: Path) -> None:
    made = stream(text(tmp_path, Source(write(tmp_path, "jsonl"))))
    alone, head = made[3], made.head(20)
    for name, tensor in alone.items():
        assert torch.equal(tensor, head[3][name]), name
    assert any(len(head.documents(index)) > 1 for index in range(len(head)))
    one_more = len(document_tokens(TEXTS[:1], tiny_models.tokenizer())[0]) - 1  # whose last token is left over
    cut = stream(text(tmp_path, Source(write(tmp_path, "jsonl"))), one_per_row=True, block_size=one_more)
    assert all(bool((cut[index]["labels"] != -100).any()) for index in range(60))
    rows = stream(text(tmp_path, Source(write(tmp_path, "jsonl"))), one_per_row=True, pad_token=7)
    for index in range(10):
        starts = rows[index]["position_ids"] == 0
        padding = rows[index]["input_ids"] == 7
        assert starts.sum() == 1 + (padding.any() and not padding.all())


@pytest.mark.parametrize("one_per_row", [False, True])
def test_every_piece_begins_as_texts_do_streamed_as_in_memory_and_from_any_state(tmp_path: Path, one_per_row: bool) -> None:
    made, begins = text(tmp_path, Source(write(tmp_path, "jsonl"))), tiny_models.tokenizer(begins=True)
    settings = {"blocks": 80, "block_size": 24, "one_per_row": one_per_row, "pad_token": 7, "seed": 5}
    whole = Stream(made, [(1, 1)], begins, **settings)
    expected, head = [whole[index] for index in range(80)], whole.head(100)
    assert len(head) > 80 and any(any(head.continues(index)) for index in range(80))
    for at in (0, 3):
        looked = Stream(made, [(1, 1)], begins, **settings)
        assert all(torch.equal(looked[index][name], tensor) for index in range(at) for name, tensor in expected[index].items())
        found = looked.first_pieces(90)
        assert at == 0 or next(found)[1] is False  # a look that is broken off
        found.close()
        pieces = list(looked.first_pieces(90))
        there = list(head.first_pieces(80))
        assert [later for _, later in pieces] == [later for _, later in there] and looked.state(at) == whole.state(at)
        for (piece, _), (other, _) in zip(pieces, there, strict=True):
            assert np.array_equal(piece.ids, other.ids) and piece.inserted == other.inserted
        assert all(torch.equal(looked[at][name], tensor) for name, tensor in expected[at].items())
    for index, block in enumerate(expected):
        for name, tensor in head[index].items():
            assert torch.equal(block[name], tensor), (index, name)
        firsts = (block["position_ids"] == 0).nonzero()[: len(head.documents(index)), 0]
        assert block["input_ids"].eq(begins.bos_token_id).nonzero()[:, 0].tolist() == firsts.tolist()
    running = Stream(made, [(1, 1)], begins, ahead=3, **settings)
    for at in range(80):
        running[min(at + 2, 79)]
        state = json.loads(json.dumps(running.state(at)))
        if at % 7 == 0:
            resumed = Stream(made, [(1, 1)], begins, **settings)
            resumed.load(state)
            for index in range(at, min(at + 9, 80)):
                assert all(torch.equal(resumed[index][name], tensor) for name, tensor in expected[index].items()), (at, index)


@pytest.mark.parametrize("ahead", [1024, 3])
def test_any_state_goes_on_to_the_same_blocks(tmp_path: Path, ahead: int) -> None:
    sources = Source(write(tmp_path, "jsonl.gz"), weight=2), Source(write(tmp_path, "txt", TEXTS[::3]), share=0.3, share_end=0.6)
    made = text(tmp_path, *sources)
    whole = stream(made, ahead=ahead)
    expected = [whole[index]["input_ids"] for index in range(60)]
    running = stream(made, ahead=ahead)
    for block in range(60):
        running[min(block + 2, 59)]  # read ahead
        state = json.loads(json.dumps(running.state(block)))
        assert state["block"] == block
        assert sum(state["drawn"]) == 32 * state["block"] + len(state["rest"])
        if block % 7 == 0:
            resumed = stream(made)
            resumed.load(state)
            assert all(torch.equal(resumed[index]["input_ids"], expected[index]) for index in range(block, min(block + 9, 60))), block
            assert ahead == 3 or resumed.drawn(block + 9) == whole.drawn(block + 9)
    assert torch.equal(running[4]["input_ids"], expected[4])  # backwards


def test_processes_take_parts_of_one_order(tmp_path: Path) -> None:
    made = text(tmp_path, Source(write(tmp_path, "jsonl")))
    whole, ranks = stream(made), [stream(made), stream(made)]
    for index in range(60):
        assert torch.equal(ranks[index // 2 % 2][index]["input_ids"], whole[index]["input_ids"])


def test_shares_are_met_and_annealed(tmp_path: Path) -> None:
    def end(letter: str) -> list[str]:
        return [letter * (3 + number % 11) for number in range(40)]

    def parts(blocks: Stream, share: slice) -> float:
        tokens = ids(blocks).reshape(-1, 32)[share].ravel()
        words = [word for word in tiny_models.tokenizer().convert_ids_to_tokens(tokens) if word != "</s>"]
        return sum(word.startswith("b") for word in words) / len(words)

    for name in "ab":
        (tmp_path / name).mkdir()
    one, other = write(tmp_path / "a", "jsonl", end("a")), write(tmp_path / "b", "jsonl", end("b"))
    fixed = stream(text(tmp_path, Source(one), Source(other, share=0.25)), blocks=200)
    first = stream(text(tmp_path, Source(other, share=0.25), Source(one)))
    assert first[0]["position_ids"][1] and first.state(0)["drawn"] == [0, 0] and ids(first)[0] == ids(fixed)[0]
    assert parts(fixed, slice(None)) == pytest.approx(0.25, abs=0.005)
    assert fixed.drawn(200) == {one: pytest.approx(0.75, abs=0.005), other: pytest.approx(0.25, abs=0.005)}
    annealed = stream(text(tmp_path, Source(one), Source(other, share=0.1, share_end=0.7)), blocks=200)
    assert parts(annealed, slice(0, 40)) == pytest.approx(0.1 + 0.6 * 0.1, abs=0.02)
    assert parts(annealed, slice(160, 200)) == pytest.approx(0.1 + 0.6 * 0.9, abs=0.02)
    assert parts(annealed, slice(None)) == pytest.approx(0.4, abs=0.01)
    assert annealed.drawn(40)[other] == pytest.approx(0.1 + 0.6 * 0.1, abs=0.02)


@pytest.mark.parametrize("start", [0.1, 0.5, 0.9])
def test_a_source_whose_share_has_gone_to_nothing_gives_nothing(tmp_path: Path, start: float) -> None:
    path = write(tmp_path, "jsonl")
    for blocks in range(2, 30):
        made = stream(text(tmp_path, Source(path, share=start, share_end=0.0), Source(path)), blocks=blocks)
        made[blocks - 1]
        assert made.state(blocks - 1)["drawn"][0] == made.state(blocks)["drawn"][0], blocks


def test_shares_must_make_one() -> None:
    mixture = shares([Source("a", weight=2), Source("b"), Source("c", share=0.4, share_end=0.1)], [100, 400, 7])
    assert np.array(mixture) == pytest.approx(np.array([(0.2, 0.3), (0.4, 0.6), (0.4, 0.1)]))
    assert shares([Source("a", share=0.5, share_end=1), Source("b", share=0.5, share_end=0)], None) == [(0.5, 1), (0.5, 0)]
    for wrong in ([Source("a"), Source("b", share=0.5, share_end=1.0), Source("c", share=0.1)], [Source("a", share=0.5)]):
        with pytest.raises(InputError, match="not 1"):
            shares(wrong, None)


def test_tokens_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = text(tmp_path, Source(write(tmp_path, "parquet")))
    kept = document_tokens([entry for entry in TEXTS if made.keep(entry)], tiny_models.tokenizer())
    assert made.count(tiny_models.tokenizer()) == [(len(kept), sum(map(len, kept)))]
    others = StreamedText(made.sources, lambda document: True, "other", 9)
    assert others.count(tiny_models.tokenizer())[0][0] == len(TEXTS) > len(kept)
    monkeypatch.setattr("adept_fast.data.streamed_text.document_tokens", None)
    assert made.count(tiny_models.tokenizer()) == [(len(kept), sum(map(len, kept)))]


def test_a_digest_names_what_decides_the_documents_and_their_order(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    changes = [{}, {"template": "chat"}, {"column": "b"}, {"weight": 2.0}, {"share": 0.5}, {"share": 0.5, "share_end": 0.1}]
    made = [text(tmp_path, Source(path, **change)) for change in changes]
    made += [replace(made[0], excluded="other"), replace(made[0], window=10), replace(made[0], sources=made[0].sources * 2)]
    assert len({one.digest for one in made}) == len(made) and text(tmp_path, Source(path), without="").digest == made[0].digest


def test_what_cannot_be_streamed_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no document to train on"):
        stream(text(tmp_path, Source(write(tmp_path, "jsonl")), without=""))[0]
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text"\n')
    with pytest.raises(InputError, match=r"bad.jsonl:2: not valid JSON"):
        text(tmp_path, Source(str(tmp_path / "bad.jsonl"))).summaries(tiny_models.tokenizer())


def test_a_stream_of_single_tokens_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_models.tokenizer())
    tokenizer.eos_token = None  # each of these texts is one token then
    made = text(tmp_path, Source(write(tmp_path, "jsonl", ["q", "x"])))
    endless = Stream(made, [(1.0, 1.0)], tokenizer, blocks=3, block_size=8, seed=1)
    with pytest.raises(InputError, match="a whole pass over it holds no document of two tokens or more"):
        endless[0]
    with pytest.raises(InputError, match="block_size must be 2 or more, found 1"):
        Stream(made, [(1.0, 1.0)], tokenizer, blocks=3, block_size=1, seed=1)
