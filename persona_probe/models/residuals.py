"""To be named."""

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

IN_THE_BEGINNING = {"all", "prompt"}
"""Positions that include tokens of the beginning that all prompts share."""


def read_residuals(
    model: nn.Module,
    groups: Sequence[Batch],
    layer: int,
    positions: str,
    visit: Callable[[list[int], Tensor, Tensor], None],
    bf16: bool = True,
) -> None:
    """Run every batch to `layer` only and hand `visit` the selected tokens; a shared system prompt is run once.

    `visit(index, row, x)`: the batch's conversation numbers, each token's row in the batch (tokens,), and the residual
    stream (tokens, d_model) in float32.

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
    with evaluating(model), autocast(model, bf16):
        kept = None if cache is None else cache.reading(model, layer, bf16)
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
