"""The planted-truth benchmark: known changes are planted in a model, and locate must name them."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
