"""Draw the pictures of README and docs from a finished run: python docs/site/pictures.py OUTPUT_DIR

The committed ones show the run of `adept-fast demo`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from adept_fast import LayerScores
from adept_fast.evaluation.results import EvaluationResults
from adept_fast.report.artefacts import Artefacts
from adept_fast.report.charts import layer_profile, losses
from adept_fast.report.drawing import BLUE, GREY, VERMILION, save_png, style
from adept_fast.report.rates_chart import unit_rates

IMAGES = Path(__file__).parents[1] / "images"


def summary(scores: LayerScores, chosen: Sequence[int], results: EvaluationResults) -> Figure:
    """Draw the chosen layers, and below them what was learnt and lost."""
    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(5, 3))
    scores.plot(chosen, upper)
    upper.set(title="Change of the model without each layer (KL, nats per token)", ylabel="")
    upper.legend(["layer, with 95 % interval", "chosen: copied and trained"], loc="upper center")
    for place, corpus in enumerate(("general", "domain")):
        _difference(lower, place, corpus, results)
    lower.axvline(0, color=GREY, linewidth=1)
    lower.set(title="Change of loss by training (nats per token)", yticks=[0, 1], ylim=(-0.5, 1.7))
    lower.set_yticklabels(["general\nquestions", "the domain"])
    return figure


def _difference(axes: Axes, place: int, corpus: str, results: EvaluationResults) -> None:
    change, colour = getattr(results.changes["tuned"], corpus).loss, {"general": BLUE, "domain": VERMILION}[corpus]
    bars = [[change.value - change.low], [change.high - change.value]]
    axes.errorbar([change.value], [place], xerr=bars, fmt="o", color=colour, markersize=7, elinewidth=2, capsize=4)
    axes.annotate(f"{change.value:+.2f}", (change.value, place), (0, 8), textcoords="offset points", ha="center", color=colour)


def main(run: Path) -> None:
    found = Artefacts.load(run, {})
    assert found.scores and found.evaluation, f"{run} is no finished run"
    chosen = found.selection.layers
    plotted = Figure(figsize=(8, 3), layout="constrained")
    found.scores.plot(chosen, plotted.subplots())
    with style():
        pictures = {
            "demo": summary(found.scores, chosen, found.evaluation),
            "plot": plotted,
            "profile": layer_profile(found.scores, chosen),
            "losses": losses(found.history),
            "rates": unit_rates(found.history.refreshes),
        }
    for name, picture in pictures.items():
        path = IMAGES / f"{name}.png"
        save_png(picture, path)
        Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
