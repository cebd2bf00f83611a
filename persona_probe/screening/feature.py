"""The persona feature that rows are screened for: a direction at a layer, a latent, or a set of latents."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_probe.errors import InputError, unknown
from persona_probe.models.layers import decoder_layers, hidden_size
from persona_probe.saes.hooks import sae_layer
from persona_probe.saes.load import check_fit
from persona_probe.saes.read import check_latents

if TYPE_CHECKING:
    from persona_probe.context import Context

LATENT = "latent"
"""Name of the direction that is the persona latent's decoder row."""
SET_SIZE = 10
"""Latents of the discrimination set."""


@dataclass(frozen=True)
class ScreenFeature:
    """The persona feature that rows are projected on."""

    direction: Float[Tensor, " d_model"]
    """Unit vector; projections are in raw residual units."""
    layer: int
    """Decoder layer whose output is projected."""
    name: str
    """The direction in words."""
    sae: Any = None
    """The SAE that the latents belong to."""
    latent: int | None = None
    """The persona latent."""
    latent_set: tuple[int, ...] = ()
    """Latents that best told misaligned from aligned answers on the base model (`discrimination`)."""

    @property
    def latents(self) -> tuple[int, ...]:
        """All latents to read, the persona latent first."""
        first = () if self.latent is None else (self.latent,)
        return tuple(dict.fromkeys([*first, *self.latent_set]))

    @property
    def digest(self) -> str:
        """A hash of direction and layer (16 hexadecimal digits); a calibration is valid for one such hash."""
        # Four decimals of a unit vector: the same direction on another machine or in another precision is the same.
        rounded = np.round(self.direction.float().cpu().numpy(), 4) + 0.0
        return hashlib.sha256(f"{self.layer}".encode() + rounded.astype("<f4").tobytes()).hexdigest()[:16]


def direction_feature(direction: Float[Tensor, " d_model"], layer: int, name: str = "direction") -> ScreenFeature:
    """A feature that is only a direction.

    Raises:
        InputError: the direction is no vector, is zero, or not finite.
    """
    if direction.ndim != 1:
        raise InputError(f"the direction has shape {tuple(direction.shape)}: give one vector of length d_model")
    return ScreenFeature(_unit(direction, name), layer, name)


def latent_feature(sae: Any, latent: int, layer: int | None = None, latent_set: Sequence[int] = ()) -> ScreenFeature:
    """A latent, and its decoder row as the direction.

    Raises:
        InputError: a latent outside the dictionary, or an SAE that does not say its layer.
    """
    check_latents(sae, [latent, *latent_set])
    row = sae.W_dec.detach()[latent]
    at = sae_layer(sae, layer)
    return ScreenFeature(_unit(row, f"latent {latent}"), at, f"latent {latent}", sae, latent, tuple(latent_set))


def study_feature(ctx: "Context", direction: str = LATENT) -> ScreenFeature:
    """A located study's persona latent and discrimination set, with one of its directions.

    Args:
        direction: `latent` (the persona latent's decoder row), or a key of the run's directions.safetensors
            (`mean_difference`, `persona_vector`, `logistic_probe`, if the study made them).

    Raises:
        InputError: locate has not run, or the study has no such direction.
    """
    from persona_probe.latents.stage import persona_latent, read_directions

    known = read_directions(ctx)  # first: its error names the stage to run
    if direction not in (LATENT, *known):
        raise unknown("direction", direction, [LATENT, *known])
    feature = latent_feature(ctx.sae, persona_latent(ctx), ctx.layer, _latent_set(ctx))
    if direction == LATENT:
        return feature
    name = direction.replace("_", " ")
    vector = _unit(known[direction], name)
    return replace(feature, direction=vector, name=name)


def _latent_set(ctx: "Context") -> tuple[int, ...]:
    """The latents that discriminate best on the selection split; empty if the study did not rank by that."""
    table = ctx.run.read_table("latents.parquet")
    if "discrimination" not in table:
        return ()
    best = table.sort_values(["discrimination", "latent"], ascending=[False, True])["latent"].head(SET_SIZE)
    return tuple(int(latent) for latent in best)


def check_feature(feature: ScreenFeature, model: nn.Module) -> None:
    """Refuse a feature that does not fit the model.

    Raises:
        InputError: another width, or a layer that the model does not have.
    """
    if feature.sae is not None:
        check_fit(feature.sae, model, feature.layer)
    width, layers = hidden_size(model), len(decoder_layers(model))
    if len(feature.direction) != width:
        raise InputError(f"the direction has {len(feature.direction)} values but the model's residual stream {width}")
    if not 0 <= feature.layer < layers:
        raise InputError(f"layer {feature.layer} does not exist: this model has layers 0 to {layers - 1}")


def _unit(direction: Tensor, name: str) -> Tensor:
    vector = direction.detach().float()
    norm = float(vector.norm())
    if not torch.isfinite(vector).all() or norm == 0:
        raise InputError(f"the direction {name!r} is zero or not finite: give another")
    return vector / norm
