"""What a record means, and what becomes of it: the text to train on, and tokens with labels on the answers alone."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from adept_fast.data.documents import document_tokens, tokenize_documents
from adept_fast.data.items import IGNORE, Item, load_items, tokenize_item
from adept_fast.data.readers import read
from adept_fast.data.records import FORMATS, MalformedRecord, parse_record, unread
from adept_fast.data.source_summary import SourceSummary
from adept_fast.data.sources import Record, Source
from adept_fast.data.templates import document_text
from adept_fast.errors import InputError
from tests.support import tiny_models

TEMPLATE = (
    "{{ bos_token }}{% if tools %}[{{ tools | length }} tools]{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
THOUGHTFUL = (  # as Qwen3's: the last answer has an empty thought before it, earlier ones have none
    "{% for m in messages %}[{{ m.role }}]{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
FORGETFUL = "{% for m in messages %}{% if loop.last or messages | length < 3 %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    made = copy.deepcopy(tiny_models.tokenizer())
    made.chat_template = template
    return made


ASKED, ANSWERED = {"role": "user", "content": "where?"}, {"role": "assistant", "content": "the lake"}
SHARED = [{"from": "human", "value": "where?"}, {"from": "gpt", "value": "the lake"}]
ONE_TURN = "<s>[user]where?</s>\n[assistant]the lake</s>\n"
WITH_SYSTEM = f"<s>[system]be brief</s>\n{ONE_TURN[3:]}"
ALPACA = "Below is an instruction that describes a task"


def record(content: Any, **how: Any) -> Record:
    return Record(content, "file.jsonl:7", **how)


@pytest.mark.parametrize(
    ("content", "text", "answers", "beside"),
    [
        ({"text": " a fox\n", "id": 3}, " a fox\n", None, {"id"}),
        ({"instruction": "count", "output": "three"}, "count\nthree", ["\nthree"], set()),
        ({"instruction": "count ", "output": "three"}, "count three", ["three"], set()),
        ({"instruction": "count", "input": "the stones", "output": "three"}, "count\nthe stones\nthree", ["\nthree"], set()),
        ({"instruction": "count", "input": "", "output": " three", "text": "both"}, "count three", [" three"], {"text"}),
        ({"instruction": "", "input": "the stones", "output": "three"}, "the stones\nthree", ["\nthree"], set()),
        (
            {"instruction": "and now?", "output": "four", "system": "count", "history": [["one", "two"], ["then?", " three"]]},
            "count\none\ntwo\nthen? three\nand now?\nfour",
            ["\nfour"],
            set(),
        ),
        ({"instruction": "count", "context": "the stones", "response": "three", "category": "qa"}, "count\nthe stones\nthree",
         ["\nthree"], {"category"}),
        ({"instruction": "count", "input": "the stones", "response": "three"}, "count\nthe stones\nthree", ["\nthree"], set()),
        ({"instruction": "count", "context": "", "response": "three"}, "count\nthree", ["\nthree"], set()),
        ({"question": "how many?", "answer": "2 + 1 = 3\n#### 3"}, "how many?\n2 + 1 = 3\n#### 3", ["\n2 + 1 = 3\n#### 3"], set()),
        ({"question": "a?", "answer": "b", "id": 7, "source": "c"}, "a?\nb", ["\nb"], {"id", "source"}),
        ({"question": "how many?", "answer": "three", "text": "a fox"}, "a fox", None, {"question", "answer"}),
        ({"prompt": "the fox ", "completion": "walks", "meta": {}}, "the fox walks", [" walks"], {"meta"}),
        ({"prompt": "the", "completion": "re"}, "there", None, set()),
        ({"messages": [ASKED, ANSWERED], "source": "x"}, ONE_TURN, ["the lake</s>\n"], {"source"}),
        ({"messages": [ASKED, ANSWERED], "system": "be brief"}, WITH_SYSTEM, ["the lake</s>\n"], set()),
        ({"conversations": SHARED}, ONE_TURN, ["the lake</s>\n"], set()),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, ONE_TURN, ["the lake</s>\n"], set()),
        ({"messages": [ASKED, ANSWERED] * 2}, ONE_TURN + ONE_TURN[3:], ["the lake</s>\n"] * 2, set()),
        ({"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]}, ONE_TURN + ONE_TURN[3:], ["the lake</s>\n"], set()),
        ({"messages": [ASKED, ANSWERED], "tools": '[{"name": "f"}]'}, f"<s>[1 tools]{ONE_TURN[3:]}", ["the lake</s>\n"], set()),
        (
            {"question": "Which?", "choices": ["fox", "otter"], "answer": "b"},
            "Which?\nA. fox\nB. otter\nAnswer: B. otter",
            [" B. otter"],
            set(),
        ),
    ],
)
def test_what_records_of_each_format_become(content: dict, text: str, answers: list[str] | None, beside: set[str]) -> None:
    given = tokenizer()
    assert document_text(record(content), given) == text and unread(record(content)) == beside
    item = tokenize_item(record(content), given)
    assert given.decode(item.input_ids) == text
    if answers is None:
        return
    supervised = [token if label != IGNORE else None for token, label in zip(item.input_ids, item.labels, strict=True)]
    spans = [[]]
    for token in supervised:
        spans = [*spans, []] if token is None else [*spans[:-1], [*spans[-1], token]]
    assert [given.decode(span) for span in spans if span] == answers


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"instruction": "count", "output": "three"}, "### Instruction:\ncount\n\n### Response:\nthree"),
        ({"instruction": "count", "input": "s", "output": "three"}, "### Instruction:\ncount\n\n### Input:\ns\n\n### Response:\nthree"),
        ({"prompt": "count", "completion": "three"}, "### Instruction:\ncount\n\n### Response:\nthree"),
    ],
)
def test_instructions_may_be_written_as_alpaca_has_them(content: dict, text: str) -> None:
    given = tokenizer(None)
    whole = document_text(record(content, template="alpaca"))
    assert whole.startswith(ALPACA) and whole.endswith("\n\n" + text) and ("paired with an input" in whole) == ("input" in content)
    item = tokenize_item(record(content), given, "alpaca")
    assert given.decode(item.input_ids) == whole
    assert given.decode([token for token, label in zip(item.input_ids, item.labels, strict=True) if label != IGNORE]) == "three"
    assert item == tokenize_item(record(content, template="alpaca"), given)
    assert ALPACA not in document_text(record({**content, "system": "Be brief."}, template="alpaca")) or "prompt" in content


def test_instructions_may_be_written_by_the_chat_template() -> None:
    content = {"instruction": "where?", "input": "by foot", "output": " the lake ", "system": "be brief", "history": [["a", "b"]]}
    text = document_text(record(content, template="chat"), tokenizer())
    assert text == "<s>[system]be brief</s>\n[user]a</s>\n[assistant]b</s>\n[user]where?\nby foot</s>\n[assistant]the lake</s>\n"
    item = tokenize_item(record(content), tokenizer(), "chat")
    assert tokenizer().decode([token for token in item.labels if token != IGNORE]) == "the lake</s>\n", "history is no answer"


def test_a_chat_begins_and_ends_as_its_template_has_it() -> None:
    given = tokenizer()
    chat = document_text(record({"messages": [ASKED, {**ANSWERED, "content": "a </s> b"}]}), given)
    ids = document_tokens(["plain", chat], given)
    assert ids[0][-1] == given.eos_token_id and given.decode(ids[1]) == chat
    ends, begins = (ids[1].tolist().count(token) for token in (given.eos_token_id, given.bos_token_id))
    assert (ends, begins) == (2, 1), "what a message says of control tokens is text"


def test_the_cache_knows_a_chat_from_a_text_of_the_same_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(tmp_path))
    given = tokenizer()
    chat = document_text(record({"messages": [ASKED, ANSWERED]}), given)
    as_text, as_chat = (tokenize_documents([text], given) for text in (str.__str__(chat)[:], chat))
    assert as_text.tokens > as_chat.tokens and given.decode(as_chat[0]) == ONE_TURN


def test_templates_that_write_the_last_answer_otherwise() -> None:
    item = tokenize_item(record({"messages": [ASKED, ANSWERED] * 2}), tokenizer(THOUGHTFUL))
    assert tokenizer().decode([token for token in item.labels if token != IGNORE]) == "the lake</s><think></think>the lake</s>"
    with pytest.raises(MalformedRecord, match=r"^file.jsonl:7: this chat template rewrites earlier"):
        tokenize_item(record({"messages": [ASKED, ANSWERED] * 2}), tokenizer(FORGETFUL))


def test_messages_need_a_chat_template() -> None:
    for call in (document_text, tokenize_item):
        with pytest.raises(InputError, match=r"^file.jsonl:7: messages need a chat template.*chat_template.jinja.*prompt and completion"):
            call(record({"messages": [ASKED, ANSWERED]}), tokenizer(None))
    strict = tokenizer("{% for m in messages %}{{ raise_exception('roles must alternate') }}{% endfor %}")
    with pytest.raises(MalformedRecord, match=r"^file.jsonl:7: the chat template refuses these messages \(roles must alternate\)"):
        document_text(record({"messages": [ASKED]}), strict)


def test_a_null_is_not_there() -> None:
    assert document_text(record({"instruction": None, "output": None, "text": "a text"})) == "a text"
    assert document_text(record({"instruction": "a", "output": "b", "messages": None, "input": None, "system": None})) == "a\nb"


@pytest.mark.parametrize(
    "content",
    [
        *({}, {"text": ""}, {"text": " \n"}, {"text": None}, {"text": None, "id": 3}, {"messages": []}, {"input_ids": []}),
        *({"instruction": "a", "output": None, "id": 1}, {"instruction": "a", "output": " "}, {"prompt": "a", "completion": ""}),
        *({"question": "a", "answer": None}, {"question": "", "answer": "b"}, {"instruction": "a", "response": "", "context": "b"}),
        *({"question": "a", "choices": None, "answer": 1}, {"messages": [{**ASKED, "content": " "}]}),
    ],
)
def test_empty_records_mean_nothing(content: dict) -> None:
    assert parse_record(record(content)) is None and document_text(record(content)) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"id": 3}, r"its keys \(id\) are of no format that is read \(text; prompt, completion; question, answer; .*column="),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"its keys \(chosen, prompt, rejected\) .*name 'chosen' 'completion'"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED]}, "give column=chosen where it is a list of messages"),
        ({"question": "a", "answer": "b", "context": "c"}, r"keys \(answer, context, question\) .*nothing but an id stands beside"),
        ({"question": "a", "options": ["b"], "answer": "b"}, "'question' and 'answer' are read where nothing but an id stands beside them"),
        ({"question": "a", "answer": 3}, "'answer' must be a text, found 3"),
        ({"instruction": "a", "response": ["b"]}, "'response' must be a text"),
        ({"instruction": "a", "context": 3, "response": "b"}, "'context' must be a text"),
        ({"instruction": "a", "context": "c", "input": "d", "response": "b"}, "'input' and 'context' both stand"),
        ({"instruction": "a"}, r"its keys \(instruction\)"),
        ({"text": 3}, "'text' must be a text, found 3"),
        ({"text": ["a"]}, "'text' must be a text"),
        ({"text": "\ud83d"}, "'text' holds half of a surrogate pair"),
        ({"instruction": "a", "input": {"b": 1}, "output": "c"}, "'input' must be a text"),
        ({"instruction": "a", "output": "c", "history": ["b"]}, "'history' must be a list of pairs"),
        ({"messages": "hello"}, "'messages' must be a list of messages"),
        ({"messages": ["hello"]}, "each of 'messages' must be a message"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "role must be one of .*found 'wizard'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts that are not text"),
        ({"conversations": [{"from": "human", "value": 3}]}, "'content' must be a text"),
        ({"messages": [ASKED], "tools": "["}, "'tools' must be a list or its JSON"),
        ({"prompt": ["a"], "completion": "b"}, "each of 'prompt, completion'"),
        ({"prompt": {"a": 1}, "completion": "b"}, "must be texts, or lists of messages"),
        ({"question": "a", "choices": ["b", "c"], "answer": 2}, "'answer' must be an index from 0 to 1"),
        ("a text", "expected a record such as"),
    ],
)
def test_malformed_records_are_named(content: Any, message: str) -> None:
    with pytest.raises(MalformedRecord, match=f"^file.jsonl:7: .*{message}"):
        parse_record(record(content))


def test_a_column_is_a_text_or_messages() -> None:
    content = {"body": "a fox", "dialog": [ASKED, ANSWERED], "text": "not this", "none": None}
    assert document_text(record(content, column="body")) == "a fox" and unread(record(content, column="body")) == {"dialog", "text"}
    assert document_text(record(content, column="dialog"), tokenizer()) == ONE_TURN
    assert parse_record(record(content, column="none")) is None
    with pytest.raises(MalformedRecord, match=r"^file.jsonl:7: no column 'other' \(keys: body, dialog, text\)"):
        parse_record(record(content, column="other"))


def test_nulls_of_a_table_are_empty_and_columns_that_it_lacks_are_faults(tmp_path: Path) -> None:
    rows = [{"text": "a fox", "id": 1}, {"text": None, "id": 2}, {"text": "", "id": 3}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    records = read(Source(str(tmp_path / "t.parquet")))
    assert [document_text(entry) for entry in records] == ["a fox", None, None]
    with pytest.raises(MalformedRecord, match=r"t.parquet row 2: no column 'body' \(keys: id\)"):
        parse_record(read(Source(str(tmp_path / "t.parquet"), column="body"))[1])


def test_items_of_every_format_and_what_is_left_out_of_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"text": "the fox", "id": 1},
        {"messages": [ASKED, ANSWERED], "source": "web"},
        {"text": None},
        {"question": "Which?", "choices": ["fox", "otter"], "answer": 1},
        {"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": [1, 1]},
    ]
    path = tmp_path / "probe.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = load_items(path, tokenizer())
    assert caplog.messages == [f"{path}: left out: 1 empty", f"{path}: keys that are not read: attention_mask, id, source"]
    assert len(items) == 4 and items[3] == Item((5, 6), (-100, 6))
    caplog.clear()
    assert load_items([{"text": "the fox"}, items[3]], tokenizer())[1] == items[3]
    assert len(load_items("general", tokenizer())) > 100 and not caplog.messages


def test_the_page_names_every_format_by_its_keys() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "data.md").read_text(encoding="utf-8")
    table = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = [tuple(re.findall("`([a-z_]+)`", row.partition(";")[0])) for row in table]
    assert {form.needed for form in FORMATS} <= {*named}
    beside = {key for row in table for key in re.findall("`([a-z_]+)`", row.partition(";")[2])}
    assert beside == {key for form in FORMATS for key in form.also}


def test_malformed_rows_are_counted_up_to_a_limit() -> None:
    rows = [record({"text": "fine"}), Record({}, "f:2", fault="not valid JSON"), Record({"text": 3}, "f:3"), Record({"text": ""}, "f:4")]
    with pytest.raises(MalformedRecord, match=r"^f:2: not valid JSON; repair it, or set malformed_rows=1 or more"):
        [SourceSummary(Source("f"), limit=0).take(row, parse_record) for row in rows]
    summary = SourceSummary(Source("f"), limit=1)
    with pytest.raises(MalformedRecord, match="^f:3: 'text' must be a text, found 3; 2 rows of f are malformed so far; .*malformed_rows=2"):
        [summary.take(row, parse_record) for row in rows]
    summary = SourceSummary(Source("f"), limit=2)
    for _ in range(2):  # a second pass finds the same rows
        [summary.take(row, parse_record) for row in rows]
    assert summary.left_out == "2 empty, 2 malformed (f:2, ...)"
    with pytest.raises(MalformedRecord, match="^f:2: not valid JSON$"):
        SourceSummary(Source("f")).take(rows[1], parse_record)
