"""How well each latent alone tells misaligned from aligned answers."""

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from persona_probe.errors import InputError


def discrimination(
    values: Float[np.ndarray, "conversations d_sae"], misaligned: Bool[np.ndarray, " conversations"]
) -> Float[np.ndarray, " d_sae"]:
    """AUROC of every latent: how often a misaligned conversation has the larger value, ties counted half.

    Equals `stats.auroc` latent by latent; 0.5 for a latent that is silent. Read on the base model it needs no
    fine-tuned model, so candidates can be fixed before any training.

    Raises:
        InputError: flags of another length, or of one kind only.
    """
    flags = check_flags(misaligned, len(values))
    ranks = rankdata(values, axis=0)[flags].sum(axis=0)
    positive, negative = int(flags.sum()), int((~flags).sum())
    return (ranks - positive * (positive + 1) / 2) / (positive * negative)


def check_flags(misaligned: Bool[np.ndarray, " conversations"], conversations: int) -> Bool[np.ndarray, " n"]:
    """The flags as booleans.

    Raises:
        InputError: flags of another length, or of one kind only.
    """
    flags = np.asarray(misaligned, dtype=bool)
    if flags.shape != (conversations,):
        raise InputError(f"{conversations} conversations but {flags.size} misaligned flags: give one for each")
    if flags.all() or not flags.any():
        kind = "misaligned" if flags.any() else "aligned"
        raise InputError(f"all {conversations} conversations end with {kind} answers: give both kinds to compare")
    return flags
