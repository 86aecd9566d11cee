"""The charts: legible with few and with many layers, gaps where there is no number, and files that are whole."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from adept_fast.evaluation.results import Change
from adept_fast.report.certainty import conflicts, method_comparison, stability
from adept_fast.report.charts import layer_profile, losses
from adept_fast.report.differences import differences
from adept_fast.report.drawing import LEAST, save_png, to_svg
from adept_fast.report.forgetting_chart import forgetting
from adept_fast.report.rates_chart import kind_and_layer, unit_rates
from adept_fast.tuning.training_history import Refresh
from tests.support.report_artefacts import COPIED, KINDS, LAYERS, analysis, history, layer_scores, log, refresh, scores


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


def test_a_difference_of_no_weight_stays_short_and_0_is_on_the_axis() -> None:
    small = differences([("general", Change(1e-4, 0.5e-4, 1.5e-4))])
    assert 0 < small.bars[0].at - small.zero < 100 * 1e-4 / LEAST
    large = differences([("domain", Change(-2.0, -2.2, -1.9))])
    assert large.zero == 96 and large.bars[0].low == 4 and large.bars[0].tone == "better" and (96, "0") in large.ticks
    assert differences([("general", Change(0, 0, 0))]).bars[0].tone == "none"


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
