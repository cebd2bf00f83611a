"""Histograms of activations over a stream of tokens, in bounded memory and independent of the order."""

import math

import numpy as np
from jaxtyping import Float

BINS_LOG2 = 5
BINS = 2**BINS_LOG2


class Histograms:
    """One histogram of positive values for each of several latents.

    A bin's width is a power of two, 2^e. A value that does not fit doubles the width until it does, and neighbouring
    bins are merged: exact, since the edges stay multiples of the width. So no range needs to be known beforehand, and
    any order of the tokens gives the same counts. At least half of the bins reach up to the maximum.
    """

    def __init__(self, n_latents: int) -> None:
        self.counts = np.zeros((n_latents, BINS), dtype=np.int64)
        self.exponent = np.zeros(n_latents, dtype=np.int64)
        """Of each latent's bin width; meaningless until it has fired."""
        self.maximum = np.zeros(n_latents)
        self.active = np.zeros(n_latents, dtype=np.int64)
        self.tokens = 0

    def add(self, values: Float[np.ndarray, "tokens latents"]) -> None:
        """Count one batch of tokens; values of zero or less are tokens on which a latent is silent."""
        self.tokens += len(values)
        for column, own in enumerate(values.T.astype(np.float64)):
            fired = own[own > 0]
            if fired.size:
                self._add(column, fired)

    def _add(self, column: int, fired: Float[np.ndarray, " active"]) -> None:
        peak = float(fired.max())
        if self.active[column] == 0:
            self.exponent[column] = needed_exponent(peak)
        self.coarsen(column, max(needed_exponent(peak), int(self.exponent[column])))
        index = np.floor(np.ldexp(fired, -int(self.exponent[column]))).astype(np.int64)
        self.counts[column] += np.bincount(index, minlength=BINS)
        self.active[column] += fired.size
        self.maximum[column] = max(self.maximum[column], peak)

    def coarsen(self, column: int, exponent: int) -> None:
        """Merge bins until a latent's width is 2^`exponent`; a latent that has not fired takes that width."""
        shift = exponent - int(self.exponent[column]) if self.active[column] else 0
        if shift:
            merged = np.arange(BINS) >> min(shift, BINS_LOG2)
            self.counts[column] = np.bincount(merged, self.counts[column], BINS).astype(np.int64)
        self.exponent[column] = exponent


def needed_exponent(peak: float) -> int:
    """The smallest e for which `BINS` bins of width 2^e hold `peak`."""
    return math.frexp(peak)[1] - BINS_LOG2


def align(histograms: list[Histograms]) -> None:
    """Give each latent one bin width in all of them, so that counts can be laid over each other."""
    for column in range(len(histograms[0].active)):
        fired = [int(h.exponent[column]) for h in histograms if h.active[column]]
        for histogram in histograms if fired else ():
            histogram.coarsen(column, max(fired))
