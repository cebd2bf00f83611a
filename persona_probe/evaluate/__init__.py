"""What models say and how it is scored: contrast index, question sets, sampled answers, judges, rates."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
