"""A study from config to report: its stages as methods, a dry run, its key numbers, and a check of its files."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
