"""The language of a small world with known truth: its words, its speakers, and a rule that judges what they say."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
