"""Screen training data before training: rank its rows, and predict the shift that training on it would give."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
