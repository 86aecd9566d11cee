"""The report: what was gained, what was lost, and what it was made from, as one HTML file and its charts."""

from adept_fast.report.charts import layer_profile
from adept_fast.report.drawing import save_png
from adept_fast.report.page import write_report

__all__ = ["layer_profile", "save_png", "write_report"]
