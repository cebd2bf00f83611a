"""Sparse autoencoders: load, train and check them, and read a model's latents with them."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
