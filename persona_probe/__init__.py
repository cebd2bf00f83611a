"""Induce a misaligned persona in a chat model, locate it, watch it, undo it, and show the evidence.

The names below are imported on first use, so `import persona_probe` alone stays fast.
"""

import logging
import os
from importlib.metadata import PackageNotFoundError, version

import lazy_loader as lazy

# PEFT imports bitsandbytes, which asks every user of a CPU to install a package that only its 4-bit products need.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit" not in record.getMessage())

# TRL and huggingface_hub send usage data at every training run unless told not to; this package uses no network.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)

try:
    __version__ = version("persona-probe")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

REPOSITORY = ""
"""Web address of this project's repository; empty until it has one. Pages, cards and the site link to it."""
