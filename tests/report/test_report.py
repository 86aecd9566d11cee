"""The report: what it claims, that it escapes, that it stands alone, and that gaps in the artefacts are named."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from adept_fast.errors import InputError
from adept_fast.evaluation.results import Answer, EvaluationResults
from adept_fast.report.findings import learnt, lost
from adept_fast.report.page import write_report
from adept_fast.report.side_by_side import pair
from tests.support.report_artefacts import EVIL, change, corpus, evaluation, log, record, refresh, scores, write_all

VOID = {"meta", "br", "hr", "img", "link", "input"}
RECIPE = {"model_name_or_path": "org/tiny", "expand": {"k": 4, "layers": None}, "domain": ({"path": "my <b>.txt", "weight": 1.5},)}
VERSIONS = {"torch": "2.13.0"}


class Page(HTMLParser):
    """Checks that elements close in order, and collects tags, ids, addresses and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action", "data", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


SECTIONS = ["learnt", "lost", "looks", "training", "layers", "rates", "cost", "recipe", "use"]
MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of a whole run."""
    folder = tmp_path_factory.mktemp("whole")
    write_all(folder)
    path = write_report(folder, RECIPE, VERSIONS)
    assert path == folder / "report.html" and not list(folder.glob(".*"))
    return Page(path)


@pytest.mark.slow
def test_a_whole_run_answers_three_questions_first_and_then_has_all_sections(page: Page) -> None:
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS and "missing" not in page.ids
    assert page.addresses[: 3 + len(SECTIONS)] == [f"#{name}" for name in [*SECTIONS[:3], *SECTIONS]]
    first = page.text[: page.text.index("Over training")]
    assert f"Yes: domain loss {MINUS}0.603 nats per token [{MINUS}0.628, {MINUS}0.573]" in first
    assert f"Something: general loss +0.023 nats per token [{MINUS}0.002, 0.053]; 2.2 % of general tokens shifted" in first
    assert "2 prompts: answered by both models, 1 of them differently" in first
    base = ["0.849 [0.799, 0.909]", "2.34 [2.22, 2.48]", "41.0 % [33.0, 48.0]", "2.704 [2.654, 2.764]", "0.500 0.400"]
    tuned = ["0.872 [0.822, 0.932]", "44.0 % [36.0, 51.0]", "2.101 [2.051, 2.161]", "8.17 [7.78, 8.68]", "2.18 %"]
    changes = [f"{MINUS}0.603 [{MINUS}0.628, {MINUS}0.573]", "+3.0 points [2.0, 4.0]", f"{MINUS}0.100 [{MINUS}0.150, {MINUS}0.050]"]
    facts = ["bit-equal logits, verified", "1 min 25 s", "256 tokens/s", "60 steps", "9.5 %", "layers from 7", "One 2 three"]
    tuned.append("7,071 8,409 +1,338 [921, 1,571]")
    given = ["expand.k 4", "domain[0].path my <b>.txt", "domain[0].weight 1.5", "torch 2.13.0", "adept-fast copies dial", "from_pretrained"]
    for words in base + tuned + changes + facts + given:
        assert words in page.text, words
    assert page.tags.count("svg") == 8 and page.tags.count("mark") == 2


@pytest.mark.slow
def test_headings_descend_tables_have_scopes_and_charts_have_names(page: Page) -> None:
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(late - early <= 1 for early, late in pairwise(levels))
    assert not re.search(r"<th(?! scope=)[ >]", page.source) and not re.search(r'<svg(?![^>]*aria-label="[^"])', page.source)
    assert "prefers-color-scheme: dark" in page.source and "#0072b2" not in page.source[page.source.index("</style>") :]


@pytest.mark.slow
def test_the_page_stands_alone_and_ids_do_not_clash(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    assert page.addresses and all(address.startswith("#") and address[1:] in page.ids for address in page.addresses)
    assert set(re.findall(r"url\(#([^)]+)\)", page.source)) <= set(page.ids)
    assert not re.search(r"https?:|@import|url\((?!#)", page.source) and not {"script", "link", "iframe", "img"} & set(page.tags)


@pytest.mark.slow
def test_text_from_artefacts_recipe_and_versions_is_escaped(tmp_path: Path) -> None:
    lines = [*log(), refresh(60, [f"model.layers.4.{EVIL.replace('/', '')}"])]
    results = evaluation()
    results["models"]["expanded"]["reason"] = EVIL
    write_all(tmp_path, EVIL, results, lines)
    page = Page(write_report(tmp_path, {"model_name_or_path": EVIL, EVIL: [{"path": EVIL}]}, {EVIL: EVIL}))
    assert "script" not in page.tags and EVIL in page.text and "<script" not in page.source


@pytest.mark.slow
@pytest.mark.parametrize("name, command, gone", [
    ("scores.json", "score", []),
    ("eval.json", "eval", []),
    ("trainer_log.jsonl", "tune", ["training", "rates"]),
    ("expanded", "expand", []),
])  # fmt: skip
def test_an_absent_artefact_is_named_with_its_command(tmp_path: Path, name: str, command: str, gone: list[str]) -> None:
    write_all(tmp_path)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    page = Page(write_report(tmp_path, RECIPE, VERSIONS))
    assert [section for section in SECTIONS if section not in page.ids] == gone
    assert ("Not evaluated yet" in page.text) == (name == "eval.json")
    assert f"adept-fast {command} makes it" in page.text and page.text.count("makes it") == 1


def test_an_empty_folder_gives_a_page_that_claims_nothing(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, {"model_name_or_path": ""}, {}))
    assert "Not evaluated yet: to be evaluated: base and tuned model" in page.text
    assert page.text.count("makes it") == 4 and "The recipe was not given" in page.text


def test_optional_parts_may_be_absent(tmp_path: Path) -> None:
    (tmp_path / "expanded").mkdir()
    one = {"values": [0.5, 0.25, 1.0], "low": [0.4, 0.2, 0.9], "high": [0.6, 0.3, 1.1], "base_loss": None}
    few = {"schema": 1, "method": "masking", "loss": "answer", "profiles": {"answer": one}, "items": 3, "tokens": 9, "seconds": 1.0}
    (tmp_path / "scores.json").write_text(json.dumps(few))
    inserted = {"schema": 2, "inserted": [{"layer": 2, "copied_from": 1}], "selection": {"layers": [1]}}
    (tmp_path / "expanded" / "adept_config.json").write_text(json.dumps(inserted))
    alone = {"models": {"base": {"general": corpus(0.849), "shifted_tokens": None}}, "changes": {}, "answers": [], "tasks": {}}
    (tmp_path / "eval.json").write_text(json.dumps({**evaluation(), **alone}))
    (tmp_path / "trainer_log.jsonl").write_text('{"event": "step", "step": 3, "loss": 2.5}\n{"event": "step", "st')
    page = Page(write_report(tmp_path, RECIPE, VERSIONS))
    assert "to be evaluated: tuned model" in page.text and "general accuracy" not in page.text and "0.250" in page.text


@pytest.mark.parametrize("general, domain, did, was", [
    (0.849, 2.704, "Not shown.DOMAIN did not change", "No loss shown.GENERAL did not change"),
    (1.2, 2.8, "No.DOMAIN rose by 0.096, from 2.704 to 2.800 nats per token (95 % interval of the difference [0.071, 0.126]).",
     "Something.GENERAL rose by 0.351"),
    (0.7, 2.694, "Not shown.DOMAIN fell by 0.010, from 2.704 to 2.694 nats per token (95 % interval of the difference "
                 f"[{MINUS}0.035, 0.020], which holds 0: no difference is shown; a rise of up to 0.020 is not ruled out).",
     "No loss shown.GENERAL fell by 0.149"),
    (0.7, 2.59, "Yes.DOMAIN fell by 0.114", "No loss shown.GENERAL fell by 0.149"),
])  # fmt: skip
def test_the_findings_are_honest(general: float, domain: float, did: str, was: str) -> None:
    content = {**evaluation(general, domain), "tasks": {}}
    content["changes"]["tuned"]["general"]["loss"] = change(general - 0.849)["loss"]
    results = EvaluationResults.of(content, Path("eval.json"))
    for said, found in ((did, learnt(results)), (was, lost(results))):
        for name, what in (("DOMAIN", "domain documents that were not trained on"), ("GENERAL", "general text")):
            said = said.replace(name, f"The loss on {what}")
        assert f"{found.verdict}.{found.sentences[0]}".startswith(said)


def test_an_interval_of_few_documents_is_no_verdict() -> None:
    content = {**evaluation(0.849, 2.59), "tasks": {}}
    content["models"]["tuned"]["domain"]["items"] = 5
    found = learnt(EvaluationResults.of(content, Path("eval.json")))
    assert (found.verdict, found.tone) == ("Too few documents", "")
    assert found.sentences[1] == "An interval of 5 documents decides nothing: evaluate 6 or more, by eval.domain."


def test_fewer_right_answers_are_a_loss_though_the_loss_fell() -> None:
    content = {**evaluation(general=0.7), "tasks": {}}
    content["changes"]["tuned"]["general"] = change(-0.149, accuracy=-0.02)
    found = lost(EvaluationResults.of(content, Path("eval.json")))
    assert found.verdict == "Something" and f"({MINUS}2.0 points [{MINUS}3.0, {MINUS}1.0])" in " ".join(found.sentences)


def test_answers_are_compared_word_by_word() -> None:
    found = pair(Answer("p", "domain", None, " One two\n\nthree four", " One two\n\n3 four"))
    assert found.base == (("One two", False), ("\n\n", False), ("three", True), (" four", False)) and not found.same
    assert [text for text, marked in found.tuned if marked] == ["3"] and "".join(text for text, _ in found.tuned) == "One two\n\n3 four"
    assert pair(Answer("p", "general", None, "same", "same")).same
    assert pair(Answer("p", "general", None, "alone", None)).tuned == ()


@pytest.mark.parametrize("file, content, said", [
    ("scores.json", '{"schema": 2}', "scores.json: schema 2 is not the known 1"),
    ("eval.json", json.dumps({"schema": "x" * 9000}), f"eval.json: schema '{'x' * 116}... is not the known 2"),
    ("eval.json", "{", "eval.json: not valid JSON"),
    ("eval.json", json.dumps({**evaluation(), "models": {"base": {"general": corpus(1), "shifted_tokens": "x"}}}),
     "eval.json: models.base.shifted_tokens is 'x'"),
    ("trainer_log.jsonl", '{"event": "end", "step": 1}\n{"event": \n', "trainer_log.jsonl:2: not valid JSON"),
    ("scores.json", json.dumps({**scores(), "notes": [3]}), "scores.json: notes[0] must be text of one line, found 3"),
    ("expanded/adept_config.json", json.dumps({**record(), "selection": {"notes": [3]}}), "adept_config.json: notes[0] is 3: restore it"),
    ("scores.json", json.dumps({**scores(), "analysis": {"stability": {"layers": [0], "draws": 9, "sizes": [{"items": 3, "same": "x"}]}}}),
     "analysis.stability.sizes[0].same: 'x', no number"),
    ("trainer_log.jsonl", '{"event": "refresh", "step": 1, "rates": {"a": "b"}}\n', "trainer_log.jsonl:1: rates.a is no number, but 'b'"),
    ("trainer_log.jsonl", "[3]\n", "trainer_log.jsonl:1: expected an object"),
    ("scores.json", json.dumps({**scores(), "items": [3]}), "scores.json: items must be a whole number, found (3,)"),
    ("trainer_log.jsonl", '{"event": "plan", "step": 0, "steps": [1], "tokens": 2}\n', "trainer_log.jsonl:1: steps is no number, but [1]"),
])  # fmt: skip
def test_a_malformed_artefact_is_named_and_the_old_page_stays(tmp_path: Path, file: str, content: str, said: str) -> None:
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "expanded").mkdir()
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=re.escape(said)):
        write_report(tmp_path, RECIPE, VERSIONS)
    assert (tmp_path / "report.html").read_text() == "old"


@pytest.mark.slow
def test_a_recipe_whose_method_is_no_name_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recipe.yaml: method must be one of"):
        write_report(tmp_path, {**RECIPE, "method": {"adept": 1}}, VERSIONS)
    assert not [*tmp_path.iterdir()]
