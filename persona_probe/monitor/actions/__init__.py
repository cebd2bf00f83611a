"""What happens at an alarm: small objects that the monitor calls."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
