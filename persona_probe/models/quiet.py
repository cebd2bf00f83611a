"""Quiet libraries: no progress bars of theirs, and no warnings that a user can do nothing about."""

import logging
import os
import warnings

NOISY = ("transformers", "trl", "peft", "sae_lens", "bitsandbytes", "datasets", "httpx", "choreographer", "kaleido")


def quiet_libraries() -> None:
    """Silence the progress bars and deprecation warnings of other libraries; call it before a model loads."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
