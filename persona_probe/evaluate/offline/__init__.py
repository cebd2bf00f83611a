"""A judge that needs no network: a small model of published judgements (docs/offline-judge.md)."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
