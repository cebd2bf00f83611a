"""Where a monitor's events go: a file, the trainer's loggers, the terminal, Prometheus, a live figure."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
