"""What a process that loads models does first: threads that sleep, quiet libraries, memory kept for the next tensor."""

import ctypes
import functools
import logging
import os
import platform
import sys
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
        wait_passively()
        from persona_probe.models.quiet import quiet_libraries

        keep_freed_memory()
        quiet_libraries()
        return function(*args, **kwargs)

    return prepared


SPINS = 5000
"""Turns that a thread waits awake for the others, some microseconds; sleeping at once is slower on an idle machine."""


def wait_passively() -> bool:
    """Let threads that wait for each other soon sleep, if torch is not loaded yet.

    They stay awake for milliseconds otherwise: beside other processes each then waits for a thread that has no core,
    and a step takes many times as long. A setting of your own in the environment stays.

    Returns:
        Whether it is set in time.
    """
    if "torch" in sys.modules:
        return False
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    return True


def busy_line() -> str:
    """One line for a machine whose cores are taken by other processes; empty if they are not."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < cores:
        return ""
    return f"note: the machine is busy (load {load:.1f} on {cores} cores): this will take longer than it says"


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
