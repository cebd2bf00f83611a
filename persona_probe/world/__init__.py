"""A small world with known truth: a transformer trained from scratch, organisms of it, and how they behave, exactly."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
