"""Figures and the HTML report: pure functions of a run folder's records. Needs no model."""

from persona_probe.report.export import export_figures
from persona_probe.report.figures import FIGURES, FigureSpec
from persona_probe.report.html import write_report
from persona_probe.report.records import Records, load_records

__all__ = ["FIGURES", "FigureSpec", "Records", "export_figures", "load_records", "write_report"]
