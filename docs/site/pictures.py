"""Draw the pictures of README and docs from a finished run: python docs/site/pictures.py OUTPUT_DIR

The committed ones show the run of `adept-fast demo`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from adept_fast import LayerScores
from adept_fast.evaluation.results import EvaluationResults
from adept_fast.report import charts, rates_chart
from adept_fast.report.drawing import BLUE, GREY, VERMILION, save_png, style

IMAGES = Path(__file__).parents[1] / "images"


def changes(axes: Axes, results: EvaluationResults) -> None:
    """Draw tuned minus base, with paired intervals, for the two corpora."""
    for place, (corpus, colour) in enumerate((("general", BLUE), ("domain", VERMILION))):
        change = getattr(results.changes["tuned"], corpus).loss
        bars = [[change.value - change.low], [change.high - change.value]]
        axes.errorbar([change.value], [place], xerr=bars, fmt="o", color=colour, markersize=7, elinewidth=2, capsize=4)
        axes.annotate(f"{change.value:+.2f}", (change.value, place), (0, 9), textcoords="offset points", ha="center", color=colour)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set(yticks=[0, 1], yticklabels=["general\nquestions", "the domain"], ylim=(-0.6, 1.6), xlabel="nats per token, tuned minus base")
    axes.set_title("What was learnt, and what was lost")


def main(run: Path) -> None:
    scores = LayerScores.load(run / "scores.json")
    chosen = json.loads((run / "expanded" / "adept_config.json").read_text(encoding="utf-8"))["selection"]["layers"]
    log = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    with style():
        figure = Figure(figsize=(9.5, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        scores.plot(chosen, left)
        left.set(title="Which layers general competence rests on", ylabel="change without it\n(KL, nats per token)")
        left.legend(["layer, with 95 % interval", "chosen: copied and trained"], loc="upper center")
        changes(right, EvaluationResults.load(run / "eval.json"))
    pictures = {
        "demo": figure,
        "profile": charts.layer_profile(json.loads((run / "scores.json").read_text(encoding="utf-8")), chosen),
        "losses": charts.losses(log),
        "rates": rates_chart.unit_rates([entry for entry in log if entry["event"] == "refresh"]),
    }
    plotted = Figure(figsize=(8, 3), layout="constrained")
    scores.plot(chosen, plotted.subplots())
    for name, picture in {**pictures, "plot": plotted}.items():
        path = IMAGES / f"{name}.png"
        save_png(picture, path)
        Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
