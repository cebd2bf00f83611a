"""A labelled study of the monitor: how well its alarms, and their rivals, tell misaligned runs from benign ones."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
