"""Sources that change while a run is under way: repaired ahead of it they are read on, changed behind it they are refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest
import torch

from adept_fast.data import file_readers
from adept_fast.data.readers import reader
from adept_fast.data.records import MalformedRecord
from adept_fast.data.sources import Source
from adept_fast.data.stream import Stream
from adept_fast.data.streamed_text import StreamedText, shares
from adept_fast.errors import InputError
from tests.support import tiny_models

TEXTS = [f"{sentence} Note {number}." for number, sentence in enumerate(tiny_models.SENTENCES)]
WINDOW, SPOILT = 7, 33


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def changed(number: int, text: str = "") -> list[str]:
    return [text if index == number else each for index, each in enumerate(TEXTS)]


def write(folder: Path, kind: str, texts: list[str], between: str = "\n") -> Source:
    path = folder / f"corpus.{kind}"
    rows = [json.dumps({"text": text}) for text in texts]
    if kind == "jsonl":
        path.write_text(between.join(rows))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(rows).encode()))
    elif kind == "json":
        path.write_text(f"[{', '.join(rows)}]")
    elif kind == "parquet":
        datasets.Dataset.from_dict({"text": texts}).to_parquet(path, batch_size=5)
    elif kind == "txt":
        path.write_text("\n\n".join(texts))
    else:
        path.mkdir(exist_ok=True)
        for part in range(2):
            (path / f"train-{part}.jsonl").write_text("\n".join(rows[part * 20 : part * 20 + 20]))
    return Source(str(path), split="train" if kind == "split" else None)


def stream(*sources: Source, blocks: int = 60, malformed_rows: int = 0, counted: bool = False) -> Stream:
    text = StreamedText(sources, lambda document: "number 3 " not in document, "none", WINDOW, malformed_rows)
    tokens = [tokens for _, tokens in text.count(tiny_models.tokenizer())] if counted else None
    return Stream(text, shares(sources, tokens), tiny_models.tokenizer(), blocks=blocks, block_size=32, seed=5)


def stopped(made: Stream, block: int) -> dict:
    """The state that a run keeps behind that block."""
    made[block - 1]
    return json.loads(json.dumps(made.state(block)))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "txt", "folder", "split"])
def test_a_source_repaired_ahead_is_read_on_as_if_it_had_been_whole(tmp_path: Path, kind: str) -> None:
    state = stopped(stream(write(tmp_path, kind, changed(SPOILT))), 9)
    (read,) = state["sources"]
    assert 0 < read["through"][0] < SPOILT - WINDOW
    source = write(tmp_path, kind, TEXTS)
    resumed, whole = stream(source), stream(source)
    assert resumed.load(state) == [source.path]
    for block in range(9, 60):  # through the repaired row, and into the next passes
        assert torch.equal(resumed[block]["input_ids"], whole[block]["input_ids"]), block
    assert resumed.state(60) == whole.state(60) and whole.state(60)["sources"][0]["pass"] > 0
    assert stream(source).load(resumed.state(30)) == []


def test_the_position_is_found_anew_where_bytes_behind_have_moved(tmp_path: Path) -> None:
    state = stopped(stream(write(tmp_path, "jsonl", TEXTS)), 9)
    moved = write(tmp_path, "jsonl", ["", *TEXTS], between="\n\n  ")
    resumed, whole = stream(moved), stream(moved)
    assert resumed.load(state) == [moved.path]
    assert resumed.state(9)["sources"][0]["position"] != state["sources"][0]["position"]
    assert all(torch.equal(resumed[block]["input_ids"], whole[block]["input_ids"]) for block in range(9, 60))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt", "split"])
@pytest.mark.parametrize("number", [0, "the window at hand"])
def test_a_source_changed_where_it_was_read_is_refused(tmp_path: Path, kind: str, number: int | str) -> None:
    source = write(tmp_path, kind, TEXTS)
    state = stopped(stream(source), 9)
    count = state["sources"][0]["through"][0]
    write(tmp_path, kind, changed(number if isinstance(number, int) else count - 1, "Another text."))
    with pytest.raises(InputError) as refused:
        stream(source).load(state)
    told = f"{source.path}: changed where this run has read it already (the first {count} documents): restore that to go on"
    assert str(refused.value).startswith(told)


@pytest.mark.parametrize("texts", [changed(SPOILT, "Another text."), [*TEXTS, "One more."], TEXTS[:-1]])
def test_once_a_pass_is_over_the_whole_source_was_read(tmp_path: Path, texts: list[str]) -> None:
    source = write(tmp_path, "jsonl", TEXTS)
    made = stream(source)
    block = next(block for block in range(1, 60) if stopped(made, block)["sources"][0]["pass"])
    state = stopped(made, block)
    write(tmp_path, "jsonl", texts)
    documents = sum("number 3 " not in text for text in TEXTS)
    with pytest.raises(InputError, match=rf"changed where this run has read it already \(all {documents} documents\)"):
        stream(source).load(state)
    write(tmp_path, "jsonl", TEXTS)
    assert stream(source).load(state) == []


def test_the_window_that_was_cut_short_by_the_end_takes_no_more(tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl", TEXTS)
    made = stream(source)
    states = [stopped(made, block) for block in range(1, 60)]
    last = next(state for state in reversed(states) if not state["sources"][0]["pass"])
    assert last["sources"][0]["through"][0] % WINDOW
    write(tmp_path, "jsonl", [*TEXTS, "One more."])
    with pytest.raises(InputError, match="changed where"):
        stream(source).load(last)
    assert stream(source).load(states[4]) == [source.path]


def test_a_source_that_changes_between_two_passes_of_one_process_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl", TEXTS)
    made = stream(source, blocks=200)
    block = next(block for block in range(1, 60) if stopped(made, block)["sources"][0]["pass"])
    write(tmp_path, "jsonl", changed(SPOILT, "Another text, which is as long as none that stood there."))
    with pytest.raises(InputError, match=r"changed where this run has read it already \(all"):
        made[block + 100]


def test_a_repair_that_changes_the_shares_of_the_sources_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", "jsonl", TEXTS[:15])
    state = stopped(stream(write(tmp_path, "jsonl", changed(SPOILT)), other, counted=True), 9)
    source = write(tmp_path, "jsonl", TEXTS)
    with pytest.raises(InputError, match=f"^{source.path}: changed, and with it each source's share of all tokens"):
        stream(source, other, counted=True).load(state)
    write(tmp_path, "jsonl", changed(SPOILT))
    assert stream(source, other, counted=True).load(state) == []


def test_malformed_rows_are_counted_over_both_parts_of_a_run(tmp_path: Path) -> None:
    rows = [json.dumps({"text": text}) for text in TEXTS]
    spoilt = [json.dumps({"text": 3}) if number in (2, 9, SPOILT) else row for number, row in enumerate(rows)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(spoilt))
    source = Source(str(path))
    made = stream(source, malformed_rows=2)
    state = stopped(made, 9)
    for running in (made, stream(source, malformed_rows=2)):
        running.load(state)
        with pytest.raises(MalformedRecord, match=f"corpus.jsonl:{SPOILT + 1}: .*; 3 rows of .* are malformed so far"):
            running[59]
    path.write_text("\n".join([*spoilt[:SPOILT], rows[SPOILT], *spoilt[SPOILT + 1 :]]))
    resumed, whole = stream(source, malformed_rows=2), stream(source, malformed_rows=2)
    assert resumed.load(state) == [source.path]
    assert all(torch.equal(resumed[block]["input_ids"], whole[block]["input_ids"]) for block in range(9, 60))


def test_the_folder_that_datasets_is_to_load_is_looked_through_before_training(tmp_path: Path) -> None:
    source = write(tmp_path, "split", TEXTS)
    text = StreamedText((source,), lambda document: True, "none", WINDOW)
    assert text.summaries(tiny_models.tokenizer())[0].documents == len(TEXTS)
    write(tmp_path, "split", changed(SPOILT))
    (summary,) = text.summaries(tiny_models.tokenizer())
    assert (summary.documents, summary.empty) == (len(TEXTS) - 1, 1)
    part = tmp_path / "corpus.split" / "train-1.jsonl"
    part.write_text(f'{part.read_text()}\n{{"text"\n')
    with pytest.raises(InputError, match=rf"corpus.split: cannot be read behind row {len(TEXTS) // 2} \(.*\): repair it"):
        text.summaries(tiny_models.tokenizer())


def test_a_file_is_hashed_once_while_it_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = write(tmp_path, "folder", TEXTS), []
    monkeypatch.setattr(file_readers.hashlib, "sha256", lambda *given, sha=file_readers.hashlib.sha256: read.append(given) or sha(*given))
    first = reader(source).identity()
    hashed = len(read)
    assert hashed >= 2 and reader(source).identity() == first
    again = len(read) - hashed
    (tmp_path / "corpus.folder" / "train-1.jsonl").write_text("{}")
    assert reader(source).identity() != first
    assert len(read) - hashed == 2 * again + 1
