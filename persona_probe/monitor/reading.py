"""One measurement of named features on a fixed probe set."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
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
from persona_probe.monitor.features import FeatureGroups, Features, moments
from persona_probe.saes.hooks import Saes
from persona_probe.saes.read import FitMoments, precision
from persona_probe.stats import bootstrap_mean

# --- A reading leaves modes, gradients and random states as they were


@contextmanager
def same_randomness() -> Iterator[None]:
    """After the block, also after an error, the process draws and computes as it would have without it.

    This restores the random states of Python, NumPy, torch on the CPU and on every CUDA device, whether gradients are
    on, the default dtype and the number of threads.
    """
    python, numpy = random.getstate(), np.random.get_state()
    gradients, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """After the block every module's mode and every parameter's `requires_grad` are as before, also after an error."""
    modes = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, before in gradients.items():
            if parameter.requires_grad != before:
                parameter.requires_grad_(before)
        for module, mode in modes.items():
            module.training = mode


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@contextmanager
def nothing_left(model: nn.Module) -> Iterator[None]:
    """For a user's function: what `same_modes` restores, and no hook or gradient stays that was not there before.

    Not for sharded models, which put hooks on in their first forward.
    """
    hooks = {module: [set(getattr(module, name, ())) for name in HOOKS] for module in model.modules()}
    without = [parameter for parameter in model.parameters() if parameter.grad is None]
    with same_modes(model):
        try:
            yield
        finally:
            for parameter in without:
                parameter.grad = None
            for module, before in hooks.items():
                for name, kept in zip(HOOKS, before, strict=True):
                    now = getattr(module, name, {})
                    for key in [key for key in now if key not in kept]:
                        del now[key]


@contextmanager
def undisturbed(model: nn.Module, *, keep_casts: bool = False) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards, also after an error, everything is as before, bit for bit.

    This restores what `same_randomness` and `same_modes` do (switching adapters off and on changes `requires_grad`).
    Autocast belongs to the caller's block.

    Args:
        keep_casts: let autocast keep a frozen weight's bf16 copy for the length of the block. It does so only for
            weights that require gradients, so inside the block all of them do.
    """
    with same_randomness(), same_modes(model), torch.no_grad():
        model.eval()
        for parameter in model.parameters() if keep_casts else ():
            parameter.requires_grad_(parameter.is_floating_point())
        yield


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
    finite: bool = True
    """Whether all activations that were read, and all values, are finite."""
    center: Float[np.ndarray, " d_model"] | None = None
    """Mean over probes of the activations where directions are read; None where none is."""

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
                    sums.note(part, x)
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
        self.bad, self.place = torch.zeros(1, device=device), reader.features.direction_place
        self.center = torch.zeros(0 if self.place is None else x[self.place].shape[-1], device=device)
        self.fits = reader.features.new_sums(x)

    def add(self, part: ProbeRows, columns: Float[Tensor, "tokens features"]) -> None:
        for target, values in ((self.means, columns), (self.firing, (columns > 0).float())):
            target[part.index] = part.mean(values)
        torch.maximum(self.maximum, columns.amax(dim=0), out=self.maximum)

    def note(self, part: ProbeRows, x: Mapping[Place, Float[Tensor, "tokens width"]]) -> None:
        self.bad += not_finite(x, self.bad.device)
        if self.place is not None:
            self.center += part.mean(x[self.place].to(self.bad.device)).sum(dim=0) / len(self.means)

    def snapshot(self, features: FeatureGroups) -> Snapshot:
        device = self.maximum.device
        parts = (self.means.flatten(), self.firing.flatten(), self.maximum, self.bad, self.center)
        parts = (*parts, *(fit.vector for fit in self.fits))
        packed = torch.cat([part.to(device, precision(device)) for part in parts]).cpu()
        means, firing, maximum, bad, center, *fits = packed.split([part.numel() for part in parts])
        values, rates = (part.reshape(self.means.shape).double().numpy() for part in (means, firing))
        fitted = [moments(vector, fit.fitted) for vector, fit in zip(fits, self.fits, strict=True)]
        snapshot = make_snapshot(
            features, values, rates.mean(axis=0), maximum.double().numpy(), fitted, float(bad) == 0
        )
        return snapshot if self.place is None else replace(snapshot, center=center.double().numpy())


def not_finite(x: Mapping[Place, Tensor], device: torch.device, weight: Tensor | None = None) -> Float[Tensor, " one"]:
    """How many tokens have an activation that is NaN or infinite; stays on the device.

    Args:
        weight: 0 for tokens that do not count.
    """
    total = torch.zeros(1, device=device)
    for values in x.values():
        bad = ~values.isfinite().all(dim=-1)
        total += (bad if weight is None else bad & (weight.to(bad.device) > 0)).sum().to(device)
    return total


def make_snapshot(
    features: FeatureGroups,
    values: Float[np.ndarray, "probes features"],
    firing: Float[np.ndarray, " features"],
    maximum: Float[np.ndarray, " features"],
    fits: Sequence[FitMoments],
    finite: bool = True,
) -> Snapshot:
    """The snapshot of a reading; `fits` come in the order of the features' parts, `finite` is of the activations."""
    named = {part.sae: fit for part, fit in zip(features.parts, fits, strict=True)} if features.several else {}
    saes = features.saes if features.several else ()
    finite = finite and bool(np.isfinite(values).all())
    return Snapshot(features.names, features.latents, values, firing, maximum, fits[0], saes, named, finite)
