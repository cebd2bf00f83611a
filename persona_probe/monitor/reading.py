"""One measurement of named features on a fixed probe set."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig

from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError
from persona_probe.models.layers import forward_to_layer, transformer_config
from persona_probe.models.prefix import Rows
from persona_probe.models.residuals import IN_SHARED_BEGINNING
from persona_probe.models.taps import ReadTap
from persona_probe.monitor.ranks import eager, is_sharded, reshard, unwrap
from persona_probe.saes.read import (
    CHUNK_TOKENS,
    CHUNK_VALUES,
    SLICEABLE,
    FitMoments,
    check_architecture,
    check_latents,
    encode,
)
from persona_probe.stats import bootstrap_mean

# --- Running sums behind explained variance, L0 and residual norm, kept on the device and fetched once

N, ERROR, ACTIVE, NORM, SQUARE = range(5)
HEAD = 5


def precision(device: torch.device) -> torch.dtype:
    """float64 for sums, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class FitSums:
    """`saes.read.FitMoments` without a transfer to the host at every batch.

    One vector: tokens, squared error, active latents, norms, squares, then the sum of the residual streams (d_model).
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.dtype = precision(device)
        self.vector: Float[Tensor, " five_plus_d_model"] = torch.zeros(HEAD + width, dtype=self.dtype, device=device)
        self.fitted = False

    def add(self, x: Float[Tensor, "tokens d_model"], out: Tensor, acts: Tensor, weight: Tensor) -> None:
        """Count tokens with their reconstructions and activations, each `weight` times (0 or 1)."""
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
        self.sae, self.kind = sae, sae.cfg.architecture()
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


# --- Named features as columns of a table of tokens

Feature = int | Tensor
"""A latent's index, or a direction (d_model,)."""
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
        if isinstance(feature, bool) or not isinstance(feature, Integral | Tensor):
            raise InputError(f"feature {name!r} must be a latent's index or a direction, not {type(feature).__name__}")
        flat[name] = feature if isinstance(feature, Tensor) else int(feature)
    if not flat:
        raise InputError("no features to read: pass {'name': latent index or direction}")
    return flat


def _spelled_out(features: Features) -> Iterator[tuple[str, Feature]]:
    for name, feature in features.items():
        if isinstance(feature, Mapping):
            yield from ((f"{name}/{member}", inner) for member, inner in feature.items())
        else:
            yield name, feature


class FeatureSet:
    """Named features as columns: a token's activation of a latent, or its projection on a unit direction.

    Args:
        sae: a `sae_lens.SAE`; None where all features are directions.
        features: see `Features`.
        width: of the residual stream; None takes the SAE's.

    Raises:
        InputError: no feature, an unknown latent, a latent without an SAE, or a direction of the wrong width.
    """

    def __init__(self, sae: Any | None, features: Features, width: int | None = None) -> None:
        flat = flatten(features)
        self.sae, self.names = sae, tuple(flat)
        self.latents = tuple(f if isinstance(f, int) else -1 for f in flat.values())
        self._read_latents = [latent for latent in self.latents if latent >= 0]
        if sae is not None:
            check_architecture(sae.cfg.architecture())
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
        self._sliced: SlicedEncoder | None = None

    def encodes_all(self, with_fit: bool) -> bool:
        """Whether a reading takes the whole dictionary: for the fit, and where latents compete (TopK)."""
        sae: Any = self.sae
        return bool(self._read_latents) and (with_fit or sae.cfg.architecture() not in SLICEABLE)

    @torch.no_grad()
    def columns(
        self,
        x: Float[Tensor, "tokens d_model"],
        sums: FitSums,
        *,
        with_fit: bool = True,
        weight: Float[Tensor, " tokens"] | None = None,
    ) -> Float[Tensor, "tokens features"]:
        """All features on every token, while `sums` counts the residual norm and, `with_fit`, the SAE's fit.

        Where only directions are read, the dictionary is never encoded.

        Args:
            weight: 1 for tokens that `sums` counts, 0 for others; None counts all.
        """
        weight = torch.ones(len(x), device=x.device) if weight is None else weight
        self._order = self._order.to(x.device)
        parts = []
        if self._read_latents:
            # An encoder turns a token that is not finite into zeros: a model that diverged must not read as silent.
            spoiled = 0 * x.sum(dim=-1, keepdim=True)
            parts.append(self._activations(x, sums, with_fit, weight) + spoiled)
        if self._matrix is not None:
            self._matrix = self._matrix.to(x.device)
            parts.append(einsum(x, self._matrix, "token d, d feature -> token feature"))
        if not (self._read_latents and with_fit):
            sums.add_norms(x, weight)
        return torch.cat(parts, dim=1).index_select(1, self._order)

    def _activations(self, x: Tensor, sums: FitSums, with_fit: bool, weight: Tensor) -> Tensor:
        if not self.encodes_all(with_fit):
            self._sliced = self._sliced or SlicedEncoder(self.sae, self._read_latents)
            return self._sliced(x)
        return self._encoded(x, sums, with_fit, weight)

    def _encoded(self, x: Tensor, sums: FitSums, with_fit: bool, weight: Tensor) -> Tensor:
        sae: Any = self.sae
        size, columns = max(1, min(CHUNK_TOKENS, CHUNK_VALUES // sae.cfg.d_sae)), []
        for part, part_weight in zip(x.split(size), weight.split(size), strict=True):
            # Encoding and decoding must alternate: SAELens keeps a token's normalisation from the one for the other.
            acts = encode(sae, part)
            if with_fit:
                sums.add(part, sae.decode(acts.to(sae.dtype)).to(part.device), acts.to(part.device), part_weight)
            self._which = self._which.to(acts.device)
            columns.append(acts.index_select(1, self._which).to(x.device))
        return torch.cat(columns)


def _unit(name: str, direction: Tensor, width: int | None) -> Tensor:
    vector = direction.detach().float()
    if direction.ndim != 1 or width not in (None, len(direction)) or not 0 < float(vector.norm()) < float("inf"):
        raise InputError(f"feature {name!r} must be a non-zero direction of width {width or 'd_model'}")
    return vector / vector.norm()


# --- A reading leaves modes, gradients and random states as they were


@contextmanager
def undisturbed(model: nn.Module, *, keep_casts: bool = False) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards, also after an error, everything is as before, bit for bit.

    This restores every module's mode, every parameter's `requires_grad` (switching adapters off and on changes it), and
    the random states of Python, NumPy, torch on the CPU and on every CUDA device. Gradient mode and autocast belong to
    the caller's block.

    Args:
        keep_casts: let autocast keep a frozen weight's bf16 copy for the length of the block. It does so only for
            weights that require gradients, so inside the block all of them do.
    """
    modes = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            model.eval()
            for parameter in gradients if keep_casts else ():
                parameter.requires_grad_(parameter.is_floating_point())
            yield
    finally:
        for parameter, before in gradients.items():
            if parameter.requires_grad != before:
                parameter.requires_grad_(before)
        for module, mode in modes.items():
            module.training = mode
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def reading_autocast(device: torch.device, enabled: bool) -> Iterator[None]:
    """bf16 autocast for a reading that neither uses nor leaves casts in an autocast block of the caller.

    Such a block caches casts. The next training step would find one that was made without gradients, and would train
    nothing.
    """
    nested = torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=not nested):
        yield


# --- Probes, and one reading of them


@dataclass(frozen=True)
class ProbeRows:
    """One batch of probes, with the places of its selected tokens."""

    rows: Rows
    at: Int[Tensor, " tokens"]
    """Places of the selected tokens in the flattened (batch, pos) of `rows.rest`."""
    row: Int[Tensor, " tokens"]
    """The row that each of them belongs to."""
    tokens: Float[Tensor, "batch 1"]
    """How many each row has."""
    index: Int[Tensor, " batch"]
    """Which probes these rows are."""

    @classmethod
    def of(
        cls, group: Batch, positions: str, config: PretrainedConfig, device: torch.device, whole: bool = False
    ) -> "ProbeRows":
        """Prepare a batch.

        Args:
            whole: do not run a shared beginning separately.

        Raises:
            InputError: a probe has no token at the positions.
        """
        rows = Rows.whole(group) if whole or positions in IN_SHARED_BEGINNING else Rows.of(group, config)
        mask = rows.rest.select(positions)
        if not bool(mask.any(dim=1).all()):
            raise InputError(f"a conversation has no token at positions {positions!r}: give answers, or 'prompt'")
        rows = Rows(rows.batch.to(device), rows.shared, rows.rest.to(device))
        at, row = mask.flatten().nonzero()[:, 0], mask.nonzero()[:, 0]
        tokens, index = mask.sum(dim=1, keepdim=True).float(), torch.tensor(group.index)
        return cls(rows, at.to(device), row.to(device), tokens.to(device), index.to(device))

    def select(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "tokens d_model"]:
        """The selected tokens, in float32."""
        return resid.to(self.at.device).flatten(0, 1).index_select(0, self.at).float()

    def mean(self, values: Float[Tensor, "tokens features"]) -> Float[Tensor, "batch features"]:
        """Mean over each row's selected tokens."""
        total = torch.zeros(len(self.index), values.shape[1], device=values.device)
        return total.index_add_(0, self.row, values) / self.tokens


@dataclass(frozen=True)
class Snapshot:
    """Features of one model on the probes (passive: on the sequences of a training step)."""

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
        sae: a `sae_lens.SAE`; None where all features are directions.
        features: name to latent index or direction, see `Features`.
        groups: tokenised probes.
        layer: decoder layer whose output is read.
        positions: tokens averaged over, see `data.tokens.POSITIONS`.

    Raises:
        InputError: no feature, an unknown latent, or a direction of the wrong width.
    """

    def __init__(
        self,
        sae: Any | None,
        features: Features | FeatureSet,
        groups: Sequence[Batch],
        layer: int,
        positions: str = "response",
        bf16: bool = True,
    ) -> None:
        self.features = features if isinstance(features, FeatureSet) else FeatureSet(sae, features)
        self.sae, self.groups, self.layer, self.positions = sae, groups, layer, positions
        self.bf16 = bf16
        self._prepared: tuple[tuple[str, bool], list[ProbeRows]] | None = None

    def read(self, model: nn.Module, with_fit: bool = True) -> Snapshot:
        """Forward to the layer only, in eval mode and without gradients; all is put back, see `undisturbed`.

        An FSDP model runs to its end, because a pass cut short would leave its parameters gathered; every process must
        then call this.

        Args:
            with_fit: reconstruct too; otherwise explained variance and L0 are NaN, and an SAE whose latents do not
                compete is encoded at the chosen latents only.

        Raises:
            InputError: a probe has no token at the selected positions.
        """
        inner, sharded = unwrap(model), is_sharded(model)
        device = next(inner.parameters()).device
        cast_once = self.bf16 and not sharded and not torch.is_autocast_enabled(device.type)
        sums: _ReadingSums | None = None
        with undisturbed(model, keep_casts=cast_once), eager(), reading_autocast(device, self.bf16):
            for part in self._parts(inner, device, sharded):
                x = self._residuals(model, inner, part, sharded)
                sums = sums or _ReadingSums(self, x)
                with torch.autocast(device.type, enabled=False):
                    sums.add(part, self.features.columns(x, sums.fit, with_fit=with_fit))
        assert sums is not None
        return sums.snapshot(self.features)

    def _residuals(self, model: nn.Module, inner: nn.Module, part: ProbeRows, sharded: bool) -> Tensor:
        with ReadTap(inner, self.layer) as tap:
            if sharded:
                batch = part.rows.batch
                model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)
                reshard(model)
            else:
                config = transformer_config(inner)
                part.rows.run(partial(forward_to_layer, inner, self.layer), config, part.rows.ids())
        return part.select(tap.value)

    def _parts(self, inner: nn.Module, device: torch.device, whole: bool) -> list[ProbeRows]:
        """The probes on the model's device, prepared once."""
        key = (str(device), whole)
        if self._prepared is None or self._prepared[0] != key:
            config = transformer_config(inner)
            parts = [ProbeRows.of(group, self.positions, config, device, whole) for group in self.groups]
            self._prepared = (key, parts)
        return self._prepared[1]


class _ReadingSums:
    """The sums of one reading, on the device; fetched in one transfer."""

    def __init__(self, reader: FeatureReader, x: Float[Tensor, "tokens d_model"]) -> None:
        shape = sum(len(g.index) for g in reader.groups), len(reader.features.names)
        self.means, self.firing = (torch.zeros(shape, device=x.device) for _ in range(2))
        self.maximum = torch.full((shape[1],), -torch.inf, device=x.device)
        self.fit = FitSums(x.shape[1], x.device)

    def add(self, part: ProbeRows, columns: Float[Tensor, "tokens features"]) -> None:
        for target, values in ((self.means, columns), (self.firing, (columns > 0).float())):
            target[part.index] = part.mean(values)
        torch.maximum(self.maximum, columns.amax(dim=0), out=self.maximum)

    def snapshot(self, features: FeatureSet) -> Snapshot:
        parts = (self.means.flatten(), self.firing.flatten(), self.maximum, self.fit.vector)
        packed = torch.cat([part.to(precision(part.device)) for part in parts]).cpu()
        means, firing, maximum, fit = packed.split([part.numel() for part in parts])
        values, rates = (part.reshape(self.means.shape).double().numpy() for part in (means, firing))
        fitted = moments(fit, self.fit.fitted)
        return Snapshot(features.names, features.latents, values, rates.mean(axis=0), maximum.double().numpy(), fitted)
