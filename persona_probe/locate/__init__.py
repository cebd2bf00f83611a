"""Find the latents that carry a persona: rankers, controls, causal sweep, cards.

Python binds this package as `persona_probe.locate` on import, over the function of that name: so it can be called too.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`persona_probe.locate.compare.locate`."""
        from persona_probe.locate.compare import locate

        return locate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
