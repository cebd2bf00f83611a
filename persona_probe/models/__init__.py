"""Load a model, put adapters on it, and read, steer or ablate the output of its decoder layers."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
