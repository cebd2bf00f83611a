"""Encode residual streams with an SAE: all latents or a chosen few, with the fit on the same tokens."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError

SLICEABLE = ("standard", "jumprelu")
CHUNK = 4096


def check_latents(sae: Any, latents: list[int]) -> list[int]:
    """The latents, checked against the dictionary's size.

    Raises:
        InputError: a latent outside the dictionary.
    """
    for latent in latents:
        if not 0 <= latent < sae.cfg.d_sae:
            raise InputError(f"latent {latent} does not exist: this SAE has latents 0 to {sae.cfg.d_sae - 1}")
    return latents


@torch.no_grad()
def encode(sae: Any, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_sae"]:
    """All latents, dense, in the SAE's own precision."""
    acts = sae.encode(x.to(sae.device, sae.dtype))
    return acts.to_dense() if acts.is_sparse else acts


@torch.no_grad()
def encode_latents(sae: Any, x: Float[Tensor, "tokens d_model"], latents: list[int]) -> Float[Tensor, "tokens chosen"]:
    """Only the chosen latents: sliced where that is exact (standard, JumpReLU), else encoded in full and cut.

    Latents of a TopK SAE compete, so their values need the whole dictionary.
    """
    check_latents(sae, latents)
    architecture = sae.cfg.architecture()
    if architecture not in SLICEABLE:
        return encode(sae, x)[:, latents]
    sae_in = sae.process_sae_in(x.to(sae.device, sae.dtype))
    pre = sae_in @ sae.W_enc[:, latents] + sae.b_enc[latents]
    if architecture == "standard":
        return torch.relu(pre)
    return torch.relu(pre) * (pre > sae.threshold[latents])


@dataclass
class FitMoments:
    """Running sums behind explained variance, L0 and residual norm; add tokens, then read the properties."""

    n: int = 0
    error: float = 0.0
    active: float = 0.0
    norm: float = 0.0
    total: Tensor | None = field(default=None, repr=False)
    square: float = 0.0

    def add(self, x: Float[Tensor, "tokens d_model"], out: Tensor, acts: Tensor) -> None:
        """Count the tokens of one batch: inputs, reconstructions and activations."""
        x, out = x.double(), out.double()
        self.n += len(x)
        self.error += float((x - out).square().sum())
        self.active += float((acts > 0).sum())
        self.norm += float(x.norm(dim=-1).sum())
        self.square += float(x.square().sum())
        self.total = x.sum(dim=0) if self.total is None else self.total + x.sum(dim=0)

    @property
    def explained_variance(self) -> float:
        """1 - sum |x - x_hat|^2 / sum |x - mean x|^2, over all tokens."""
        if self.total is None:
            raise InputError("no tokens were read: the selected positions are empty")
        variance = self.square - float(self.total.square().sum()) / self.n
        return 1 - self.error / variance if variance > 0 else float("nan")

    @property
    def l0(self) -> float:
        """Mean number of active latents per token."""
        return self.active / self.n

    @property
    def residual_norm(self) -> float:
        """Mean norm of the residual stream."""
        return self.norm / self.n


@torch.no_grad()
def encode_with_fit(sae: Any, x: Float[Tensor, "tokens d_model"], fit: FitMoments) -> Float[Tensor, "tokens d_sae"]:
    """All latents, while `fit` counts how well the SAE reconstructs the same tokens."""
    parts = []
    for chunk in x.float().split(CHUNK):
        acts = encode(sae, chunk)
        fit.add(chunk, sae.decode(acts).to(chunk.device), acts)
        parts.append(acts)
    return torch.cat(parts)
