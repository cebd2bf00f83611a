"""Read residual streams, or other places in layers, at chosen tokens, batch by batch, with an optional disk cache."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from persona_probe.data.tokens import POSITIONS, Batch
from persona_probe.errors import InputError
from persona_probe.models.activation_cache import ActivationCache, Selected
from persona_probe.models.layers import autocast, evaluating, forward_to_layer, transformer_config
from persona_probe.models.places import Place, Where, as_place
from persona_probe.models.prefix import Rows
from persona_probe.models.taps import ReadTap

IN_SHARED_BEGINNING = {"all", "prompt"}
"""Positions with tokens of the beginning that all prompts share."""


def read_residuals(
    model: nn.Module,
    groups: Sequence[Batch],
    layer: Where,
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
    layer: Where,
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
    place = as_place(layer)

    def alone(index: list[int], row: Tensor, x: Mapping[Place, Tensor], masks: Mapping[str, Tensor]) -> None:
        visit(index, row, x[place], masks)

    read_places(model, groups, [place], positions, alone, bf16, cache)


def read_places(
    model: nn.Module,
    groups: Sequence[Batch],
    places: Sequence[Where],
    positions: Sequence[str],
    visit: Callable[[list[int], Tensor, Mapping[Place, Tensor], Mapping[str, Tensor]], None],
    bf16: bool = True,
    cache: ActivationCache | None = None,
) -> None:
    """`read_residuals_at` in several places with one forward pass, up to the highest layer.

    `visit(index, row, x, masks)` gets the activations by place. Batches in `cache` are run once if it lacks any place.

    Raises:
        InputError: no places, no positions, or a conversation has no token at some of them.
    """
    if not positions:
        raise InputError(f"no positions to read: name some of {', '.join(POSITIONS)}")
    where = list(dict.fromkeys(as_place(place) for place in places))
    if not where:
        raise InputError("no place to read: name a layer")
    device, config = next(model.parameters()).device, transformer_config(model)
    whole = bool(IN_SHARED_BEGINNING & set(positions))
    # One autocast block for all batches keeps the cast weights; `visit` works in full precision.
    with evaluating(model), autocast(model, bf16):
        cached = {} if cache is None else {place: cache.reading(model, place, bf16) for place in where}
        for group in groups:
            # What is selected is found where the batch is, the host as a rule, so that nothing waits for a GPU.
            rows = Rows.whole(group) if whole else Rows.of(group, config)
            masks = {name: _mask(rows.rest, name) for name in positions}
            run = lru_cache(maxsize=1)(partial(_run, model, where, rows.to(device), _Selection.of(masks, device)))
            tokens = {}
            for place in where:
                compute, stored = partial(_at, run, place), cached.get(place)
                tokens[place] = compute() if stored is None else stored.selected(group, masks, compute, device)
            first = tokens[where[0]]
            with autocast(model, False):
                visit(group.index, first.row, {place: s.x for place, s in tokens.items()}, first.masks)


@dataclass(frozen=True)
class _Selection:
    """Tokens at any of the positions."""

    at: Int[Tensor, " tokens"]
    """Their places in the flattened (batch, pos)."""
    row: Int[Tensor, " tokens"]
    inside: dict[str, Bool[Tensor, " tokens"]]
    """Which of them are at the positions of each name."""

    @classmethod
    def of(cls, masks: Mapping[str, Bool[Tensor, "batch pos"]], device: torch.device) -> "_Selection":
        union = torch.stack(list(masks.values())).any(dim=0)
        at, row = union.flatten().nonzero()[:, 0], union.nonzero()[:, 0]
        inside = {name: mask.flatten().index_select(0, at).to(device) for name, mask in masks.items()}
        return cls(at.to(device), row.to(device), inside)


def _at(run: Callable[[], Mapping[Place, Selected]], place: Place) -> Selected:
    return run()[place]


def _run(model: nn.Module, places: Sequence[Place], rows: Rows, chosen: _Selection) -> dict[Place, Selected]:
    last = max(place.layer for place in places)
    with ExitStack() as stack:
        taps = {place: stack.enter_context(ReadTap(model, place)) for place in places}
        rows.run(partial(forward_to_layer, model, last), transformer_config(model), rows.ids())
    return {place: Selected(chosen.row, tap.tokens(chosen.at).float(), chosen.inside) for place, tap in taps.items()}


def _mask(batch: Batch, positions: str) -> Tensor:
    mask = batch.select(positions)
    if not bool(mask.any(dim=1).all()):
        raise InputError(f"a conversation has no token at positions {positions!r}: give answers, or 'prompt'")
    return mask
