"""Runs on several processes and machines: Ray, processes that share a folder, shards, and merging run folders."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
