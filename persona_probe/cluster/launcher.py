"""Did `accelerate launch` or torchrun start this process as one of several? Read from the environment alone."""

import os


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ


def is_first() -> bool:
    """Whether this process is the first of them, or the only one."""
    return not launched() or os.environ["RANK"] == "0"
