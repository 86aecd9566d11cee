"""Sources, items, splits and the token cache."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from adept_fast import score_layers
from adept_fast.data.documents import document_tokens, tokenize_documents
from adept_fast.data.items import IGNORE, Item, load_items, tokenize_choices, tokenize_item
from adept_fast.data.packing import document_order
from adept_fast.data.readers import read, reader
from adept_fast.data.sources import Record, Source
from adept_fast.data.splits import FEW, HELD_OUT, by_hash, hold_out, hold_out_of_streams, is_held_out, split_probe
from adept_fast.data.templates import document_text
from adept_fast.errors import InputError
from adept_fast.runtime.atomic_files import staged_file
from tests.support import tiny_models

ROWS = [{"text": f"document {number}", "extra": number} for number in range(5)]


def test_columns_that_a_table_row_lacks_are_not_there(tmp_path: Path) -> None:
    rows = [{"text": "a text", "instruction": None, "output": None}, {"text": None, "instruction": "asked", "output": " answered"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "mixed.parquet")
    records = read(Source(str(tmp_path / "mixed.parquet")))
    assert [document_text(record) for record in records] == ["a text", "asked answered"]


def write(path: Path, kind: str) -> str:
    lines = "\n".join(json.dumps(row) for row in ROWS)
    if kind == "jsonl":
        path.write_text(lines + "\n\n")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        path.write_text("\n\n\n".join(row["text"] for row in ROWS))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "txt"])
def test_every_kind_of_file_gives_the_same_texts(tmp_path: Path, kind: str) -> None:
    records = read(Source(write(tmp_path / f"corpus.{kind}", kind)))
    assert [document_text(record) for record in records] == [row["text"] for row in ROWS]


@pytest.mark.parametrize("content", [b"one\r\n \x0c\r\n \r\n\r\n two\rparts", "a\x0cb\u2028c\n".encode() * 30])
def test_texts_of_other_systems_are_the_same_read_whole_and_streamed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.txt").write_bytes(b"\xef\xbb\xbf" + content)
    source = Source(str(tmp_path / "odd.txt"))
    texts = [record.content["text"] for record in read(source)]
    assert texts == [record.content["text"] for record in reader(source).records()]
    assert texts == (["one", " two\rparts"] if b"one" in content else ["\n".join(["a\x0cb\u2028c"] * lines) for lines in (20, 10)])


@pytest.mark.parametrize("name", ["marked.jsonl", "marked.json"])
def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(ROWS) if name.endswith("json") else "\n".join(map(json.dumps, ROWS)), encoding="utf-8-sig")
    source = Source(str(tmp_path / name))
    assert [record.content for record in read(source)] == ROWS
    if name.endswith("jsonl"):
        assert [record.content for record in reader(source).records()] == ROWS


def test_a_split_of_a_folder_is_read_by_datasets(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "jsonl")
    assert len(read(Source(str(tmp_path), split="train"))) == 5


def test_text_without_blank_lines_is_cut_into_pieces(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("".join(f"line {number}\n" for number in range(50)))
    texts = [record.content["text"] for record in read(Source(str(tmp_path / "notes.txt")))]
    assert len(texts) == 3 and "\n".join(texts).count("line") == 50


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", '{"text": "a"}\n{"text": \n', r"bad.jsonl:2: not valid JSON"),
        ("bad.jsonl", '{"text": "a"}\n[1]\n', r"bad.jsonl:2: expected a JSON object"),
        ("bad.json", '[{"text": "a"},\n{]', r"bad.json:2: not valid JSON"),
        ("bad.json", '{"text": "a"}', r"expected a JSON array"),
        ("deep.jsonl", "{}\n" + "[" * 100_000, r"deep.jsonl:2: not valid JSON"),
        ("long.json", '[{"id": ' + "1" * 5000 + "}]", r"long.json: not valid JSON"),
        ("empty.jsonl", "", "holds no records"),
        ("empty.txt", "\n \n", "holds no records"),
        ("what.csv", "a,b", "unknown kind of file"),
        ("bad.jsonl.gz", "not gzip", "cannot be read"),
        ("lone.jsonl", '{"text": "a \\ud83d b"}', "lone.jsonl:1: 'text' holds half of a surrogate pair"),
        ("bad.parquet", "not parquet", "not a readable parquet file"),
    ],
)
def test_malformed_files_are_named_with_the_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        [document_text(record) for record in read(Source(str(tmp_path / name)))]


def test_missing_file_and_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read(Source(str(tmp_path / "none.jsonl")))
    for value in (
        {"split": "train"},
        {"path": "a", "weigth": 2},
        {"path": "a", "weight": 0},
        {"path": None},
        {"path": "a", "weight": float("inf")},
        3,
    ):
        with pytest.raises(InputError):
            Source.of(value)


def test_answer_tokens_and_nothing_else_are_supervised() -> None:
    tokenizer = tiny_models.tokenizer()
    record = Record({"instruction": "The heron walks to the", "output": " river bank"}, "here")
    item = tokenize_item(record, tokenizer)
    supervised = [token for token, label in zip(item.input_ids, item.labels, strict=True) if label != IGNORE]
    assert tokenizer.decode(supervised) == " river bank" and tokenizer.decode(item.input_ids) == "The heron walks to the river bank"
    joined = tokenize_item(Record({"instruction": "How many?", "output": "Three"}, "here"), tokenizer)
    assert tokenizer.decode(joined.input_ids) == "How many?\nThree"
    text = tokenize_item(Record({"text": "the fox"}, "here"), tokenizer)
    assert text.labels == text.input_ids and text.supervised == len(text.input_ids) - 1


def test_chat_items_follow_the_template() -> None:
    tokenizer = tiny_models.tokenizer()
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    record = Record({"instruction": "where?", "output": " the lake"}, "here")
    with pytest.raises(InputError, match="chat template"):
        tokenize_item(record, tokenizer, "chat")
    tokenizer.chat_template = template
    try:
        item = tokenize_item(record, tokenizer, "chat")
    finally:
        tokenizer.chat_template = None
    supervised = [token for token, label in zip(item.input_ids, item.labels, strict=True) if label != IGNORE]
    assert tokenizer.decode(supervised) == "the lake</s>" and tokenizer.decode(item.input_ids).startswith("[user]where?")


@pytest.mark.parametrize(
    "content",
    [
        *({}, {"instruction": "a"}, {"instruction": "a", "output": " "}, {"text": ""}, {"text": 3}, "a text"),
        *({"input_ids": [1], "labels": []}, {"input_ids": [1.5, 2]}, {"input_ids": [[1, 2]]}, {"input_ids": [1, 2], "labels": [-1, 2]}),
    ],
)
def test_items_with_nothing_to_use_name_their_line(content: dict | str) -> None:
    with pytest.raises(InputError, match="file.jsonl:7"):
        tokenize_item(Record(content, "file.jsonl:7"), tiny_models.tokenizer())


def test_probe_forms(tmp_path: Path) -> None:
    path = tmp_path / "probe.jsonl"
    path.write_text('{"input_ids": [5, 6, 7]}')
    assert load_items(path) == load_items(str(path)) == [Item((5, 6, 7), (5, 6, 7))]
    tokens = load_items([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
    assert tokens == [Item((5, 6, 7), (-100, 6, 7))] and tokens[0].supervised == 2
    with pytest.raises(InputError, match="tokenizer"):
        load_items([{"text": "a"}])
    with pytest.raises(InputError, match="no supervised token"):
        load_items([{"input_ids": [5, 6], "labels": [-100, -100]}])
    assert load_items(path, vocabulary=8) == load_items(path)
    with pytest.raises(InputError, match=f"^{path}:1: token 7, but the model has 7: tokenise it with the model's own tokenizer$"):
        load_items(path, vocabulary=7)
    for beyond in ({"input_ids": [5, 300]}, Item((300, 6), (300, 6))):
        with pytest.raises(InputError, match="^probe item 2: token 300, but the model has 300"):
            score_layers(tiny_models.model(), [{"input_ids": [5, 6, 299]}, beyond])
    wrong = [
        ([5, 6, 7], [6, 7, -100], "label 6 at position 0, whose token is 5: labels are the tokens of their own positions"),
        ([5, 6, 7], [-100, 6], "3 input_ids but 2 labels"),
        ([5, -1, 7], [5, -1, 7], "input_ids must be 0 or more"),
    ]
    for ids, labels, message in wrong:
        with pytest.raises(InputError, match=message):
            Item(tuple(ids), tuple(labels))
        with pytest.raises(InputError, match=f"^probe item 1: {message}"):
            load_items([{"input_ids": ids, "labels": labels}])


def test_questions() -> None:
    tokenizer = tiny_models.tokenizer()
    content = {"question": "Which?", "choices": ["fox", "otter", "heron"], "answer": 1}
    choices = tokenize_choices(Record(content, "here"), tokenizer)
    assert choices.answer == 1 and tokenizer.decode(choices.options[2].input_ids).endswith("Answer: C. heron")
    assert tokenize_choices(Record({**content, "answer": "b"}, "here"), tokenizer) == choices
    with pytest.raises(InputError, match="found 'D'"):
        tokenize_choices(Record({**content, "answer": "D"}, "here"), tokenizer)
    for change in ({"answer": 3}, {"answer": None}, {"choices": ["one"]}, {"question": None}, {"choices": "one"}):
        with pytest.raises(InputError, match="^here: "):
            tokenize_choices(Record({**content, **change}, "here"), tokenizer)


def test_splits_depend_on_content_only() -> None:
    records = [Record({"text": f"item {number}"}, f"a:{number}") for number in range(100)]
    parts, shuffled = split_probe(records, "probe"), split_probe([*records[::-1], records[3]], "probe")
    assert parts.scoring == [Record(record.content, f"a:{record.content['text'].split()[1]}") for record in shuffled.scoring]
    assert (len(parts.scoring), len(parts.steering), len(parts.reporting)) == (60, 20, 20)
    texts = [record.content["text"] for record in records]
    held = hold_out(texts + texts[:2], "domain")
    assert len(held) == 2 and held < set(texts) and held == hold_out(texts[::-1], "domain")
    assert by_hash(records, seed=1) != by_hash(records, seed=2) and len(by_hash(records, seed=1)) == 100


def test_the_lowest_hashes_are_held_out() -> None:
    texts = sorted((f"text {number}" for number in range(500)), key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    assert hold_out(texts[::-1], "domain") == set(texts[:10])
    fallen = [is_held_out(text, 0.1) for text in texts]
    assert fallen == sorted(fallen, reverse=True) and 30 < sum(fallen) < 70


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [2, 5, 40, FEW - 1])
def test_of_few_documents_the_same_is_held_out_streamed_and_in_memory(count: int, seed: int) -> None:
    texts = [f"text {seed} {number}" for number in range(count)]
    held, share = hold_out_of_streams([iter(texts[::3]), iter([*texts, texts[0]])], "domain", 1)
    assert held == hold_out(texts, "domain") and len(held) == 1 and share == 0


def test_of_many_documents_a_stream_holds_out_those_that_fall_out_and_at_least_one() -> None:
    texts = [f"text {number}" for number in range(3000)]
    fallen, kept = ([text for text in texts if is_held_out(text) == out] for out in (True, False))
    assert hold_out_of_streams([iter(texts)], "domain", 256) == ({*fallen}, HELD_OUT) and 30 < len(fallen) < 90
    assert hold_out_of_streams([iter(texts[:1500]), iter(texts[1500:])], "domain", 5)[0] < {*fallen}
    lowest = min(kept, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert hold_out_of_streams([iter(kept)], "domain", 256) == ({lowest}, HELD_OUT)
    with pytest.raises(InputError, match="^domain: one document only"):
        hold_out_of_streams([iter(["only"]), iter(["only"])], "domain", 256)


@pytest.mark.parametrize("count", [3, 4, 5, 7])
def test_small_probes_fill_every_part(count: int) -> None:
    parts = split_probe([Record({"text": str(number)}, "x") for number in range(count)], "probe")
    assert all(map(len, (parts.scoring, parts.steering, parts.reporting)))


def test_too_small_corpora_are_refused() -> None:
    one = [Record({"text": "only"}, "x")] * 3
    with pytest.raises(InputError, match="at least 3"):
        split_probe(one, "probe")
    with pytest.raises(InputError, match="one document only"):
        hold_out(["only", "only"], "domain")


def test_tokens_are_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(tmp_path))
    tokenizer = tiny_models.tokenizer()
    texts = [sentence for sentence in tiny_models.SENTENCES[:7]]
    first = tokenize_documents(texts, tokenizer)
    assert tokenizer.decode(first[3]) == texts[3] + "</s>" and len(first) == 7
    (file,) = tmp_path.rglob("*.safetensors")
    monkeypatch.setattr("adept_fast.data.documents._tokenize", None)
    again = tokenize_documents(texts, tokenizer)
    assert np.array_equal(again.ids, first.ids) and np.array_equal(again.starts, first.starts)
    monkeypatch.undo()
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(tmp_path))
    file.write_bytes(b"broken")
    assert np.array_equal(tokenize_documents(texts, tokenizer).ids, first.ids)
    assert tokenize_documents(texts[:5], tokenizer).tokens < first.tokens
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<pad>"
    assert tokenizer.decode(tokenize_documents(texts, other)[3]) == texts[3] + "<pad>"


def test_the_end_of_a_text_stands_once() -> None:
    closing, plain = copy.deepcopy(tiny_models.tokenizer()), tiny_models.tokenizer()
    closing.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", plain.eos_token_id)])
    texts = tiny_models.SENTENCES[:2]
    assert closing(texts[0])["input_ids"][-1] == plain.eos_token_id != plain(texts[0])["input_ids"][-1]
    assert all(map(np.array_equal, document_tokens(texts, closing), document_tokens(texts, plain)))


def test_nodes_whose_processes_have_the_same_number_may_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    with staged_file(path) as one:
        one.write_text("one")
        with staged_file(path) as other:
            other.write_text("other")
        assert path.read_text() == "other" and one.read_text() == "one"
    assert path.read_text() == "one" and len([*tmp_path.iterdir()]) == 1


def test_weights_are_passes_over_a_document() -> None:
    weights = np.array([2.0] * 10 + [0.5] * 1000 + [1.0] * 10)
    order = document_order(len(weights), weights, seed=3)
    counts = np.bincount(order, minlength=len(weights))
    assert (counts[:10] == 2).all() and (counts[-10:] == 1).all() and 430 < counts[10:1010].sum() < 570
    assert np.array_equal(order, document_order(len(weights), weights, seed=3)) and (np.diff(order) < 0).mean() > 0.4
    assert not np.array_equal(order, document_order(len(weights), weights, seed=4))


def test_a_weight_above_one_adds_its_fraction_by_chance() -> None:
    times = np.bincount(document_order(2000, np.full(2000, 1.25), seed=0))
    assert set(times.tolist()) == {1, 2} and 0.2 < (times == 2).mean() < 0.3


def test_a_document_is_left_to_train_on() -> None:
    assert len(hold_out(["one", "two", "three"], "texts", share=1.0)) == 2
