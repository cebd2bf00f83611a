"""Latents of a model on given conversations: per-conversation means and firing rates, streamed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation
from persona_probe.data.tokens import POSITIONS, Batch, batches
from persona_probe.errors import InputError
from persona_probe.models.layers import autocast, evaluating, forward_to_layer, transformer_config
from persona_probe.models.prefix import Rows
from persona_probe.models.taps import ReadTap
from persona_probe.saes.activation_cache import ActivationCache
from persona_probe.saes.activation_entry import Selected
from persona_probe.saes.encode import FitMoments, encode

IN_THE_BEGINNING = {"all", "prompt"}
"""Positions that include tokens of the beginning that all prompts share."""
ENCODED_AT_ONCE = 2**26
"""Activations (tokens x d_sae) that are held at once: 256 MB in float32."""


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
    square: Float[np.ndarray, " d_sae"] | None = None
    """Mean squared activation over all selected tokens; None where it was not kept."""


def read_residuals(
    model: nn.Module,
    groups: Sequence[Batch],
    layer: int,
    positions: str,
    visit: Callable[[list[int], Tensor, Tensor], None],
    mixed_precision: bool = True,
) -> None:
    """Run every batch to `layer` only and hand `visit` the selected tokens; a shared system prompt is run once.

    `visit(index, row, x)`: the batch's conversation numbers, each token's row in the batch (tokens,), and the residual
    stream (tokens, d_model) in float32.

    Raises:
        InputError: a conversation has no token at the selected positions.
    """

    def alone(index: list[int], row: Tensor, x: Tensor, _masks: Mapping[str, Tensor]) -> None:
        visit(index, row, x)

    read_residuals_at(model, groups, layer, (positions,), alone, mixed_precision)


def read_residuals_at(
    model: nn.Module,
    groups: Sequence[Batch],
    layer: int,
    positions: Sequence[str],
    visit: Callable[[list[int], Tensor, Tensor, Mapping[str, Tensor]], None],
    mixed_precision: bool = True,
    cache: ActivationCache | None = None,
) -> None:
    """`read_residuals` at several kinds of positions with one forward pass; each token is handed over once.

    `visit(index, row, x, masks)`: as there, for the tokens at any of the positions; `masks[name]` (tokens,) says which
    of them are at the positions of that name. Batches that `cache` holds are not run; the others are kept there.

    Raises:
        InputError: no positions, or a conversation has no token at some of them.
    """
    if not positions:
        raise InputError(f"no positions to read: name some of {', '.join(POSITIONS)}")
    device, config = next(model.parameters()).device, transformer_config(model)
    whole = bool(IN_THE_BEGINNING & set(positions))
    # One autocast block for all batches keeps the cast weights; `visit` works in full precision.
    with evaluating(model), autocast(model, mixed_precision):
        kept = None if cache is None else cache.reading(model, layer, mixed_precision)
        for group in groups:
            batch = group.to(device)
            rows = Rows.whole(batch) if whole else Rows.of(batch, config)
            masks = {name: _chosen(rows.rest, name) for name in positions}
            compute = partial(_run, model, layer, rows, masks)
            found = compute() if kept is None else kept.selected(batch, masks, compute)
            with autocast(model, False):
                visit(batch.index, found.row, found.x, found.masks)


def _run(model: nn.Module, layer: int, rows: Rows, masks: Mapping[str, Tensor]) -> Selected:
    with ReadTap(model, layer) as tap:
        rows.run(partial(forward_to_layer, model, layer), transformer_config(model), rows.ids())
    union = torch.stack(list(masks.values())).any(dim=0)
    inside = {name: mask[union] for name, mask in masks.items()}
    return Selected(union.nonzero()[:, 0], tap.value[union].float(), inside)


def _chosen(batch: Batch, positions: str) -> Tensor:
    chosen = batch.select(positions)
    if not bool(chosen.any(dim=1).all()):
        raise InputError(f"a conversation has no token at positions {positions!r}: give answers, or 'prompt'")
    return chosen


def read_latents(
    model: nn.Module,
    sae: Any,
    groups: Sequence[Batch],
    layer: int,
    positions: str,
    *,
    mixed_precision: bool = True,
    cache: ActivationCache | None = None,
) -> LatentMeans:
    """Means and firing rates of all latents, for every conversation of `groups` (see `data.tokens.batches`).

    Memory grows with conversations x d_sae, not with tokens.
    """
    found = read_latents_at(model, sae, groups, layer, (positions,), mixed_precision=mixed_precision, cache=cache)
    return found[positions]


def read_latents_at(
    model: nn.Module,
    sae: Any,
    groups: Sequence[Batch],
    layer: int,
    positions: Sequence[str],
    *,
    mixed_precision: bool = True,
    cache: ActivationCache | None = None,
) -> dict[str, LatentMeans]:
    """`read_latents` at several kinds of positions: one forward pass, and every token is encoded once.

    Returns:
        Positions to what was read there, in the order of `positions`.

    Raises:
        InputError: no positions, or a conversation has no token at some of them.
    """
    n, step = sum(len(g.index) for g in groups), max(1, ENCODED_AT_ONCE // sae.cfg.d_sae)
    sums = {name: _Sums(n, sae.cfg.d_sae, sae.cfg.d_in) for name in positions}

    def visit(index: list[int], row: Tensor, x: Tensor, masks: Mapping[str, Tensor]) -> None:
        for part in torch.arange(len(x), device=x.device).split(step):
            acts = encode(sae, x[part])
            out, acts = sae.decode(acts.to(sae.dtype)).to(x.device), acts.to(x.device)
            for name, mask in masks.items():
                at = mask[part]
                sums[name].add(index, row[part][at], x[part][at], out[at], acts if bool(at.all()) else acts[at])

    with torch.no_grad():
        read_residuals_at(model, groups, layer, positions, visit, mixed_precision, cache)
    return {name: found.means() for name, found in sums.items()}


class _Sums:
    """Running sums of one kind of positions, by conversation."""

    def __init__(self, conversations: int, d_sae: int, d_in: int) -> None:
        self.acts, self.active = (np.zeros((conversations, d_sae), dtype=np.float32) for _ in range(2))
        self.resid = np.zeros((conversations, d_in), dtype=np.float32)
        self.tokens = np.zeros((conversations, 1), dtype=np.float32)
        self.maximum, self.square, self.fit = torch.zeros(d_sae), torch.zeros(d_sae).double(), FitMoments()

    def add(self, index: list[int], row: Tensor, x: Tensor, out: Tensor, acts: Tensor) -> None:
        if len(x) == 0:
            return
        self.fit.add(x, out, acts)
        for target, values in ((self.acts, acts), (self.active, (acts != 0).float()), (self.resid, x)):
            total = torch.zeros(len(index), values.shape[1], device=values.device).index_add_(0, row, values)
            target[index] += total.cpu().numpy()
        self.tokens[index] += torch.bincount(row, minlength=len(index))[:, None].cpu().numpy()
        torch.maximum(self.maximum, acts.amax(dim=0).cpu(), out=self.maximum)
        self.square += acts.square().sum(dim=0).cpu()

    def means(self) -> LatentMeans:
        square = (self.square / max(self.fit.n, 1)).numpy()
        mean, firing, resid = (total / self.tokens for total in (self.acts, self.active, self.resid))
        return LatentMeans(mean, firing, self.maximum.numpy(), resid, self.fit, square)


def conversation_batches(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], batch_size: int = 32
) -> list[Batch]:
    """Tokenised batches, made once and read many times."""
    return list(batches(tokenizer, conversations, batch_size))
