"""Features read token by token while a model answers: traces, rules on answers, actions, and a local server."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
