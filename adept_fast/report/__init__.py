"""Write the report: what a run gained, what it lost, and its settings and versions, as one HTML file and its charts."""

from adept_fast.report.certainty import conflicts, method_comparison, stability
from adept_fast.report.charts import layer_profile, measure_of
from adept_fast.report.compare_runs import compare
from adept_fast.report.drawing import save_png
from adept_fast.report.page import write_report
from adept_fast.report.units_chart import unit_profile

PICTURES = {
    "scores.png": layer_profile,
    "scores.stability.png": lambda scores, _: stability(scores),
    "scores.conflicts.png": lambda scores, _: conflicts(scores),
    "scores.comparison.png": lambda scores, _: method_comparison(scores),
}
"""The charts of scores.json: file name -> function of (its content, the chosen layers), which returns a figure, or None without data."""

__all__ = [
    "PICTURES",
    "compare",
    "measure_of",
    "save_png",
    "unit_profile",
    "write_report",
]
