"""Figures, feature cards and the HTML report: pure functions of a run folder's records. Needs no model."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
