"""One measurement of named features on a fixed probe set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError
from persona_probe.saes.encode import FitMoments, check_latents, encode_with_fit
from persona_probe.saes.read import read_residuals
from persona_probe.stats import bootstrap_mean

Features = Mapping[str, int | Tensor]
"""Feature name to a latent's index, or to a direction (d_model,)."""


@dataclass(frozen=True)
class Snapshot:
    """Features of one model on the probes."""

    names: tuple[str, ...]
    latents: tuple[int, ...]
    """Latent index, or -1 for a direction."""
    values: Float[np.ndarray, "probes features"]
    """Mean over the selected tokens of each probe: activation, or projection on the unit direction."""
    firing: Float[np.ndarray, " features"]
    """Mean over probes of the share of tokens above zero."""
    maximum: Float[np.ndarray, " features"]
    fit: FitMoments

    def rows(self) -> list[dict[str, Any]]:
        """One row per feature, in the columns of `readings.parquet` (without arm, seed, step and base)."""
        return [self._row(i) for i in range(len(self.names))]

    def _row(self, i: int) -> dict[str, Any]:
        mean = bootstrap_mean(self.values[:, i])
        return {
            "feature": self.names[i],
            "latent": self.latents[i],
            "mean": mean.estimate,
            "ci_low": mean.ci_low,
            "ci_high": mean.ci_high,
            "maximum": float(self.maximum[i]),
            "firing_rate": float(self.firing[i]),
            "explained_variance": self.fit.explained_variance,
            "l0": self.fit.l0,
            "residual_norm": self.fit.residual_norm,
            "n_probes": len(self.values),
        }


class FeatureReader:
    """Reads the same features on the same probes from any model of one architecture.

    Args:
        sae: a `sae_lens.SAE`.
        features: name to latent index or direction.
        groups: tokenised probes.
        layer: decoder layer whose output is read.
        positions: tokens averaged over, see `data.tokens.POSITIONS`.

    Raises:
        InputError: no feature, an unknown latent, or a direction of the wrong width.
    """

    def __init__(
        self,
        sae: Any,
        features: Features,
        groups: Sequence[Batch],
        layer: int,
        positions: str = "response",
        mixed_precision: bool = True,
    ) -> None:
        if not features:
            raise InputError("no features to read: pass {'name': latent index or direction}")
        self.sae, self.groups, self.layer, self.positions = sae, groups, layer, positions
        self.mixed_precision = mixed_precision
        self.names = tuple(features)
        self.latents = tuple(f if isinstance(f, int) else -1 for f in features.values())
        check_latents(sae, [f for f in features.values() if isinstance(f, int)])
        self.directions = {n: self._unit(n, f) for n, f in features.items() if isinstance(f, Tensor)}

    def _unit(self, name: str, direction: Tensor) -> Tensor:
        if direction.shape != (self.sae.cfg.d_in,) or not float(direction.norm()) > 0:
            raise InputError(f"feature {name!r} must be a non-zero direction of width {self.sae.cfg.d_in}")
        return direction.float() / direction.float().norm()

    def _columns(self, x: Float[Tensor, "tokens d_model"], acts: Tensor) -> Float[Tensor, "tokens features"]:
        columns = []
        for name, latent in zip(self.names, self.latents, strict=True):
            if name in self.directions:
                columns.append(einsum(x, self.directions[name].to(x.device), "token d, d -> token"))
            else:
                columns.append(acts[:, latent].to(x.device))
        return torch.stack(columns, dim=1)

    def read(self, model: nn.Module) -> Snapshot:
        """Forward to the layer only, in eval mode and without gradients; mode and random state are put back."""
        n = sum(len(g.index) for g in self.groups)
        values, firing = np.zeros((n, len(self.names))), np.zeros((n, len(self.names)))
        maximum, fit = np.full(len(self.names), -np.inf), FitMoments()

        def visit(index: list[int], row: Tensor, x: Tensor) -> None:
            columns = self._columns(x, encode_with_fit(self.sae, x, fit))
            tokens = torch.bincount(row, minlength=len(index))[:, None]
            for target, part in ((values, columns), (firing, (columns > 0).float())):
                total = torch.zeros(len(index), part.shape[1], device=part.device).index_add_(0, row, part)
                target[index] = (total / tokens).cpu().numpy()
            np.maximum(maximum, columns.amax(dim=0).cpu().numpy(), out=maximum)

        with torch.no_grad():
            read_residuals(model, self.groups, self.layer, self.positions, visit, self.mixed_precision)
        return Snapshot(self.names, self.latents, values, firing.mean(axis=0), maximum, fit)
