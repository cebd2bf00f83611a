"""Named features as columns of a table of tokens: latents of one or several SAEs, and directions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError, unknown
from persona_probe.models.places import Place, Where, as_place
from persona_probe.models.taps import as_vector
from persona_probe.saes.hooks import PlacedSae, Saes, is_transcoder, placed_saes
from persona_probe.saes.read import (
    SLICEABLE,
    FitMoments,
    check_latents,
    check_readable,
    decode,
    encode,
    encoder_kind,
    precision,
    tokens_at_once,
)

# --- Running sums behind explained variance, L0 and residual norm, kept on the device and fetched once

N, ERROR, ACTIVE, NORM, SQUARE = range(5)
HEAD = 5


class FitSums:
    """`saes.read.FitMoments` without a transfer to the host at every batch.

    One vector: tokens, squared error, active latents, norms, squares, then the sum of the residual streams (d_model).
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.dtype = precision(device)
        self.vector: Float[Tensor, " five_plus_d_model"] = torch.zeros(HEAD + width, dtype=self.dtype, device=device)
        self.fitted = False

    def add(self, x: Float[Tensor, "tokens d_model"], out: Tensor, acts: Tensor, weight: Tensor) -> None:
        """Count tokens with their reconstructions and activations, each `weight` times (0 or 1).

        Args:
            x: what is reconstructed; of a transcoder its target.
        """
        self.fitted = True
        self.add_norms(x, weight)
        wide, w = x.to(self.dtype), weight.to(self.dtype)
        self.vector[ERROR] += (wide - out.to(self.dtype)).square().sum(dim=-1) @ w
        self.vector[ACTIVE] += (acts != 0).sum(dim=-1).to(self.dtype) @ w
        self.vector[SQUARE] += wide.square().sum(dim=-1) @ w
        self.vector[HEAD:] += w @ wide

    def add_norms(self, x: Float[Tensor, "tokens d_model"], weight: Tensor) -> None:
        """Count tokens without an SAE: their number and norms only."""
        w = weight.to(self.dtype)
        self.vector[N] += w.sum()
        self.vector[NORM] += x.norm(dim=-1).to(self.dtype) @ w


def moments(vector: Float[Tensor, " five_plus_d_model"], fitted: bool) -> FitMoments:
    """The sums once they are on the host; explained variance and L0 are NaN where no SAE was fitted."""
    n, error, active, norm, square = vector[:HEAD].tolist()
    unknown = 0.0 if fitted else math.nan
    return FitMoments(int(n), error + unknown, active + unknown, norm, vector[HEAD:].double(), square)


# --- A few latents of an SAE whose latents do not compete: their columns are gathered once


class SlicedEncoder:
    """`saes.read.encode_latents` for many calls: a reading sends no index to the device and gathers no weight.

    Args:
        sae: an SAE of an architecture in `SLICEABLE`.
        latents: the latents that are read; they exist.
    """

    def __init__(self, sae: Any, latents: list[int]) -> None:
        self.sae, self.kind = sae, encoder_kind(sae)
        assert self.kind in SLICEABLE
        names = {"standard": ("b_enc",), "jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "b_mag", "r_mag")}
        with torch.no_grad():
            self.weights: Tensor = sae.W_enc[:, latents].clone()
            self.parameters: dict[str, Tensor] = {n: getattr(sae, n)[latents].clone() for n in names[self.kind]}

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens chosen"]:
        """The chosen latents' activations, in float32, on the device of `x`."""
        sae, p = self.sae, self.parameters
        product = sae.process_sae_in(x.to(self.weights.device, self.weights.dtype)) @ self.weights
        if self.kind == "gated":
            gate = product * p["r_mag"].exp() + p["b_mag"]
            acts = (product + p["b_gate"] > 0) * sae.activation_fn(gate)
        elif self.kind == "standard":
            acts = sae.activation_fn(product + p["b_enc"])
        else:
            before = product + p["b_enc"]
            acts = sae.activation_fn(before) * (before > p["threshold"])
        return acts.float().to(x.device)


class TopKCeiling:
    """The highest that a few latents of a TopK SAE can be: what they are where they are among the k largest.

    Args:
        sae: a TopK SAE.
        latents: the latents that are read; they exist.
    """

    def __init__(self, sae: Any, latents: list[int]) -> None:
        self.sae = sae
        with torch.no_grad():
            self.weights: Tensor = sae.W_enc[:, latents].clone()
            self.bias: Tensor = sae.b_enc[latents].clone()
            rescaled = sae.cfg.rescale_acts_by_decoder_norm
            self.scale: Tensor = sae.W_dec[latents].norm(dim=-1) if rescaled else torch.ones_like(self.bias)

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens chosen"]:
        """In float32, on the device of `x`."""
        given = self.sae.process_sae_in(x.to(self.weights.device, self.weights.dtype))
        return ((given @ self.weights + self.bias) * self.scale).relu().float().to(x.device)


# --- Named features as columns of a table of tokens

Feature = int | Tensor | tuple[str, int]
"""A latent's index, a direction (d_model,), or with several SAEs (name of the SAE, latent's index)."""
Features = Mapping[str, Feature | Mapping[str, Feature]]
"""Name to a feature, or to a set of them (`{"traits": {"evil": direction, "lazy": 123}}` reads `traits/evil`, ...)."""


def flatten(features: Features) -> dict[str, Feature]:
    """Sets spelled out as `set/member`.

    Raises:
        InputError: no feature, a name that comes twice, or something that is neither a latent nor a direction.
    """
    flat: dict[str, Feature] = {}
    for name, feature in _spelled_out(features):
        if name in flat:
            raise InputError(f"two features are called {name!r}: rename one")
        flat[name] = _checked(name, feature)
    if not flat:
        raise InputError("no features to read: pass {'name': latent index or direction}")
    return flat


def _checked(name: str, feature: Any) -> Feature:
    if isinstance(feature, (tuple, list)) and len(feature) == 2 and isinstance(feature[0], str):
        latent = _checked(name, feature[1])
        if isinstance(latent, int):
            return feature[0], latent
    if isinstance(feature, np.ndarray) or hasattr(feature, "vector"):  # a NamedDirection
        return as_vector(feature).float()
    if isinstance(feature, Tensor):
        return feature
    if isinstance(feature, bool) or not isinstance(feature, Integral):
        raise InputError(f"feature {name!r} must be a latent's index or a direction, not {type(feature).__name__}")
    return int(feature)


def _spelled_out(features: Features) -> Iterator[tuple[str, Feature]]:
    for name, feature in features.items():
        if isinstance(feature, Mapping):
            yield from ((f"{name}/{member}", inner) for member, inner in feature.items())
        else:
            yield name, feature


class FeatureSet:
    """Named features of one place as columns: a token's activation of a latent, or its projection on a unit direction.

    Args:
        sae: a `sae_lens.SAE`; None where all features are directions.
        features: see `Features`.
        width: of the residual stream; None takes the SAE's.

    Raises:
        InputError: no feature, an unknown latent, a latent without an SAE, or a direction of the wrong width.
    """

    def __init__(self, sae: Any | None, features: Features, width: int | None = None) -> None:
        flat = {name: _of_one_sae(name, feature) for name, feature in flatten(features).items()}
        self.sae, self.names = sae, tuple(flat)
        self.latents = tuple(f if isinstance(f, int) else -1 for f in flat.values())
        self._read_latents = [latent for latent in self.latents if latent >= 0]
        if sae is not None:
            check_readable(sae.cfg.architecture())
            check_latents(sae, self._read_latents)
            width = int(sae.cfg.d_in)
        elif self._read_latents:
            name = self.names[self.latents.index(self._read_latents[0])]
            raise InputError(f"feature {name!r} is a latent, but there is no SAE: pass sae=, or a direction instead")
        units = [_unit(n, f, width) for n, f in flat.items() if isinstance(f, Tensor)]
        self._matrix = torch.stack(units, dim=1) if units else None
        # Columns are computed for the latents first, then for the directions; `_order` restores the order of `names`.
        computed = sorted(range(len(self.latents)), key=lambda i: self.latents[i] < 0)
        self._order, self._which = torch.tensor(computed).argsort(), torch.tensor(self._read_latents, dtype=torch.long)
        self._sliced: SlicedEncoder | TopKCeiling | None = None

    def direction(self, name: str) -> Float[Tensor, " d_model"]:
        """A direction that is read, as a unit vector."""
        assert self._matrix is not None
        directions = [n for n, latent in zip(self.names, self.latents, strict=True) if latent < 0]
        return self._matrix[:, directions.index(name)]

    def encodes_all(self, with_fit: bool) -> bool:
        """Whether a reading takes the whole dictionary: for the fit, and where latents compete (TopK)."""
        sae: Any = self.sae
        return bool(self._read_latents) and (with_fit or encoder_kind(sae) not in SLICEABLE)

    @torch.no_grad()
    def columns(
        self,
        x: Float[Tensor, "tokens d_model"],
        sums: FitSums,
        *,
        with_fit: bool = True,
        weight: Float[Tensor, " tokens"] | None = None,
        target: Float[Tensor, "tokens d_out"] | None = None,
    ) -> Float[Tensor, "tokens features"]:
        """All features on every token, while `sums` counts the residual norm and, `with_fit`, the SAE's fit.

        Where only directions are read, the dictionary is never encoded.

        Args:
            weight: 1 for tokens that `sums` counts, 0 for others; None counts all.
            target: what a transcoder should put out, whose norm is counted then; None for an SAE, which
                reconstructs `x`.
        """
        target = x if target is None else target
        weight = torch.ones(len(x), device=x.device) if weight is None else weight
        self._order = self._order.to(x.device)
        parts = []
        if self._read_latents:
            # An encoder turns a token that is not finite into zeros: a model that diverged must not read as silent.
            spoiled = 0 * x.sum(dim=-1, keepdim=True)
            parts.append(self._activations(x, target, sums, with_fit, weight) + spoiled)
        if self._matrix is not None:
            self._matrix = self._matrix.to(x.device)
            parts.append(einsum(x, self._matrix, "token d, d feature -> token feature"))
        if not (self._read_latents and with_fit):
            sums.add_norms(target, weight)
        return torch.cat(parts, dim=1).index_select(1, self._order)

    def _activations(self, x: Tensor, target: Tensor, sums: FitSums, with_fit: bool, weight: Tensor) -> Tensor:
        if not self.encodes_all(with_fit):
            self._sliced = self._sliced or SlicedEncoder(self.sae, self._read_latents)
            return self._sliced(x)
        return self._encoded(x, target, sums, with_fit, weight)

    @torch.no_grad()
    def bounds(
        self, x: Float[Tensor, "tokens d_model"]
    ) -> tuple[Float[Tensor, "tokens features"], Float[Tensor, "tokens features"]] | None:
        """The lowest and highest that each feature can be on every token, without encoding the whole dictionary.

        Latents of a TopK SAE are 0 or their own pre-activation; which, the others decide. Other features are known
        exactly, or None is returned.
        """
        kind = encoder_kind(self.sae) if self._read_latents else SLICEABLE[0]
        if kind not in (*SLICEABLE, "topk"):
            return None
        low, high = list[Tensor](), list[Tensor]()
        if self._read_latents:
            self._sliced = self._sliced or (SlicedEncoder if kind in SLICEABLE else TopKCeiling)(
                self.sae, self._read_latents
            )
            high.append(self._sliced(x) + 0 * x.sum(dim=-1, keepdim=True))
            low.append(high[0] if kind in SLICEABLE else torch.zeros_like(high[0]))
        if self._matrix is not None:
            self._matrix = self._matrix.to(x.device)
            exact = einsum(x, self._matrix, "token d, d feature -> token feature")
            low.append(exact)
            high.append(exact)
        self._order = self._order.to(x.device)
        return torch.cat(low, dim=1)[:, self._order], torch.cat(high, dim=1)[:, self._order]

    def _encoded(self, x: Tensor, target: Tensor, sums: FitSums, with_fit: bool, weight: Tensor) -> Tensor:
        sae: Any = self.sae
        size, columns = tokens_at_once(sae), []
        chunks = zip(x.split(size), target.split(size), weight.split(size), strict=True)
        for part, part_target, part_weight in chunks:
            # Encoding and decoding must alternate: SAELens keeps a token's normalisation from the one for the other.
            acts = encode(sae, part)
            if with_fit:
                sums.add(part_target, decode(sae, acts, part), acts.to(part.device), part_weight)
            self._which = self._which.to(acts.device)
            columns.append(acts.index_select(1, self._which).to(x.device))
        return torch.cat(columns)


def _of_one_sae(name: str, feature: Feature) -> int | Tensor:
    if isinstance(feature, tuple):
        raise InputError(
            f"feature {name!r} names the SAE {feature[0]!r}, but there is one SAE: write {feature[1]} alone"
        )
    return feature


def _unit(name: str, direction: Tensor, width: int | None) -> Tensor:
    vector = direction.detach().float()
    if direction.ndim != 1 or width not in (None, len(direction)) or not 0 < float(vector.norm()) < float("inf"):
        raise InputError(f"feature {name!r} must be a non-zero direction of width {width or 'd_model'}")
    return vector / vector.norm()


# --- Features of several SAEs, or of one that does not read the residual stream


@dataclass(frozen=True)
class PlacedFeatures:
    """The features of one SAE, or directions, with the place that they are read in."""

    features: FeatureSet
    reads: Place
    writes: Place
    """What the SAE reconstructs: `reads`, but for a transcoder."""
    sae: str = ""
    """The SAE's name; empty for directions, and where there is one SAE."""


class FeatureGroups:
    """Named features of one or several SAEs as columns, each read in its place.

    Args:
        parts: by place; their columns come in the order of `names`.
        names: of all features; None takes the parts' own order.
    """

    def __init__(self, parts: Sequence[PlacedFeatures], names: Sequence[str] | None = None) -> None:
        self.parts = tuple(parts)
        columns = [
            (n, latent, p.sae) for p in parts for n, latent in zip(p.features.names, p.features.latents, strict=True)
        ]
        order = list(range(len(columns)))
        if names is not None:
            place = {name: i for i, (name, _, _) in enumerate(columns)}
            order = [place[name] for name in names]
        self._order = torch.tensor(order)
        self.names = tuple(columns[i][0] for i in order)
        self.latents = tuple(columns[i][1] for i in order)
        self.saes = tuple(columns[i][2] for i in order)
        """The SAE of each feature; empty names where there is one SAE."""
        self.places = tuple(dict.fromkeys(place for p in parts for place in (p.reads, p.writes)))

    @classmethod
    def of(
        cls, sae: Saes | None, features: Features, layer: Where | None = None, width: int | None = None
    ) -> "FeatureGroups":
        """The features of `FeatureMonitor`'s arguments.

        Args:
            sae: one SAE, a list or names of several (`saes.hooks.placed_saes`), or None.
            layer: where one SAE and directions are read; with several SAEs, where directions are.
            width: of the residual stream, where it is known.

        Raises:
            InputError: a feature that does not say of which SAE it is, or that `FeatureSet` refuses.
        """
        if not isinstance(sae, (Mapping, list, tuple)):
            reads = as_place(0 if layer is None else layer)
            one = FeatureSet(sae, features, width)
            transcodes = sae is not None and is_transcoder(sae)
            writes = PlacedSae.of(sae).writes if transcodes else reads
            return cls([PlacedFeatures(one, reads, writes)])
        placed = {p.name: p for p in placed_saes(sae)}
        flat, parts = flatten(features), list[PlacedFeatures]()
        for name, feature in flat.items():
            _check_named(name, feature, placed)
        for key, p in placed.items():
            own = {n: f[1] for n, f in flat.items() if isinstance(f, tuple) and f[0] == key}
            if own:
                parts.append(PlacedFeatures(FeatureSet(p.sae, own), p.reads, p.writes, key))
        directions = {n: f for n, f in flat.items() if isinstance(f, Tensor)}
        if directions:
            place = _direction_place(layer, list(placed.values()), next(iter(directions)))
            parts.append(PlacedFeatures(FeatureSet(None, directions, width), place, place))
        return cls(parts, list(flat))

    @property
    def direction_place(self) -> Place | None:
        """Where directions are read; None where there is none."""
        return next((p.reads for p in self.parts if -1 in p.features.latents), None)

    @property
    def several(self) -> bool:
        """Whether the readings must say which SAE they are of."""
        return any(p.sae for p in self.parts)

    @property
    def last_layer(self) -> int:
        """The highest layer that is read."""
        return max(place.layer for place in self.places)

    def encodes_all(self, with_fit: bool) -> bool:
        """Whether a reading takes a whole dictionary."""
        return any(p.features.encodes_all(with_fit) for p in self.parts)

    def new_sums(self, x: Mapping[Place, Tensor]) -> list[FitSums]:
        """Empty sums for each part, as wide as what its SAE reconstructs."""
        return [FitSums(x[p.writes].shape[-1], x[p.writes].device) for p in self.parts]

    def bounds(
        self, x: Mapping[Place, Float[Tensor, "tokens width"]]
    ) -> tuple[Float[Tensor, "tokens features"], Float[Tensor, "tokens features"]] | None:
        """`FeatureSet.bounds` of all parts, in the order of `names`."""
        device = x[self.parts[0].reads].device
        found = [part.features.bounds(x[part.reads]) for part in self.parts]
        known = [pair for pair in found if pair is not None]
        if len(known) < len(found):
            return None
        self._order = self._order.to(device)
        low, high = (torch.cat([pair[side].to(device) for pair in known], dim=1) for side in (0, 1))
        return low.index_select(1, self._order), high.index_select(1, self._order)

    def columns(
        self,
        x: Mapping[Place, Float[Tensor, "tokens width"]],
        sums: Sequence[FitSums],
        *,
        with_fit: bool = True,
        weight: Float[Tensor, " tokens"] | None = None,
    ) -> Float[Tensor, "tokens features"]:
        """`FeatureSet.columns` of all parts, in the order of `names`."""
        device = x[self.parts[0].reads].device
        columns = [
            part.features.columns(
                x[part.reads],
                total,
                with_fit=with_fit,
                weight=None if weight is None else weight.to(x[part.reads].device),
                target=None if part.reads == part.writes else x[part.writes],
            ).to(device)
            for part, total in zip(self.parts, sums, strict=True)
        ]
        if len(columns) == 1 and not self.several:
            return columns[0]
        self._order = self._order.to(device)
        return torch.cat(columns, dim=1).index_select(1, self._order)


def _check_named(name: str, feature: Feature, placed: Mapping[str, PlacedSae]) -> None:
    if isinstance(feature, int):
        known = ", ".join(repr(key) for key in placed)
        raise InputError(
            f"feature {name!r} does not say of which SAE latent {feature} is: write (SAE, {feature}), of {known}"
        )
    if isinstance(feature, tuple) and feature[0] not in placed:
        raise unknown(f"SAE of feature {name!r}", feature[0], placed)


def _direction_place(layer: Where | None, placed: Sequence[PlacedSae], name: str) -> Place:
    places = {p.reads for p in placed}
    if layer is None and len(places) > 1:
        raise InputError(f"feature {name!r} is a direction, and the SAEs read several places: pass layer= for it")
    return as_place(layer) if layer is not None else places.pop()
