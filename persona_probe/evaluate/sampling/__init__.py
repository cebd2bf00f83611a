"""Answers from a model: requests, engines that answer them, and `sample`, which keeps the answers in a file."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
