"""Stress tests of a correction: what would show that the misalignment was hidden, not removed."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
