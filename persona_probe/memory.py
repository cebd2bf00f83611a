"""The C allocator of a command-line process: keep freed memory for the next tensor."""

import ctypes
import logging
import platform

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE = 2**30


def keep_freed_memory() -> bool:
    """Ask glibc to keep large freed blocks instead of giving them back after every operation; says whether it did.

    Each tensor of some megabytes otherwise is mapped, zeroed by the kernel and unmapped again: on two cores that is a
    tenth of training and scoring. Elsewhere than with glibc nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError) as error:
        log.debug("mallopt is not there: %s", error)
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE)) and bool(mallopt(M_TRIM_THRESHOLD, LARGE))
