"""The bed that plants go into: base readings, decoder and live latents, and how one plant is read and ranked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.locate.rankers import Evidence, score_table
from persona_probe.locate.unexplained import Reference, random_reference
from persona_probe.planted.draw import pools
from persona_probe.planted.plants import Plant
from persona_probe.planted.stream import Stream
from persona_probe.saes.encode import FitMoments, encode
from persona_probe.saes.read import LatentMeans

POSITIONS = "response"
CHUNK_VALUES = 2**26
"""Activations (tokens x d_sae) that are encoded at once: 256 MB in float32."""


@dataclass(frozen=True)
class Found:
    """What was measured of one plant: the table of all latents, and the arms' mean difference."""

    table: pd.DataFrame
    """Indexed by latent."""
    difference: Float[np.ndarray, " d_model"]
    """Mean residual of the incorrect arm minus the correct one, raw units."""


class Bed:
    """The base model's stream and SAE, and what all plants share: base readings, decoder, live latents."""

    def __init__(self, stream: Stream, sae: Any, rankers: Sequence[str], seed: int) -> None:
        self.stream, self.sae, self.rankers, self.seed = stream, sae, tuple(rankers), seed
        self.decoder: Float[Tensor, "d_sae d_model"] = sae.W_dec.detach().float().cpu()
        self.base = self.read(stream.resid)
        self.base_means = self.base.mean.mean(axis=0, dtype=np.float64)
        acts = self._encode(stream.resid)
        self.rates = (acts > 0).float().mean(dim=0)
        self.pools = pools(self.rates)
        self.reference: Reference = random_reference(self.decoder.numpy(), signed=True, seed=seed)

    def _encode(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_sae"]:
        chunks = x.split(max(1, CHUNK_VALUES // self.sae.cfg.d_sae))
        return torch.cat([encode(self.sae, chunk).cpu() for chunk in chunks])

    def read(self, x: Float[Tensor, "tokens d_model"]) -> LatentMeans:
        """All latents on one arm's residual stream. The fit is not measured: its moments stay empty."""
        acts = self._encode(x)
        firing = self.stream.conversation_means((acts > 0).float())
        mean, resid = self.stream.conversation_means(acts), self.stream.conversation_means(x)
        return LatentMeans(mean.numpy(), firing.numpy(), acts.amax(dim=0).numpy(), resid.numpy(), FitMoments())

    def caused(self, plant: Plant) -> Float[np.ndarray, " d_sae"]:
        """The known answer: every latent's rise in the same conversations from the plant alone, without noise."""
        planted = self._encode(self.stream.resid + plant.shift(self.stream))
        return (self.stream.weights @ planted).double().numpy() - self.base_means

    def rank(self, incorrect: LatentMeans, correct: LatentMeans) -> Found:
        """Score all latents as `locate` does, incorrect arm against correct one."""
        evidence = Evidence(
            base={POSITIONS: self.base},
            tuned={POSITIONS: incorrect},
            control={POSITIONS: correct},
            decoder=self.decoder.numpy(),
            clusters=self.stream.clusters,
            misaligned=self.stream.misaligned,
            positions=POSITIONS,
            attribution=None,
            seed=self.seed,
        )
        difference = (incorrect.resid.astype(np.float64) - correct.resid).mean(axis=0)
        return Found(score_table(evidence, self.rankers).set_index("latent").sort_index(), difference)


def measure(bed: Bed, plant: Plant, ours: Float[Tensor, "tokens d_model"], correct: LatentMeans) -> Found:
    """Read the incorrect arm, which is the base with the plant and `ours`, its own disturbance; then rank."""
    return bed.rank(bed.read(bed.stream.resid + plant.shift(bed.stream) + ours), correct)
