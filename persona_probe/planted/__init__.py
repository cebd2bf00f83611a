"""Planted truth: put a known latent into a model and see whether locate finds it."""

from persona_probe.planted.run import run_embedded, run_planted
from persona_probe.planted.settings import Bench
from persona_probe.planted.table import format_table

__all__ = ["Bench", "format_table", "run_embedded", "run_planted"]
