"""A folder or a glob is its files, in sorted order, each read by the rule of its own ending."""

from __future__ import annotations

import gzip
import json
import os
import time
from itertools import islice
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from adept_fast.data.readers import read, reader
from adept_fast.data.source_files import describe_skipped, source_files
from adept_fast.data.sources import Source
from adept_fast.data.templates import document_text
from adept_fast.errors import InputError

ROWS = [{"text": f"row {number}", "id": number} for number in range(3)]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def texts(path: Path | str, **how: str) -> list[str | None]:
    return [document_text(record) for record in read(Source(str(path), **how))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of each kind, and some that are not read."""
    made = tmp_path / "corpus"
    (made / "b").mkdir(parents=True)
    (made / "a.md").write_text("# One\n\nfirst\n\n# Two\n\nsecond\n")
    (made / "b" / "c.txt").write_text("".join(f"line {number}\n" for number in range(50)))
    (made / "b" / "d.TXT").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    (made / "e.jsonl").write_text(lines(ROWS[:1]))
    (made / "f.json.gz").write_bytes(gzip.compress(json.dumps(ROWS[1:]).encode()))
    (made / "g.json").write_text('{"instruction": "asked", "output": " answered"}')
    (made / "h.md.gz").write_bytes(gzip.compress(b"over\n\nthere"))
    datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": None}]).to_parquet(made / "i.parquet")
    (made / "j.txt").write_text("\n \n")
    (made / "picture.png").write_bytes(b"\x89PNG")
    (made / "LICENSE").write_text("free")
    (made / ".hidden.txt").write_text("no")
    (made / ".git").mkdir()
    (made / ".git" / "k.txt").write_text("no")
    return made


EXPECTED = [
    "# One\n\nfirst\n\n# Two\n\nsecond",
    "\n".join(f"line {number}" for number in range(50)),
    *("one", "two", "row 0", "row 1", "row 2", "asked answered", "over\n\nthere", "ab", None, None),
]


def test_a_folder_is_its_files_each_by_its_own_rule(folder: Path) -> None:
    assert texts(folder) == EXPECTED
    found = source_files(Source(str(folder)))
    assert [file.name for file in found.files][:3] == ["a.md", "c.txt", "d.TXT"] and len(found.files) == 9
    assert describe_skipped(found.skipped) == "2 files whose kind is not read (.png, LICENSE)"
    assert found.bytes == sum(file.stat().st_size for file in found.files)


def test_a_folder_goes_on_from_every_record(folder: Path) -> None:
    source = Source(str(folder))
    whole = [(record.content, record.where) for record in reader(source).records()]
    assert len(whole) == len(EXPECTED)
    for count in range(len(whole) + 1):
        first, again = reader(source), reader(source)
        assert len(list(islice(first.records(), count))) == count
        again.position = json.loads(json.dumps(first.position))
        assert [(record.content, record.where) for record in again.records()] == whole[count:]


def test_a_folder_is_known_by_what_its_files_hold(folder: Path, tmp_path: Path) -> None:
    before = reader(Source(str(folder))).identity()
    moved = folder.rename(tmp_path / "moved")
    assert reader(Source(str(moved))).identity() == before
    (moved / "b" / "c.txt").write_text("other")
    assert reader(Source(str(moved))).identity() != before


def test_a_glob_is_its_files_whatever_their_columns(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(lines([{"instruction": "asked", "output": " answered", "n": 1}]))
    (tmp_path / "a.jsonl").write_text(lines([{"text": "first", "n": "x"}]))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.jsonl").write_text(lines([{"prompt": "p", "completion": "c", "n": [1]}]))
    assert texts(tmp_path / "*.jsonl") == ["first", "asked answered"]
    assert texts(tmp_path / "**" / "*.jsonl") == ["first", "asked answered", "pc"] == texts(tmp_path)
    (tmp_path / "[odd].txt").write_text("a name with a glob's signs\n")
    assert texts(tmp_path / "[odd].txt") == ["a name with a glob's signs"]


@pytest.mark.parametrize("source", ["corpus", "corpus/*.txt", "corpus/z.txt"])
@pytest.mark.parametrize("kind", ["a pipe", "no such file"])
def test_what_is_no_file_is_named_and_not_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, kind: str) -> None:
    monkeypatch.chdir(folder.parent)
    if kind == "a pipe":
        os.mkfifo("corpus/z.txt")
    else:
        Path("corpus/z.txt").symlink_to("gone.txt")
    with pytest.raises(InputError, match=f"^corpus/z.txt: {kind}"):
        source_files(Source(source))


def test_a_markdown_file_alone_is_parted_at_its_headings(tmp_path: Path) -> None:
    text = "before\n\n# One\n\nfirst\n```\n# no heading\n\n```\n## Two\n#no heading\nsecond\n"
    (tmp_path / "a.md").write_text(text)
    parts = ["before", "# One\n\nfirst\n```\n# no heading\n\n```", "## Two\n#no heading\nsecond"]
    assert texts(tmp_path / "a.md") == parts
    source = Source(str(tmp_path / "a.md"))
    for count in range(4):
        first, again = reader(source), reader(source)
        assert len(list(islice(first.records(), count))) == count
        again.position = first.position
        assert [document_text(record) for record in again.records()] == parts[count:]
    (tmp_path / "b.md").write_text("# One heading\n\nand a paragraph\n")
    assert texts(tmp_path / "b.md") == ["# One heading", "and a paragraph"]


def test_datasets_reads_what_it_made_itself(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A folder of texts\n\nconfigs: none\n")
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    assert texts(tmp_path) == ["# A folder of texts\n\nconfigs: none", "row 0", "row 1", "row 2"]
    card = '---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files: "a.jsonl"\n---\n# A dataset\n'
    (tmp_path / "README.md").write_text(card)
    assert source_files(Source(str(tmp_path))) is None and texts(tmp_path) == ["row 0", "row 1", "row 2"]
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="saved: neither a file nor a dataset.*load_from_disk"):
        read(Source(str(tmp_path / "saved")))
    with pytest.raises(InputError, match=r"savd: neither a file nor a dataset.*: did you mean .*saved\?"):
        read(Source(str(tmp_path / "savd")))


def test_splits_are_not_mixed_in_silence(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "test-0.jsonl"):
        (tmp_path / name).write_text(lines(ROWS))
    with pytest.raises(InputError, match=r"holds a split to train on and another \(train-0.jsonl, test-0.jsonl\).*split="):
        read(Source(str(tmp_path)))
    assert len(read(Source(str(tmp_path), split="test"))) == 3 and len(read(Source(str(tmp_path / "train*")))) == 3
    (tmp_path / "texts").mkdir()
    for name in ("training.md", "test.md"):  # chapters, not splits
        (tmp_path / "texts" / name).write_text(name)
    assert texts(tmp_path / "texts") == ["test.md", "training.md"]


@pytest.mark.parametrize(
    ("path", "how", "message"),
    [
        ("none", {}, "none: an empty folder: no file ends in .jsonl, .json, .parquet, .txt, .md"),
        ("pictures", {}, r"pictures: an empty folder.*of what it holds none is read \(.png\)"),
        ("*.png", {}, "a.png: unknown kind of file; use one of .jsonl"),
        ("*.nothing", {}, "matches no file"),
        ("a.parquet.gz", {}, "unknown kind of file"),
        ("a.jsonl", {"split": "test"}, "split=test: files have no splits"),
        ("a.txt", {"column": "body"}, "column=body: a text has no columns"),
    ],
)
def test_what_a_source_has_no_files_for_is_refused(tmp_path: Path, path: str, how: dict[str, str], message: str) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "pictures/b.png", "a.parquet.gz", "a.txt", "a.jsonl"):
        (tmp_path / name).write_text("x")
    with pytest.raises(InputError, match=message):
        read(Source(str(tmp_path / path), **how))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\n\nna\xefve\n", r"a.txt:3: not UTF-8 \(byte 0xef at column 3\): save the file as UTF-8 \(iconv"),
        ("a.md", b"# One\n\n# Two\n\xe9t\xe9\n", r"a.md:4: not UTF-8 \(byte 0xe9 at column 1\)"),
        ("a.json", b'[{"text": "fine"},\n{"text": "na\xefve"}]', r"a.json:2: not UTF-8 \(byte 0xef at column 13\)"),
        ("a.jsonl", b'{"text": "fine"}\r\n{"text": "na\xefve"}\r\n', r"a.jsonl:2: not UTF-8 \(byte 0xef at column 13\)"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', "a.jsonl:1: not valid JSON .the key 'text' twice"),
        ("a.json", b'[{"text": "a", "text": "b"}]', "a.json: not valid JSON .the key 'text' twice"),
        ("a.json", b'[{"text": "a"}, 3]', "a.json item 2: expected a JSON object, found int"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS * 999).encode())[:-90], "a.jsonl.gz: cannot be read"),
        ("a.txt.gz", gzip.compress(lines(ROWS * 999).encode())[:-90], "a.txt.gz: cannot be read"),
        ("a.json.gz", gzip.compress(json.dumps(ROWS * 999).encode())[:-90], "a.json.gz: cannot be read"),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        texts(tmp_path / name)


def test_faults_of_a_parquet_file(tmp_path: Path) -> None:
    column = pyarrow.array(["a"])
    parquet.write_table(pyarrow.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "twice.parquet")
    with pytest.raises(InputError, match="twice.parquet: the column 'text' stands there twice"):
        texts(tmp_path / "twice.parquet")
    raw = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"fine", b"na\xefve"]).buffers())
    parquet.write_table(pyarrow.Table.from_arrays([raw], names=["text"]), tmp_path / "raw.parquet")
    with pytest.raises(InputError, match="raw.parquet row 2: a text is not UTF-8"):
        texts(tmp_path / "raw.parquet")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(InputError, match="numbers.parquet row 1: 'text' must be a text, found 1"):
        texts(tmp_path / "numbers.parquet")


def test_line_ends_and_byte_order_marks_are_no_part_of_a_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(ROWS).replace("\n", "\r\n").encode())
    (tmp_path / "b.md").write_bytes(b"\xef\xbb\xbf# One\r\n\r\ntext\r\n")
    assert texts(tmp_path) == ["row 0", "row 1", "row 2", "# One\n\ntext"]


def test_where_the_hub_cannot_be_reached_a_mistyped_name_is_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreached(*_: object, **__: object) -> None:
        raise OSError("no such host")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreached)
    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", unreached)  # datasets would ask it again and again
    start, before = time.monotonic(), datasets.config.HF_HUB_OFFLINE
    with pytest.raises(InputError, match="^notez: neither a file .*the hub cannot be reached, and the cache has no such dataset"):
        read(Source("notez"))
    assert time.monotonic() - start < 5 and datasets.config.HF_HUB_OFFLINE == before
