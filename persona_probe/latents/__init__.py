"""Rank an SAE's latents by what fine-tuning did to them, test them for cause, and show them on cards."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
