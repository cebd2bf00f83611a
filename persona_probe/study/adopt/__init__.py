"""Checkpoints that exist already, taken into a run folder without training: `persona-probe adopt`, `Study.adopt`."""
