"""Watch features of a model while it trains: readings, alarm rules, actions, sinks, and a study of their worth."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
