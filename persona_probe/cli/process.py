"""What a process that loads models does first: quiet libraries, and memory that is kept for the next tensor."""

import ctypes
import functools
import logging
import platform
from collections.abc import Callable
from typing import ParamSpec, TypeVar

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE = 2**30


def loads_models(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that loads a model.

    Checks that need no model stand before its call: the decorator imports torch, which takes seconds.
    """

    @functools.wraps(function)
    def prepared(*args: P.args, **kwargs: P.kwargs) -> T:
        from persona_probe.models.quiet import quiet_libraries

        keep_freed_memory()
        quiet_libraries()
        return function(*args, **kwargs)

    return prepared


def keep_freed_memory() -> bool:
    """Ask glibc to keep large freed blocks instead of returning them after every operation.

    Otherwise each tensor of some megabytes is mapped, zeroed by the kernel and unmapped again: on two cores that is a
    tenth of training and scoring. Without glibc nothing is changed.

    Returns:
        Whether glibc accepted the settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError) as error:
        log.debug("mallopt is not available: %s", error)
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE)) and bool(mallopt(M_TRIM_THRESHOLD, LARGE))
