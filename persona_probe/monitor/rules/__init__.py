"""Alarm rules: small objects that follow readings and say when something is wrong."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
