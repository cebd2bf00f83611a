"""One measurement of named features on a fixed probe set."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig

from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError
from persona_probe.models.layers import forward_to_layer, transformer_config
from persona_probe.models.places import Place, Where
from persona_probe.models.prefix import Rows
from persona_probe.models.ranks import eager, is_sharded, reshard, unwrap
from persona_probe.models.residuals import IN_SHARED_BEGINNING
from persona_probe.models.taps import ReadTap
from persona_probe.monitor.features import FeatureGroups, Features, moments, precision
from persona_probe.saes.hooks import Saes
from persona_probe.saes.read import FitMoments
from persona_probe.stats import bootstrap_mean

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
    """Of the SAE; of several the first one's."""
    saes: tuple[str, ...] = ()
    """The SAE of each feature, empty for a direction; () where there is one SAE."""
    fits: Mapping[str, FitMoments] = field(default_factory=dict)
    """By SAE, where there are several; directions' residual norm under the empty name."""

    def rows(self) -> list[dict[str, Any]]:
        """One row per feature, in the columns of `readings.parquet` (without arm, seed, step and base)."""
        return [self._row(i) for i in range(len(self.names))]

    def _row(self, i: int) -> dict[str, Any]:
        mean = bootstrap_mean(self.values[:, i])
        fit = self.fits[self.saes[i]] if self.saes else self.fit
        return {
            **({"sae": self.saes[i]} if self.saes else {}),
            "feature": self.names[i],
            "latent": self.latents[i],
            "mean": mean.estimate,
            "ci_low": mean.ci_low,
            "ci_high": mean.ci_high,
            "maximum": float(self.maximum[i]),
            "firing_rate": float(self.firing[i]),
            "explained_variance": fit.explained_variance,
            "l0": fit.l0,
            "residual_norm": fit.residual_norm,
            "n_probes": len(self.values),
        }


class FeatureReader:
    """Reads the same features on the same probes from any model of one architecture.

    Args:
        sae: a `sae_lens.SAE`, a list or names of several, or None where all features are directions.
        features: name to latent index or direction, see `Features`.
        groups: tokenised probes.
        layer: decoder layer whose output is read, or a `Place`; with several SAEs, where directions are read.
        positions: tokens averaged over, see `data.tokens.POSITIONS`.

    Raises:
        InputError: no feature, an unknown latent, or a direction of the wrong width.
    """

    def __init__(
        self,
        sae: Saes | None,
        features: Features | FeatureGroups,
        groups: Sequence[Batch],
        layer: Where | None,
        positions: str = "response",
        bf16: bool = True,
    ) -> None:
        self.features = features if isinstance(features, FeatureGroups) else FeatureGroups.of(sae, features, layer)
        self.sae, self.groups, self.layer, self.positions = sae, groups, layer, positions
        self.bf16 = bf16
        self._prepared: tuple[tuple[str, bool], list[ProbeRows]] | None = None

    def read(self, model: nn.Module, with_fit: bool = True) -> Snapshot:
        """Forward to the highest layer only, in eval mode and without gradients; all is put back, see `undisturbed`.

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
                    sums.add(part, self.features.columns(x, sums.fits, with_fit=with_fit))
        assert sums is not None
        return sums.snapshot(self.features)

    def _residuals(
        self, model: nn.Module, inner: nn.Module, part: ProbeRows, sharded: bool
    ) -> dict[Place, Float[Tensor, "tokens width"]]:
        """The selected tokens in every place that is read, from one forward pass."""
        with ExitStack() as stack:
            taps = {place: stack.enter_context(ReadTap(inner, place)) for place in self.features.places}
            if sharded:
                batch = part.rows.batch
                model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)
                reshard(model)
            else:
                config = transformer_config(inner)
                part.rows.run(partial(forward_to_layer, inner, self.features.last_layer), config, part.rows.ids())
        return {place: part.select(tap.value) for place, tap in taps.items()}

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

    def __init__(self, reader: FeatureReader, x: Mapping[Place, Float[Tensor, "tokens width"]]) -> None:
        shape = sum(len(g.index) for g in reader.groups), len(reader.features.names)
        device = x[reader.features.parts[0].reads].device
        self.means, self.firing = (torch.zeros(shape, device=device) for _ in range(2))
        self.maximum = torch.full((shape[1],), -torch.inf, device=device)
        self.fits = reader.features.new_sums(x)

    def add(self, part: ProbeRows, columns: Float[Tensor, "tokens features"]) -> None:
        for target, values in ((self.means, columns), (self.firing, (columns > 0).float())):
            target[part.index] = part.mean(values)
        torch.maximum(self.maximum, columns.amax(dim=0), out=self.maximum)

    def snapshot(self, features: FeatureGroups) -> Snapshot:
        device = self.maximum.device
        parts = (self.means.flatten(), self.firing.flatten(), self.maximum, *(fit.vector for fit in self.fits))
        packed = torch.cat([part.to(device, precision(device)) for part in parts]).cpu()
        means, firing, maximum, *fits = packed.split([part.numel() for part in parts])
        values, rates = (part.reshape(self.means.shape).double().numpy() for part in (means, firing))
        fitted = [moments(vector, fit.fitted) for vector, fit in zip(fits, self.fits, strict=True)]
        return make_snapshot(features, values, rates.mean(axis=0), maximum.double().numpy(), fitted)


def make_snapshot(
    features: FeatureGroups,
    values: Float[np.ndarray, "probes features"],
    firing: Float[np.ndarray, " features"],
    maximum: Float[np.ndarray, " features"],
    fits: Sequence[FitMoments],
) -> Snapshot:
    """The snapshot of a reading; `fits` come in the order of the features' parts."""
    named = {part.sae: fit for part, fit in zip(features.parts, fits, strict=True)} if features.several else {}
    saes = features.saes if features.several else ()
    return Snapshot(features.names, features.latents, values, firing, maximum, fits[0], saes, named)
