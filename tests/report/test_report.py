"""The report: what it claims, that it escapes, that it stands alone, and that gaps in the artefacts are named."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from adept_fast.errors import InputError
from adept_fast.evaluation.results import EvaluationResults
from adept_fast.report.charts import layer_profile, losses
from adept_fast.report.drawing import save_png, to_svg
from adept_fast.report.page import write_report
from adept_fast.report.rates_chart import kind_and_layer, unit_rates
from adept_fast.report.results import verdict

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


def scores(model: str = "org/tiny") -> dict:
    profiles = {"answer": profile(0.849, -0.02), "kl": profile(None, 0.15), "all": profile(2.6, 0.1)}
    return {
        "schema": 1, "method": "masking", "loss": "kl", "profiles": profiles, "items": 48, "tokens": 1234, "confidence": 0.95,
        "seconds": 85.3, "model": model, "notes": ["one forward a layer"],
    }  # fmt: skip


def record(model: str = "org/tiny") -> dict:
    return {
        "schema": 1,
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


def change(value: float) -> dict:
    return {"loss": {"value": value, "low": value - 0.025, "high": value + 0.03}, "accuracy": None}


def evaluation(general: float = 0.872, domain: float = 2.101) -> dict:
    return {
        "schema": 2,
        "models": {
            "base": {"general": corpus(0.849, 0.41), "domain": corpus(2.704), "shifted_tokens": None},
            "expanded": {"same_as": "base", "reason": "bit-equal logits, verified"},
            "tuned": {"general": corpus(general, 0.44), "domain": corpus(domain), "shifted_tokens": 0.0218},
        },
        "changes": {"tuned": {"general": change(general - 0.849), "domain": change(domain - 2.704)}},
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


SECTIONS = ["results", "profile", "rates", "losses", "inserted", "cost", "recipe", "limits"]


@pytest.mark.slow
def test_a_whole_run_has_all_sections_in_order_and_its_numbers(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = write_report(tmp_path, RECIPE, VERSIONS)
    assert path == tmp_path / "report.html"
    page = Page(path)
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS and "missing" not in page.ids
    gain = "Domain loss fell from 2.704 to 2.101 nats per token"
    price = "general loss rose from 0.849 to 0.872 nats per token, a change whose 95 % interval [\N{MINUS SIGN}0.002, 0.053] includes 0."
    assert f"{gain}; {price}" in page.text
    base = ["0.849 [0.799, 0.909]", "2.34 [2.22, 2.48]", "41.0 % [33.0, 48.0]", "2.704 [2.654, 2.764]"]
    tuned = ["0.872 [0.822, 0.932]", "44.0 % [36.0, 51.0]", "2.101 [2.051, 2.161]", "8.17 [7.78, 8.68]", "2.18 %", "0.00 %"]
    facts = ["bit-equal logits, verified", "1 min 25 s", "256 tokens/s", "60 steps", "9.5 %", "layers from 7"]
    given = ["expand.k 4", "domain[0].path my <b>.txt", "domain[0].weight 1.5", "torch 2.13.0"]
    for words in base + tuned + facts + given:
        assert words in page.text, words
    assert page.tags.count("svg") == 3
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_the_page_stands_alone_and_ids_do_not_clash(tmp_path: Path) -> None:
    write_all(tmp_path)
    page = Page(write_report(tmp_path, RECIPE, VERSIONS))
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
    ("scores.json", "score", ["profile"]),
    ("eval.json", "eval", ["results"]),
    ("trainer_log.jsonl", "tune", ["rates", "losses"]),
    ("expanded", "expand", ["inserted"]),
])  # fmt: skip
def test_an_absent_artefact_is_named_with_its_command(tmp_path: Path, name: str, command: str, gone: list[str]) -> None:
    write_all(tmp_path)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    page = Page(write_report(tmp_path, RECIPE, VERSIONS))
    assert [section for section in SECTIONS if section not in page.ids] == gone
    assert f"adept-fast {command} makes it" in page.text and page.text.count("makes it") == 1


def test_an_empty_folder_gives_a_page_that_claims_nothing(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, {"model_name_or_path": ""}, {}))
    assert "No result yet" in page.text and page.text.count("makes it") == 4 and "The recipe was not given" in page.text


def test_optional_keys_may_be_absent(tmp_path: Path) -> None:
    (tmp_path / "expanded").mkdir()
    (tmp_path / "scores.json").write_text(json.dumps({"schema": 1, "loss": "answer", "profiles": {"answer": {"values": [0.5, 0.25, 1.0]}}}))
    (tmp_path / "expanded" / "adept_config.json").write_text(json.dumps({"schema": 1, "inserted": [{"layer": 2, "copied_from": 1}]}))
    content = {**evaluation(), "models": {"base": {"general": corpus(0.849), "shifted_tokens": None}}, "changes": {}}
    (tmp_path / "eval.json").write_text(json.dumps(content))
    (tmp_path / "trainer_log.jsonl").write_text('{"event": "step", "step": 3, "loss": 2.5}\n{"event": "step", "st')
    page = Page(write_report(tmp_path, RECIPE, VERSIONS))
    assert "No result yet; to be evaluated: tuned." in page.text and "general accuracy" not in page.text and "0.250" in page.text


@pytest.mark.slow
def test_values_that_are_null_or_not_finite_are_said_and_drawn_as_gaps(tmp_path: Path) -> None:
    results = evaluation()
    results["models"]["tuned"]["general"] |= {"perplexity": None}
    lines = log()
    for entry in lines:
        if entry["event"] == "refresh" and entry["step"] == 20:
            entry["rates"] = dict.fromkeys(entry["rates"])
        if entry["event"] == "step" and entry["step"] > 30:
            entry["loss"] = math.nan
    write_all(tmp_path, results=results, lines=lines)
    content = scores()
    content["profiles"]["kl"]["values"][4] = None
    content["profiles"]["kl"]["high"][5] = math.nan
    content["profiles"]["all"] = {"values": [math.nan] * LAYERS, "low": [None] * LAYERS, "high": [None] * LAYERS, "base_loss": None}
    (tmp_path / "scores.json").write_text(json.dumps(content))
    page = Page(write_report(tmp_path, RECIPE, VERSIONS))
    to_svg(unit_rates([{"step": step, "rates": dict.fromkeys(["h.1.mlp.up[0]", "h.1.mlp.up[1]"])} for step in (0, 5)]))
    assert not re.search(r"\b(nan|inf)\b", page.text, re.IGNORECASE)


@pytest.mark.parametrize("general, domain, said", [
    (0.849, 2.704, "Domain loss stayed at 2.704 nats per token; general loss stayed at 0.849 nats per token."),
    (1.2, 2.714, "Domain loss did not fall: it rose from 2.704 to 2.714 nats per token, a change whose 95 % interval "
                 "[\N{MINUS SIGN}0.015, 0.040] includes 0; general loss rose from 0.849 to 1.200 nats per token."),
    (0.7, 2.59, "Domain loss fell from 2.704 to 2.590 nats per token; general loss fell from 0.849 to 0.700 nats per token."),
])  # fmt: skip
def test_the_verdict_is_honest(general: float, domain: float, said: str) -> None:
    assert verdict(EvaluationResults.of(evaluation(general, domain), Path("eval.json"))) == said


@pytest.mark.parametrize("file, content, said", [
    ("scores.json", '{"schema": 2}', "scores.json: schema 2 is not the known 1"),
    ("eval.json", json.dumps({"schema": "x" * 9000}), f"eval.json: schema '{'x' * 116}... is not the known 2"),
    ("eval.json", "{", "eval.json: not valid JSON"),
    ("eval.json", json.dumps({**evaluation(), "models": {"base": {"general": corpus(1), "shifted_tokens": "x"}}}),
     "eval.json: models.base.shifted_tokens is 'x'"),
    ("trainer_log.jsonl", '{"event": "end", "step": 1}\n{"event": \n', "trainer_log.jsonl:2: not valid JSON"),
    ("scores.json", json.dumps({**scores(), "notes": [3]}), "scores.json: not as it was written"),
    ("expanded/adept_config.json", json.dumps({**record(), "selection": {"notes": [3]}}), "adept_config.json: not as it was written"),
    ("trainer_log.jsonl", "[3]\n", "trainer_log.jsonl:1: expected an object"),
    ("scores.json", json.dumps({**scores(), "items": [3]}), "scores.json: not as it was written"),
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
    with pytest.raises(InputError, match="recipe.yaml: not as it was written"):
        write_report(tmp_path, {**RECIPE, "method": {"adept": 1}}, VERSIONS)
    assert not [*tmp_path.iterdir()]


def test_layer_profile_puts_the_primary_first_and_tells_low_layers_apart() -> None:
    figure = layer_profile(scores(), COPIED)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.split()[0] for title in titles] == ["KL(base", "Answer", "Loss"] and "primary" in titles[0] and "base 0.849" in titles[1]
    for axes in figure.axes:
        assert axes.get_yscale() == "symlog" and "logarithmic above" in axes.get_title(loc="left")
        bottom, low, high, top = axes.transData.transform([(0, y) for y in (axes.get_ylim()[0], 0, 1, axes.get_ylim()[1])])[:, 1]
        assert (high - low) / (top - bottom) > 0.25
    chosen = {text.get_text() for text in figure.axes[0].texts}
    assert chosen == {str(layer) for layer in COPIED}
    flat = {"loss": "all", "profiles": {"all": {"values": [0.2, 0.5, 0.9], "low": [0.1, 0.4, 0.8], "high": [0.3, 0.6, 1.0]}}}
    assert layer_profile(flat, []).axes[0].get_yscale() == "linear"
    with pytest.raises(InputError, match="scores.json"):
        layer_profile({"loss": "kl", "profiles": {}}, [])


def test_unit_names_give_type_and_layer() -> None:
    assert kind_and_layer("model.layers.13.input_layernorm") == ("input_layernorm", 13)
    assert kind_and_layer("model.layers.4.self_attn.qkv_proj[q]") == ("qkv_proj[q]", 4)
    assert kind_and_layer("model.layers.4.self_attn.qkv_proj[q,12]") == ("qkv_proj[q]", 4)
    assert kind_and_layer("model.layers.4.mlp.up_proj[767]") == ("up_proj", 4)
    assert kind_and_layer("h.0.mlp.experts.3.down_proj") == ("down_proj", 0)
    assert kind_and_layer("head") == ("head", None)


def test_unit_rates_draw_a_panel_a_type_with_a_line_a_layer() -> None:
    refreshes = [entry for entry in log() if entry["event"] == "refresh"]
    panels = [axes for axes in unit_rates(refreshes).axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == [kind.rpartition(".")[2] for kind in KINDS]
    for axes, kind in zip(panels, KINDS, strict=True):
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines if line.get_label().startswith("layer")}
        expected = {layer: [entry["rates"][f"model.layers.{layer}.{kind}"] for entry in refreshes] for layer in (4, 7, 15, 18)}
        assert lines == {f"layer {layer}": rates for layer, rates in expected.items()}
    with pytest.raises(InputError, match="trainer_log.jsonl"):
        unit_rates([])


@pytest.mark.slow
def test_importing_the_report_loads_no_plotting_and_drawing_touches_no_pyplot() -> None:
    code = "import sys, adept_fast.report.charts as r; assert 'matplotlib' not in sys.modules; "
    code += "r.layer_profile({'profiles': {'kl': {'values': [0.5, None]}}}, [1]); assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_many_units_of_a_type_become_a_median_and_a_band() -> None:
    names = [f"model.layers.{layer}.mlp.up_proj[{row}]" for layer in (4, 9) for row in range(501)]
    ramp = {name: index / 1001 for index, name in enumerate(names)}
    axes = unit_rates([{"step": step, "rates": ramp} for step in (0, 7)]).axes[0]
    median = next(line for line in axes.lines if line.get_label() == "median unit")
    assert list(median.get_ydata()) == pytest.approx([0.5, 0.5])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (min(band), max(band)) == pytest.approx((0.1, 0.9))


def test_one_refresh_is_drawn_as_a_row_a_type() -> None:
    axes = unit_rates([refresh(0, [f"model.layers.{layer}.{kind}" for layer in (4, 7) for kind in KINDS])]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [kind.rpartition(".")[2] for kind in KINDS]
    assert len([line for line in axes.lines if line.get_label().startswith("layer")]) == 2
    assert to_svg(unit_rates([refresh(0, [f"h.0.mlp.up[{row}]" for row in range(30)])]))


@pytest.mark.slow
def test_figures_become_whole_png_files_and_equal_svg_text(tmp_path: Path) -> None:
    figure = losses(log())
    save_png(figure, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG") and [entry.name for entry in tmp_path.iterdir()] == ["losses.png"]
    svg = to_svg(figure)
    assert svg == to_svg(losses(log())) and svg.startswith('<svg viewBox="0 0 468 ') and "held-out domain" in svg and "<metadata" not in svg
