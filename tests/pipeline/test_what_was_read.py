"""Before training a run says what it read, what it left out and why, and shows two documents as the model will see them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import datasets
import pytest

from adept_fast.cli.main import main
from adept_fast.data.stream import StreamedText
from adept_fast.errors import InputError
from adept_fast.pipeline.datasets import Datasets
from adept_fast.pipeline.recipe import load
from adept_fast.pipeline.source_model import SourceModel
from adept_fast.pipeline.tune import planned_text
from tests.data.test_records import TEMPLATE
from tests.support import tiny_models
from tests.support.news import heard

SENTENCES = tiny_models.SENTENCES[:12]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_models.model().save_pretrained("model")
    tokenizer = copy.deepcopy(tiny_models.tokenizer())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("model")
    Path("probe.jsonl").write_text(rows([{"text": f"probe {number}"} for number in range(9)]))
    Path("held.txt").write_text("one text\n\nanother\n")
    return tmp_path


def rows(given: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in given)


def told(domain: str, *more: str) -> tuple[list[str], Datasets]:
    """What planned_text says, and of what."""
    given = ["model_name_or_path=model", "output_dir=out", "probe=probe.jsonl", f"domain={domain}", "tune.per_device_train_batch_size=1"]
    recipe = load(None, [*given, "eval.domain=held.txt", *more])
    data = Datasets(recipe, SourceModel(recipe))
    with heard() as said:
        planned_text(recipe, data.source, data)
    return said, data


def alpaca(folder: Path) -> tuple[str, list[str]]:
    given = [{"instruction": "How many stones?", "input": s, "output": f"{n} stones", "id": n} for n, s in enumerate(SENTENCES)]
    (folder / "alpaca.jsonl").write_text(rows(given))
    return "alpaca.jsonl", [f"How many stones?\n{s}\n{n} stones</s>" for n, s in enumerate(SENTENCES)]


def messages(folder: Path) -> tuple[str, list[str]]:
    turns = [[{"role": "user", "content": s}, {"role": "assistant", "content": f"{n}"}] for n, s in enumerate(SENTENCES)]
    (folder / "chat.jsonl").write_text(rows([{"messages": each, "id": n} for n, each in enumerate(turns)]))
    return "chat.jsonl", [f"<s>[user]{s}</s>\n[assistant]{n}</s>\n" for n, s in enumerate(SENTENCES)]


def markdown(folder: Path) -> tuple[str, list[str]]:
    (folder / "docs" / "deep").mkdir(parents=True)
    names = sorted(f"{'deep/' if number % 3 else ''}{number:02}.md" for number in range(len(SENTENCES)))
    for name, sentence in zip(names, SENTENCES, strict=True):
        (folder / "docs" / name).write_text(f"# {name}\n\n{sentence}\n")
    (folder / "docs" / "picture.png").write_bytes(b"\x89PNG")
    order = sorted((folder / "docs").rglob("*.md"), key=lambda file: file.relative_to(folder / "docs").parts)
    return "docs", [f"{file.read_text().strip()}</s>" for file in order]


def unlike(folder: Path) -> tuple[str, list[str]]:
    (folder / "parts").mkdir()
    (folder / "parts" / "a.jsonl").write_text(rows([{"text": s, "id": n} for n, s in enumerate(SENTENCES[:5])]))
    (folder / "parts" / "b.jsonl").write_text(rows([{"prompt": s, "completion": " Yes.", "id": [n]} for n, s in enumerate(SENTENCES[5:])]))
    return "'parts/*.jsonl'", [f"{s}</s>" for s in SENTENCES[:5]] + [f"{s} Yes.</s>" for s in SENTENCES[5:]]


def nulls(folder: Path) -> tuple[str, list[str]]:
    given = [{"text": None if n % 4 == 1 else s, "id": n} for n, s in enumerate(SENTENCES)]
    datasets.Dataset.from_list(given).to_parquet(folder / "nulls.parquet")
    return "nulls.parquet", [f"{row['text']}</s>" for row in given if row["text"]]


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize("corpus", [alpaca, messages, markdown, unlike, nulls])
def test_the_documents_shown_and_the_tokens_counted_are_those_of_the_files(here: Path, corpus, streaming: str) -> None:
    domain, texts = corpus(here)
    tokenizer = tiny_models.tokenizer()
    said, _ = told(domain, f"tune.streaming={streaming}", "tune.block_size=128")
    files, tokens = 12 if corpus is markdown else 2 if corpus is unlike else 1, sum(len(tokenizer(text)["input_ids"]) for text in texts)
    row = re.split(" {2,}", next(line for line in said if line.startswith(domain.strip("'"))))
    left = {nulls: "3 empty", markdown: "1 file whose kind is not read (.png)"}.get(corpus, "nothing")
    assert row == [domain.strip("'"), "domain", f"{files}", f"{len(texts)}", f"{tokens:,}", left]
    assert [line for line in said if "not read: " in line] == [f"{row[0]}: keys that are not read: id"] * (corpus is not markdown)
    starts = [number for number, line in enumerate(said) if line.startswith("a document as the model will see it")]
    shown = [[line[4:] for line in said[start + 1 :] if line.startswith("  | ")] for start in starts]
    shown = ["\n".join(lines[: len(lines) - len(later)]) for lines, later in zip(shown, [*shown[1:], []], strict=True)]
    assert len(shown) == 2 and (set(shown) <= set(texts) if streaming == "true" else shown == texts[:2])
    counts = [int(re.search(r"\((\d+) tokens", said[start])[1]) for start in starts]
    assert counts == [len(tokenizer(text)["input_ids"]) for text in shown]


def test_a_document_longer_than_a_block_is_shown_where_it_goes_on(here: Path) -> None:
    Path("domain.txt").write_text(" ".join(SENTENCES) + "\n\nshort\n")
    said, data = told("domain.txt", "tune.block_size=32")
    lines = said[next(number for number, line in enumerate(said) if "as the model will see" in line) :]
    length = len(data.source.tokenizer(" ".join(SENTENCES))["input_ids"]) + 1
    assert lines[0] == f"a document as the model will see it ({length} tokens, {-(-length // 32)} blocks if it begins one):"
    assert lines[2] == "  -- the next block --" and lines[4] == f"  -- {-(-length // 32) - 2} blocks more --"
    assert SENTENCES[0].startswith(lines[1][4:60]) and lines[5:7] == [
        "a document as the model will see it (5 tokens):".replace("5", str(len(data.source.tokenizer("short")["input_ids"]) + 1)),
        "  | short</s>",
    ]


def test_what_serves_another_purpose_is_counted(here: Path) -> None:
    Path("domain.jsonl").write_text(rows([{"text": s} for s in [*SENTENCES, "probe 3", "one text", ""]]))
    for streaming, why in (("false", "2 in the probe or eval"), ("true", "2 held out or in the probe or eval")):
        said, _ = told("domain.jsonl", f"tune.streaming={streaming}")
        (row,) = [line for line in said if line.startswith("domain.jsonl")]
        assert row.endswith(f"1 empty, {why}") and " 12 " in row


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_malformed_rows_stop_before_the_first_step_and_the_same_command_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str], streaming: str
) -> None:
    good = [json.dumps({"text": f"{s} Note {n}."}) for n, s in enumerate(tiny_models.SENTENCES * 3)]
    bad = [*good[:70], '{"text": 3}', *good[70:100], "", '{"text"', *good[100:]]
    given = ["model_name_or_path=model", "output_dir=out", "probe=probe.jsonl", "domain=domain.jsonl", "eval.domain=held.txt"]
    given += ["expand.layers=[1]", "tune.max_steps=2", "tune.per_device_train_batch_size=1", f"tune.streaming={streaming}"]
    Path("domain.jsonl").write_text("\n".join(bad))
    assert main(["run", *given]) == 2 and not (here / "out").exists()
    assert "domain.jsonl:71: 'text' must be a text, found 3; repair it, or set malformed_rows=1" in capsys.readouterr().err
    assert main(["run", *given, "malformed_rows=1"]) == 2
    assert "domain.jsonl:103: not valid JSON" in capsys.readouterr().err
    assert main(["run", *given, "malformed_rows=2"]) == 0
    assert "2 malformed (domain.jsonl:71, ...)" in capsys.readouterr().out
    assert main(["run", *given, "malformed_rows=5"]) == 0, "the limit decides no bit"
    Path("domain.jsonl").write_text("\n".join(good))
    assert main(["run", *given, "output_dir=repaired"]) == 0


def test_chats_need_a_template_before_anything_is_scored(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    domain, _ = messages(here)
    tiny_models.tokenizer().save_pretrained("model")
    (here / "model" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(InputError, match="^chat.jsonl:1: messages need a chat template"):
        told(domain)


def test_the_size_of_a_folder_decides_whether_it_is_streamed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domain, _ = markdown(here)
    size = sum(file.stat().st_size for file in (here / "docs").rglob("*.md"))
    for above, kind in ((size, False), (size - 1, True)):
        monkeypatch.setattr("adept_fast.pipeline.datasets.STREAM_ABOVE", above)
        _, data = told(domain)
        assert isinstance(data.training(), StreamedText) == kind


def test_of_few_documents_the_same_are_held_out_and_trained_on_streamed_and_in_memory(here: Path) -> None:
    domain, texts = alpaca(here)
    kept: list[tuple[list[str], set[str]]] = []
    for streaming in ("true", "false"):
        _, data = told(domain, "eval.domain=null", f"tune.streaming={streaming}", "tune.max_steps=2")
        training = data.training()
        streamed = isinstance(training, StreamedText)
        trained = [*training.texts(training.sources[0], data.source.encoder)] if streamed else training.texts
        kept.append(([record.content["text"] for record in data.held_out(None)], {*trained}))
    (held, trained), in_memory = kept
    assert (held, trained) == in_memory and len(held) == 1 and len(trained) == len(texts) - 1 and held[0] not in trained
