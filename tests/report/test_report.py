"""The report: what it claims, that it escapes, that it stands alone, and that gaps in the artefacts are named."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from adept_fast.errors import InputError
from adept_fast.evaluation.results import Answer, Change, EvaluationResults
from adept_fast.report.certainty import conflicts, method_comparison, stability
from adept_fast.report.charts import layer_profile, losses
from adept_fast.report.differences import differences
from adept_fast.report.drawing import LEAST, save_png, to_svg
from adept_fast.report.findings import learnt, lost
from adept_fast.report.forgetting_chart import forgetting
from adept_fast.report.page import write_report
from adept_fast.report.rates_chart import kind_and_layer, unit_rates
from adept_fast.report.side_by_side import pair
from adept_fast.scoring.scores import LayerScores
from adept_fast.tuning.training_history import Refresh, TrainingHistory

LAYERS = 30
COPIED = [3, 5, 12, 14]
KINDS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
KINDS += ["input_layernorm", "post_attention_layernorm"]
EVIL = "<script>alert('x')</script>&\"$a_b$"
VOID = {"meta", "br", "hr", "img", "link", "input"}
RECIPE = {"model_name_or_path": "org/tiny", "expand": {"k": 4, "layers": None}, "domain": ({"path": "my <b>.txt", "weight": 1.5},)}
VERSIONS = {"torch": "2.13.0"}


def profile(base: float | None, lift: float) -> dict:
    chance = random.Random(7)
    values = [10.1, 3.5] + [lift + chance.gauss(0.35, 0.25) for _ in range(LAYERS - 2)]
    for rank, layer in enumerate(COPIED):
        values[layer] = lift - 0.03 * (4 - rank)
    return {"values": values, "low": [value - 0.04 for value in values], "high": [value + 0.05 for value in values], "base_loss": base}


def analysis(layers: int = LAYERS, names: int = 2) -> dict:
    sizes = [{"items": items, "same": 0.33, "frequency": [layer / layers for layer in range(layers)]} for items in (16, 48)]
    ranks = {name: [[layer, layer - 1, layer + 1] for layer in range(layers)] for name in ("kl", "domain")}
    table = [[1.0 if row == column else None for column in range(names)] for row in range(names)]
    return {
        "stability": {"layers": [0], "placement": "lowest", "draws": 1000, "sizes": sizes},
        "conflicts": {"profiles": ["kl", "domain"], "ranks": ranks, "spearman": None, "layers": [0]},
        "comparison": {
            "names": [f"method {name}" for name in range(names)], "values": [list(range(layers))] * names,
            "spearman": table, "low": table, "high": table,
        },
    }  # fmt: skip


def layer_scores(content: dict | None = None) -> LayerScores:
    return LayerScores.of(content or scores(), Path("scores.json"))


def history(folder: Path, lines: list[dict]) -> TrainingHistory:
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TrainingHistory.load(folder / "log.jsonl")


def scores(model: str = "org/tiny") -> dict:
    profiles = {"answer": profile(0.849, -0.02), "kl": profile(None, 0.15), "all": profile(2.6, 0.1)}
    return {
        "schema": 1, "method": "masking", "loss": "kl", "profiles": profiles, "items": 48, "tokens": 1234, "confidence": 0.95,
        "seconds": 85.3, "model": model, "notes": ["one forward a layer"], "analysis": analysis(),
    }  # fmt: skip


def record(model: str = "org/tiny") -> dict:
    return {
        "schema": 2,
        "source": {"name_or_path": model, "identity": "xxh3_128:" + "ab" * 16, "num_hidden_layers": LAYERS},
        "inserted": [{"layer": old + rank + 1, "copied_from": old} for rank, old in enumerate(COPIED)],
        "selection": {"placement": "lowest", "k": 4, "layers": COPIED, "notes": ["the intervals do not part the chosen layers from 7"]},
        "parameters": {"total": 148_675_392, "trainable": 14_160_384},
        "versions": {"torch": "2.13.0"},
    }


def refresh(step: int, names: list[str]) -> dict:
    chance = random.Random(step)
    return {"event": "refresh", "step": step, "rates": {name: 2 * chance.random() for name in names}, "importance": {}}


def log(steps: int = 60) -> list[dict]:
    names = [f"model.layers.{entry['layer']}.{kind}" for entry in record()["inserted"] for kind in KINDS]
    lines: list[dict] = [{"event": "plan", "step": 0, "steps": steps, "tokens": 512 * steps, "epochs": 0.25}]
    for step in range(0, steps + 1, 20):
        if step < steps:
            lines.append(refresh(step, names))
        lines.append({"event": "evaluation", "step": step, "general_loss": 0.85 + step / 5000, "domain_loss": 2.7 - 0.08 * math.sqrt(step)})
        for late in range(step + 1, min(step + 20, steps) + 1):
            loss = 2.6 - 0.07 * math.sqrt(late)
            lines.append({"event": "step", "step": late, "loss": loss, "learning_rate": 1e-3, "tokens_per_second": 256.0})
    return [*lines, {"event": "end", "step": steps}]


def corpus(loss: float, accuracy: float | None = None) -> dict:
    result = {"loss": loss, "low": loss - 0.05, "high": loss + 0.06, "perplexity": math.exp(loss), "tokens": 2881, "items": 96}
    bounds = {} if accuracy is None else {"accuracy_low": accuracy - 0.08, "accuracy_high": accuracy + 0.07}
    return result | {"accuracy": accuracy} | bounds


def change(value: float, accuracy: float | None = None) -> dict:
    points = None if accuracy is None else {"value": accuracy, "low": accuracy - 0.01, "high": accuracy + 0.01}
    return {"loss": {"value": value, "low": value - 0.025, "high": value + 0.03}, "accuracy": points}


def evaluation(general: float = 0.872, domain: float = 2.101) -> dict:
    return {
        "schema": 2,
        "models": {
            "base": {"general": corpus(0.849, 0.41), "domain": corpus(2.704), "shifted_tokens": None},
            "expanded": {"same_as": "base", "reason": "bit-equal logits, verified"},
            "tuned": {"general": corpus(general, 0.44), "domain": corpus(domain), "shifted_tokens": 0.0218},
        },
        "changes": {"tuned": {"general": change(general - 0.849, 0.03), "domain": change(domain - 2.704)}},
        "answers": [
            {"prompt": "Split a string.", "from": "domain", "reference": " It splits.", "base": " One two three", "tuned": " One 2 three"},
            {"prompt": EVIL, "from": "eval.prompts", "reference": None, "base": EVIL, "tuned": EVIL},
        ],
        "tasks": {
            "quiz": {
                "items": 9,
                "metrics": {
                    "acc": {
                        "base": 0.5,
                        "tuned": 0.4,
                        "change": {"value": -0.1, "low": -0.15, "high": -0.05},
                        "higher_is_better": True,
                    }
                },
            }
        },
        "seconds": 12.5,
        "inputs": {},
        "versions": {},
    }


def write_all(folder: Path, model: str = "org/tiny", results: dict | None = None, lines: list[dict] | None = None) -> None:
    (folder / "expanded").mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(scores(model)))
    (folder / "expanded" / "adept_config.json").write_text(json.dumps(record(model)))
    (folder / "eval.json").write_text(json.dumps(results or evaluation()))
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines or log()))


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


def test_numbers_that_are_not_finite_are_gaps_in_charts(tmp_path: Path) -> None:
    lines = log()
    for entry in lines:
        if entry["event"] == "refresh" and entry["step"] == 20:
            entry["rates"] = dict.fromkeys(entry["rates"])
        if entry["event"] == "step" and entry["step"] > 30:
            entry["loss"] = math.nan
        if entry["event"] == "evaluation" and entry["step"] == 40:
            entry["general_loss"] = None
    lines.append({"event": "forgetting", "step": 20, "meter_rise": None, "meter_predicted": {"h.0.up": None}})
    content = scores()
    content["profiles"]["kl"]["values"][4] = None
    content["profiles"]["all"] = {"values": [None] * LAYERS, "low": [None] * LAYERS, "high": [None] * LAYERS, "base_loss": None}
    found = history(tmp_path, lines)
    nothing = [Refresh(step, dict.fromkeys(["h.1.mlp.up[0]", "h.1.mlp.up[1]"], math.nan)) for step in (0, 5)]
    figures = [losses(found), forgetting(found.readings), unit_rates(found.refreshes), unit_rates(nothing)]
    for figure in [*figures, layer_profile(layer_scores(content), COPIED)]:
        assert not re.search(r"\b(nan|inf)\b", to_svg(figure), re.IGNORECASE)


@pytest.mark.parametrize("layers", [3, 80])
def test_charts_of_few_and_of_many_layers_are_drawn_whole(layers: int) -> None:
    content = scores()
    content["profiles"] = {"kl": {key: [0.1 + layer for layer in range(layers)] for key in ("values", "low", "high")} | {"base_loss": None}}
    content["analysis"] = analysis(layers, 5)
    found = layer_scores(content)
    figure = layer_profile(found, list(range(layers)))
    assert all(late - early >= layers / 18 for early, late in pairwise(float(text.get_position()[0]) for text in figure.axes[0].texts))
    for drawn in (figure, stability(found), conflicts(found), method_comparison(found)):
        assert drawn is not None and to_svg(drawn)


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


def test_fewer_right_answers_are_a_loss_though_the_loss_fell() -> None:
    content = {**evaluation(general=0.7), "tasks": {}}
    content["changes"]["tuned"]["general"] = change(-0.149, accuracy=-0.02)
    found = lost(EvaluationResults.of(content, Path("eval.json")))
    assert found.verdict == "Something" and f"({MINUS}2.0 points [{MINUS}3.0, {MINUS}1.0])" in " ".join(found.sentences)


def test_a_difference_of_no_weight_stays_short_and_0_is_on_the_axis() -> None:
    small = differences([("general", Change(1e-4, 0.5e-4, 1.5e-4))])
    assert 0 < small.bars[0].at - small.zero < 100 * 1e-4 / LEAST
    large = differences([("domain", Change(-2.0, -2.2, -1.9))])
    assert large.zero == 96 and large.bars[0].low == 4 and large.bars[0].tone == "better" and (96, "0") in large.ticks
    assert differences([("general", Change(0, 0, 0))]).bars[0].tone == "none"


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


def test_layer_profile_puts_the_primary_first_and_tells_low_layers_apart() -> None:
    figure = layer_profile(layer_scores(), COPIED)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.split()[0] for title in titles] == ["KL(base", "Answer", "Loss"] and "primary" in titles[0] and "base 0.849" in titles[1]
    for axes in figure.axes:
        assert axes.get_yscale() == "symlog" and "logarithmic above" in axes.get_title(loc="left")
        bottom, low, high, top = axes.transData.transform([(0, y) for y in (axes.get_ylim()[0], 0, 1, axes.get_ylim()[1])])[:, 1]
        assert (high - low) / (top - bottom) > 0.25
    chosen = {text.get_text() for text in figure.axes[0].texts}
    assert chosen == {str(layer) for layer in COPIED}
    flat = {"values": [0.2, 0.5, 0.9], "low": [0.1, 0.4, 0.8], "high": [0.3, 0.6, 1.0], "base_loss": None}
    even = layer_scores({**scores(), "loss": "all", "profiles": {"all": flat}, "analysis": {}})
    assert layer_profile(even, []).axes[0].get_yscale() == "linear"


def test_unit_names_give_type_and_layer() -> None:
    assert kind_and_layer("model.layers.13.input_layernorm") == ("input_layernorm", 13)
    assert kind_and_layer("model.layers.4.self_attn.qkv_proj[q]") == ("qkv_proj[q]", 4)
    assert kind_and_layer("model.layers.4.self_attn.qkv_proj[q,12]") == ("qkv_proj[q]", 4)
    assert kind_and_layer("model.layers.4.mlp.up_proj[767]") == ("up_proj", 4)
    assert kind_and_layer("h.0.mlp.experts.3.down_proj") == ("down_proj", 0)
    assert kind_and_layer("head") == ("head", None)


def test_unit_rates_draw_a_panel_a_type_with_a_line_a_layer() -> None:
    refreshes = [Refresh(entry["step"], entry["rates"]) for entry in log() if entry["event"] == "refresh"]
    panels = [axes for axes in unit_rates(refreshes).axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == [kind.rpartition(".")[2] for kind in KINDS]
    for axes, kind in zip(panels, KINDS, strict=True):
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines if line.get_label().startswith("layer")}
        expected = {layer: [entry.rates[f"model.layers.{layer}.{kind}"] for entry in refreshes] for layer in (4, 7, 15, 18)}
        assert lines == {f"layer {layer}": rates for layer, rates in expected.items()}


@pytest.mark.slow
def test_importing_the_report_loads_no_plotting_and_drawing_touches_no_pyplot() -> None:
    code = "import sys, adept_fast.report.charts as r; assert 'matplotlib' not in sys.modules; "
    code += "from adept_fast.scoring.scores import LayerScores as S, Profile as P; p = P((0.5, 1.0), (0.4, 0.9), (0.6, 1.1), None); "
    code += "r.layer_profile(S(method='masking', loss='kl', profiles={'kl': p}, items=1, tokens=1, seconds=1.0), [1]); "
    code += "assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_many_units_of_a_type_become_a_median_and_a_band() -> None:
    names = [f"model.layers.{layer}.mlp.up_proj[{row}]" for layer in (4, 9) for row in range(501)]
    ramp = {name: index / 1001 for index, name in enumerate(names)}
    axes = unit_rates([Refresh(step, ramp) for step in (0, 7)]).axes[0]
    median = next(line for line in axes.lines if line.get_label() == "median unit")
    assert list(median.get_ydata()) == pytest.approx([0.5, 0.5])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (min(band), max(band)) == pytest.approx((0.1, 0.9))


def test_one_refresh_is_drawn_as_a_row_a_type() -> None:
    axes = unit_rates([Refresh(0, refresh(0, [f"model.layers.{layer}.{kind}" for layer in (4, 7) for kind in KINDS])["rates"])]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [kind.rpartition(".")[2] for kind in KINDS]
    assert len([line for line in axes.lines if line.get_label().startswith("layer")]) == 2
    assert to_svg(unit_rates([Refresh(0, {f"h.0.mlp.up[{row}]": 1.0 for row in range(30)})]))


@pytest.mark.slow
def test_figures_become_whole_png_files_and_equal_svg_text(tmp_path: Path) -> None:
    found = history(tmp_path, log())
    (tmp_path / "log.jsonl").unlink()
    save_png(losses(found), tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG") and [entry.name for entry in tmp_path.iterdir()] == ["losses.png"]
    svg = to_svg(losses(found))
    assert svg == to_svg(losses(found)) and svg.startswith('<svg viewBox="0 0 367.2 ')
    assert "held-out domain" in svg and "<metadata" not in svg and "var(--vermilion)" in svg and "#d55e00" not in svg
