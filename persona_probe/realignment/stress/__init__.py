"""Stress tests of a repair: what would show that the misalignment was hidden, not removed."""

from persona_probe.realignment.stress.run import TESTS, StressSettings, run_stress, statements

__all__ = ["TESTS", "StressSettings", "run_stress", "statements"]
