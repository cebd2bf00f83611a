"""Read the residual stream after one layer at chosen tokens, batch by batch, with an optional cache on disk."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from persona_probe.data.tokens import POSITIONS, Batch
from persona_probe.errors import InputError
from persona_probe.models.activation_cache import ActivationCache, Selected
from persona_probe.models.layers import autocast, evaluating, forward_to_layer, transformer_config
from persona_probe.models.prefix import Rows
from persona_probe.models.taps import ReadTap

IN_SHARED_BEGINNING = {"all", "prompt"}
"""Positions with tokens of the beginning that all prompts share."""


def read_residuals(
    model: nn.Module,
    groups: Sequence[Batch],
    layer: int,
    positions: str,
    visit: Callable[[list[int], Tensor, Tensor], None],
    bf16: bool = True,
) -> None:
    """Run every batch up to `layer` and pass the selected tokens to `visit`; a shared system prompt runs once.

    `visit(index, row, x)` gets the batch's conversation numbers, each token's row in the batch (tokens,), and the
    residual stream (tokens, d_model) in float32.

    Raises:
        InputError: a conversation has no token at the selected positions.
    """

    def alone(index: list[int], row: Tensor, x: Tensor, _masks: Mapping[str, Tensor]) -> None:
        visit(index, row, x)

    read_residuals_at(model, groups, layer, (positions,), alone, bf16)


def read_residuals_at(
    model: nn.Module,
    groups: Sequence[Batch],
    layer: int,
    positions: Sequence[str],
    visit: Callable[[list[int], Tensor, Tensor, Mapping[str, Tensor]], None],
    bf16: bool = True,
    cache: ActivationCache | None = None,
) -> None:
    """`read_residuals` at several kinds of positions with one forward pass; each token is passed to `visit` once.

    `visit(index, row, x, masks)` gets the tokens at any of the positions; `masks[name]` (tokens,) marks those at the
    positions of that name. Batches in `cache` are not run; the others are stored there.

    Raises:
        InputError: no positions, or a conversation has no token at some of them.
    """
    if not positions:
        raise InputError(f"no positions to read: name some of {', '.join(POSITIONS)}")
    device, config = next(model.parameters()).device, transformer_config(model)
    whole = bool(IN_SHARED_BEGINNING & set(positions))
    # One autocast block for all batches keeps the cast weights; `visit` works in full precision.
    with evaluating(model), autocast(model, bf16):
        cached = None if cache is None else cache.reading(model, layer, bf16)
        for group in groups:
            batch = group.to(device)
            rows = Rows.whole(batch) if whole else Rows.of(batch, config)
            masks = {name: _mask(rows.rest, name) for name in positions}
            compute = partial(_run, model, layer, rows, masks)
            tokens = compute() if cached is None else cached.selected(batch, masks, compute)
            with autocast(model, False):
                visit(batch.index, tokens.row, tokens.x, tokens.masks)


def _run(model: nn.Module, layer: int, rows: Rows, masks: Mapping[str, Tensor]) -> Selected:
    with ReadTap(model, layer) as tap:
        rows.run(partial(forward_to_layer, model, layer), transformer_config(model), rows.ids())
    union = torch.stack(list(masks.values())).any(dim=0)
    inside = {name: mask[union] for name, mask in masks.items()}
    return Selected(union.nonzero()[:, 0], tap.value[union].float(), inside)


def _mask(batch: Batch, positions: str) -> Tensor:
    mask = batch.select(positions)
    if not bool(mask.any(dim=1).all()):
        raise InputError(f"a conversation has no token at positions {positions!r}: give answers, or 'prompt'")
    return mask
