"""Features of the tokens that a model runs while it answers, read by hooks; and pushes on single answers."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_probe.errors import InputError
from persona_probe.models.places import Place, Where, as_place, find_site
from persona_probe.models.taps import ReadTap, Tap
from persona_probe.monitor.features import FeatureGroups, Features, FitSums
from persona_probe.saes.hooks import PlacedSae, Saes, placed_saes
from persona_probe.saes.load import check_placed


class RowPush(Tap):
    """Adds a vector of its own to each row of a batch, or nothing while it has none."""

    vectors: Float[Tensor, "batch d_model"] | None = None

    def on_output(self, resid: Float[Tensor, "batch pos d_model"]) -> Tensor | None:
        """The output with each row's vector added.

        Raises:
            InputError: the pass runs more than one token of an answer: there is no cache of keys and values.
        """
        if self.vectors is None:
            return None
        if resid.shape[1] != 1:
            raise InputError("SteerDown needs a cache of keys and values: generate with use_cache=True")
        return resid + self.vectors[:, None].to(resid.device, resid.dtype)


class TokenReader:
    """Hooks that read features at the last position of each forward pass; a context manager.

    Args:
        model: a transformers model, or a PEFT model around one.
        features: with the places that they are read in.
    """

    def __init__(self, model: nn.Module, features: FeatureGroups) -> None:
        self.model, self.features = model, features
        self._taps: dict[Place, ReadTap] = {}
        self._pushes: dict[Place, RowPush] = {}
        self._sums: list[FitSums] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        for place in self.features.places:
            tap = self._taps[place] = ReadTap(self.model, place)
            self._stack.callback(tap.remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        self._stack.close()
        self._taps.clear()
        self._pushes.clear()

    @property
    def passes(self) -> int:
        """Forward passes so far."""
        return next(iter(self._taps.values())).fired

    def latest(self, rows: Sequence[int]) -> dict[Place, Float[Tensor, "rows width"]]:
        """What is read at the last position of the latest pass, for some rows of its batch.

        Raises:
            InputError: no pass has reached the places.
        """
        x = {}
        for place, tap in self._taps.items():
            if not tap.fired:
                raise InputError(f"{place} was not reached: the model skips it")
            last = tap.value[:, -1]
            # a copy: the position alone, not the whole pass, stays in memory until it is encoded
            x[place] = (last if len(rows) == len(last) else last[list(rows)]).to(torch.float32, copy=True)
        return x

    @torch.no_grad()
    def bounds(self, x: dict[Place, Tensor]) -> tuple[np.ndarray, np.ndarray] | None:
        """The lowest and highest that the features can be; None where only `columns` can tell."""
        first = next(iter(x.values()))
        with torch.autocast(first.device.type, enabled=False):
            found = self.features.bounds(x)
        if found is None:
            return None
        low, high = torch.stack(found).cpu().numpy()
        return low, high

    @property
    def waits(self) -> bool:
        """Whether the features take a whole dictionary, so that several tokens are better read together."""
        return self.features.encodes_all(with_fit=False)

    @torch.no_grad()
    def read_row(self, row: int, start: int, stop: int) -> Float[np.ndarray, "tokens features"]:
        """The features at some positions of one row of the latest pass."""
        return (
            self.columns({place: tap.value[row, start:stop].float() for place, tap in self._taps.items()}).cpu().numpy()
        )

    @torch.no_grad()
    def columns(self, x: dict[Place, Tensor]) -> Float[Tensor, "tokens features"]:
        """The features of activations (tokens, width) by place."""
        if self._sums is None:
            self._sums = self.features.new_sums(x)
        first = next(iter(x.values()))
        with torch.autocast(first.device.type, enabled=False):
            return self.features.columns(x, self._sums, with_fit=False)

    def push(self, wanted: Sequence[dict[str, float] | None]) -> None:
        """Before a pass: for each row of its batch, feature to how much of it is added; all empty adds nothing."""
        for push in self._pushes.values():
            push.vectors = None
        if not any(wanted):
            return
        vectors: dict[Place, Tensor] = {}
        for row, amounts in enumerate(wanted):
            for name, amount in (amounts or {}).items():
                place, vector = self.decoder(name)
                total = vectors.setdefault(place, torch.zeros(len(wanted), len(vector)))
                total[row] += amount * vector.cpu()
        for place, total in vectors.items():
            if place not in self._pushes:
                self._pushes[place] = RowPush(self.model, place)
                self._stack.callback(self._pushes[place].remove)
            self._pushes[place].vectors = total

    def decoder(self, name: str) -> tuple[Place, Float[Tensor, " d_model"]]:
        """Where a feature is written, and what one unit of it writes: the decoder row, or the unit direction."""
        for part in self.features.parts:
            if name in part.features.names:
                latent = part.features.latents[part.features.names.index(name)]
                if latent >= 0:
                    sae: Any = part.features.sae
                    return part.writes, sae.W_dec[latent].detach().float()
                return part.writes, part.features.direction(name)
        raise InputError(f"feature {name!r} is not read")


def placed_features(
    model: nn.Module, sae: Saes | None, features: Features, layer: Where | None = None
) -> FeatureGroups:
    """The features of `GenerationMonitor`'s arguments, checked against the model.

    Raises:
        InputError: an SAE or a direction that does not fit the model, or directions without a layer.
    """
    several = isinstance(sae, (Mapping, list, tuple))
    if sae is None and layer is None:
        raise InputError("features without an SAE are directions: pass layer= to say where they are read")
    if sae is not None and not several:
        placed = [PlacedSae.of(sae, layer if isinstance(layer, int) else None)]
        layer = placed[0].reads
    else:
        placed = [] if sae is None else placed_saes(sae)
    for one in placed:
        check_placed(one, model)
    places = {as_place(layer)} if layer is not None else {one.reads for one in placed}
    width = find_site(model, places.pop()).width if len(places) == 1 else None
    return FeatureGroups.of(sae, features, layer, width)
