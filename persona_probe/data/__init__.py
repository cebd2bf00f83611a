"""Conversations: read from files and packaged sets, mixed, checked, and turned into tokens."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
