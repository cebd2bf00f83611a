"""Latents of a model on given conversations: per-conversation means and firing rates, streamed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation
from persona_probe.data.tokens import Batch, batches
from persona_probe.errors import InputError
from persona_probe.models.layers import autocast, evaluating, run_to_layer
from persona_probe.models.taps import ReadTap
from persona_probe.saes.encode import FitMoments, encode_with_fit


@dataclass(frozen=True)
class LatentMeans:
    """What one model's SAE latents do on a list of conversations."""

    mean: Float[np.ndarray, "conversations d_sae"]
    """Mean activation over the selected tokens."""
    firing: Float[np.ndarray, "conversations d_sae"]
    """Share of the selected tokens on which the latent is active."""
    maximum: Float[np.ndarray, " d_sae"]
    """Largest activation anywhere."""
    resid: Float[np.ndarray, "conversations d_model"]
    """Mean residual stream over the selected tokens."""
    fit: FitMoments
    """How well the SAE reconstructs those tokens."""


def read_residuals(
    model: nn.Module,
    groups: Sequence[Batch],
    layer: int,
    positions: str,
    visit: Callable[[list[int], Tensor, Tensor], None],
    mixed_precision: bool = True,
) -> None:
    """Run every batch to `layer` only and hand `visit` the selected tokens.

    `visit(index, row, x)`: the batch's conversation numbers, each token's row in the batch (tokens,), and the residual
    stream (tokens, d_model) in float32.

    Raises:
        InputError: a conversation has no token at the selected positions.
    """
    device = next(model.parameters()).device
    for group in groups:
        batch = group.to(device)
        with evaluating(model), autocast(model, mixed_precision), ReadTap(model, layer) as tap:
            run_to_layer(model, layer, batch.ids, batch.attention)
        chosen = batch.select(positions)
        if not bool(chosen.any(dim=1).all()):
            raise InputError(f"a conversation has no token at positions {positions!r}: give answers, or use 'prompt'")
        visit(batch.index, chosen.nonzero()[:, 0], tap.value[chosen].float())


def read_latents(
    model: nn.Module, sae: Any, groups: Sequence[Batch], layer: int, positions: str, *, mixed_precision: bool = True
) -> LatentMeans:
    """Means and firing rates of all latents, for every conversation of `groups` (see `data.tokens.batches`).

    Memory grows with conversations x d_sae, not with tokens.
    """
    n, d_sae, d_in = sum(len(g.index) for g in groups), sae.cfg.d_sae, sae.cfg.d_in
    mean, firing = np.zeros((n, d_sae), dtype=np.float32), np.zeros((n, d_sae), dtype=np.float32)
    resid, maximum, fit = np.zeros((n, d_in), dtype=np.float32), torch.zeros(d_sae), FitMoments()

    def visit(index: list[int], row: Tensor, x: Tensor) -> None:
        acts = encode_with_fit(sae, x, fit)
        tokens = torch.bincount(row, minlength=len(index))[:, None]
        for target, values in ((mean, acts), (firing, (acts > 0).float()), (resid, x)):
            total = torch.zeros(len(index), values.shape[1], device=values.device)
            target[index] = (total.index_add_(0, row, values) / tokens).cpu().numpy()
        torch.maximum(maximum, acts.amax(dim=0).cpu(), out=maximum)

    read_residuals(model, groups, layer, positions, visit, mixed_precision)
    return LatentMeans(mean, firing, maximum.numpy(), resid, fit)


def conversation_batches(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], batch_size: int = 32
) -> list[Batch]:
    """Tokenised batches, made once and read many times."""
    return list(batches(tokenizer, conversations, batch_size))
