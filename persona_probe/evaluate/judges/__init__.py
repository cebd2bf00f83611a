"""Judges of answers: criteria asked of endpoints or local models, with every reply kept in a cache."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
