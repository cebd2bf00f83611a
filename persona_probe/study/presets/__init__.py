"""Presets: ready configs for chat models and published pairs."""
