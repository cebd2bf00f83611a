"""Fewer words from the libraries: their progress bars and warnings that a user can do nothing about."""

import ctypes
import logging
import os
import platform
import warnings


def quiet_libraries() -> None:
    """Silence other libraries' bars and deprecation notes; called by the CLI before a model loads."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    for name in ("transformers", "trl", "peft", "sae_lens", "datasets", "httpx", "choreographer", "kaleido"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


# --- The C allocator of a command-line process: keep freed memory for the next tensor

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
