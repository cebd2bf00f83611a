"""Passive reading: features of the training batch itself, from hooks on the forwards of training."""

import logging
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from persona_probe.errors import InputError
from persona_probe.models.layers import base_transformer, causal_model
from persona_probe.models.places import Normalizer, Place, find_site, input_value, output_value
from persona_probe.models.prefix import Running, running
from persona_probe.models.ranks import unwrap
from persona_probe.monitor.features import FeatureGroups, FitSums, moments
from persona_probe.monitor.reading import Snapshot, make_snapshot, not_finite, same_randomness
from persona_probe.monitor.settings import PassiveReading
from persona_probe.saes.read import precision

log = logging.getLogger(__name__)

# --- One micro-batch: which tokens are read, and the sequence of each

IGNORED = -100
"""The label of a token that is not trained."""
Call = tuple[tuple[Any, ...], Mapping[str, Any], Running | None]
"""Arguments of a model's call, by position and by name, and the rows that it runs, if they are known."""
PACKED_SEQUENCES = 512
"""Sequences of one packed batch that are distinguished; tokens of later ones count in the fit, not as sequences."""


@dataclass(frozen=True)
class BatchView:
    """One micro-batch. Everything stays on the device: no length is fetched."""

    real: Bool[Tensor, "batch pos"]
    """Not padding."""
    trained: Bool[Tensor, "batch pos"] | None
    """Labels that are not -100; None where the model was given no labels."""
    sequence: Int[Tensor, "batch pos"]
    """Number of the token's sequence: its row, or in a packed row the count of `position_ids == 0` before it."""
    sequences: int
    """An upper bound of these numbers."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: Running | None = None) -> "BatchView":
        """From a model's call, for which `real_tokens` is not None.

        Args:
            rows: what the call runs, if it is known: which tokens are trained, where the call holds no labels.
        """
        inputs = _inputs(args, kwargs)
        assert inputs is not None
        shape, device = inputs.shape[:2], inputs.device
        attention, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        mask = _padding_mask(attention, shape)
        real = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.to(device).bool()
        has_label = None
        if isinstance(labels, Tensor) and labels.shape == shape:
            has_label = (labels.to(device) != IGNORED) & real
        elif rows is not None and rows.rows.rest.response.shape == shape:
            has_label = rows.rows.rest.response.to(device) & real
        sequence, count = _sequences(shape, None if attention is not None else kwargs.get("position_ids"), device)
        return cls(real, has_label, sequence, count)

    def selected(self, positions: str) -> Bool[Tensor, "batch pos"]:
        """The tokens to read; `response` is all real tokens where the model was given no labels."""
        return self.trained if positions == "response" and self.trained is not None else self.real


def real_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: Running | None = None) -> Tensor | int | None:
    """How many tokens of a model's call are not padding; None for a call without token ids or embeddings.

    Args:
        rows: what the call runs, if it is known: a beginning that they share counts in each of them.
    """
    inputs = _inputs(args, kwargs)
    if inputs is None:
        return None
    if rows is not None:
        return 0 if rows.beginning else (rows.rows.batch.attention != 0).sum()
    mask = _padding_mask(kwargs.get("attention_mask"), inputs.shape[:2])
    return inputs.shape[:2].numel() if mask is None else (mask != 0).sum()


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    ids = kwargs.get("input_ids", args[0] if args else None)
    inputs = ids if isinstance(ids, Tensor) else kwargs.get("inputs_embeds")
    return inputs if isinstance(inputs, Tensor) else None


def _padding_mask(attention: Any, shape: torch.Size) -> Tensor | None:
    """The part of a two-dimensional mask that covers this call's tokens; the rest covers cached ones."""
    if not isinstance(attention, Tensor) or attention.ndim != 2:
        return None
    return attention[:, -shape[1] :]


def _sequences(
    shape: torch.Size, position_ids: Tensor | None, device: torch.device
) -> tuple[Int[Tensor, "batch pos"], int]:
    """Number of each token's sequence. Packed rows have position ids that start again, and no attention mask."""
    rows = torch.arange(shape[0], device=device)[:, None].expand(shape)
    if not isinstance(position_ids, Tensor) or position_ids.shape != shape:
        return rows, shape[0]
    starts = position_ids.to(device).reshape(shape) == 0
    starts = starts | (torch.arange(shape[1], device=device) == 0)
    number = starts.flatten().long().cumsum(dim=0).reshape(shape) - 1
    return number, min(shape.numel(), PACKED_SEQUENCES)


def evenly_spaced_tokens(
    selected: Bool[Tensor, "batch pos"], limit: int
) -> tuple[Int[Tensor, " limit"], Float[Tensor, " limit"]]:
    """Places of at most `limit` selected tokens in the flattened batch, evenly spaced, and 1 or 0 for real or filler.

    Works without knowing on the host how many are selected.
    """
    rank = selected.flatten().long().cumsum(dim=0)
    k = min(limit, rank.numel())
    first, count = torch.arange(k, device=rank.device), rank[-1]
    spread = torch.div(first * count, k, rounding_mode="floor")
    target = torch.where(count > k, spread, first)
    places = torch.searchsorted(rank, target + 1).clamp(max=rank.numel() - 1)
    return places, (target < count).float()


# --- The sums of one optimizer step

SEQUENCES_KEPT = 512
"""Sequences of one step whose means are kept; a seeded random sample if there are more."""


class PassiveSums:
    """Per-sequence means (a reservoir), maxima and the fit of one optimizer step.

    Args:
        features: how many.
        fits: empty sums of how well each SAE fits.
        generator: draws the sample of sequences; a separate one, so that training's random state is not touched.
    """

    def __init__(
        self, features: int, fits: Sequence[FitSums], device: torch.device, generator: torch.Generator
    ) -> None:
        self.fits, self.generator = fits, generator
        self.maximum = torch.full((features,), -torch.inf, device=device)
        self.bad: Float[Tensor, " one"] = torch.zeros(1, device=device)
        """Tokens with an activation that is not finite."""
        self.center: Float[Tensor, " d_model_plus_1"] = torch.zeros(0, device=device)
        """Sum over sequences of their mean activations where directions are read, and the number of sequences."""
        self.sample: Float[Tensor, "sequences two_features"] = torch.zeros(0, 2 * features, device=device)
        self.key: Float[Tensor, " sequences"] = torch.zeros(0, device=device)

    def add(
        self,
        columns: Float[Tensor, "tokens features"],
        weight: Float[Tensor, " tokens"],
        sequence: Int[Tensor, " tokens"],
        sequences: int,
    ) -> None:
        """Count one micro-batch; tokens of weight 0 are filler."""
        real = weight[:, None] > 0
        hidden = torch.where(real, columns, -torch.inf)
        torch.maximum(self.maximum, hidden.amax(dim=0), out=self.maximum)
        both = torch.cat([torch.where(real, columns, 0.0), (hidden > 0).float(), weight[:, None]], dim=1)
        total, tokens = _by_sequence(both, sequence, sequences)
        self._keep(total[:, :-1] / tokens.clamp(min=1), tokens[:, 0] > 0)

    def add_center(
        self,
        x: Float[Tensor, "tokens d_model"],
        weight: Float[Tensor, " tokens"],
        sequence: Int[Tensor, " tokens"],
        sequences: int,
    ) -> None:
        """Count one micro-batch in the mean of what random directions see."""
        real = torch.where(weight[:, None] > 0, x, 0.0)
        total, tokens = _by_sequence(torch.cat([real, weight[:, None]], dim=1), sequence, sequences)
        both = torch.cat([(total[:, :-1] / tokens.clamp(min=1)).sum(dim=0), (tokens > 0).sum(dim=0).float()])
        self.center = both if len(self.center) == 0 else self.center + both

    def _keep(self, means: Float[Tensor, "sequences two_features"], present: Tensor) -> None:
        """Reservoir sampling by random keys: the sequences with the largest keys stay."""
        key = torch.rand(len(means), device=means.device, generator=self.generator)
        self.sample = torch.cat([self.sample, means])
        self.key = torch.cat([self.key, torch.where(present, key, -1.0)])
        if len(self.key) > SEQUENCES_KEPT:
            self.key, best = self.key.topk(SEQUENCES_KEPT)
            self.sample = self.sample.index_select(0, best)

    def fetch(self, features: FeatureGroups, tokens_seen: Tensor | int) -> tuple[Snapshot | None, int]:
        """The one transfer to the host: the step's snapshot (None where no token was selected), and the tokens seen."""
        device = self.key.device
        # Built on the device: sending a number to it would wait for it.
        known = isinstance(tokens_seen, int)
        count = torch.full((1,), tokens_seen, device=device) if known else tokens_seen.to(device)[None]
        parts = (self.key, self.sample.flatten(), self.maximum, count, self.bad, self.center)
        parts = (*parts, *(fit.vector for fit in self.fits))
        packed = torch.cat([part.to(device, precision(device)) for part in parts]).cpu().double()
        key, sample, maximum, tokens, bad, center, *fits = packed.split([part.numel() for part in parts])
        rows = sample.reshape(len(key), -1)[key >= 0].numpy()
        if len(rows) == 0:
            return None, int(tokens)
        means, firing = rows[:, : len(features.names)], rows[:, len(features.names) :]
        fitted = [moments(vector, fit.fitted) for vector, fit in zip(fits, self.fits, strict=True)]
        finite = float(bad) == 0
        snapshot = make_snapshot(features, means, firing.mean(axis=0), maximum.numpy(), fitted, finite)
        if len(center):
            snapshot = replace(snapshot, center=(center[:-1] / center[-1]).numpy())
        return snapshot, int(tokens)


def _by_sequence(
    values: Float[Tensor, "tokens columns"], sequence: Int[Tensor, " tokens"], sequences: int
) -> tuple[Float[Tensor, "sequences columns"], Float[Tensor, "sequences 1"]]:
    """Sums over each sequence's tokens, and its number of tokens, which the last column counts."""
    total = torch.zeros(sequences + 1, values.shape[1], device=values.device)
    total.index_add_(0, sequence.clamp(max=sequences), values)
    return total[:sequences], total[:sequences, -1:]


# --- The hooks

DEAD_HOOK = (
    "no training forward reached the passive hook in the first step that was due: a model that was compiled before "
    "does not see it; start the monitor before the first compiled step, or take mode='probe'"
)
EVAL_MODE = (
    "the forwards of the first step that was due ran in eval mode, and passive reading counts those in training mode: "
    "call model.train() before training, or take mode='probe'"
)
UNLABELLED = "the model is given no labels: passive readings are over all tokens that are not padding"
TOKENS_READ, TOKENS_ENCODED = 4096, 512
"""Default bounds per optimizer step: tokens that are projected or encoded at a few latents; tokens encoded in full."""


class PassiveReader:
    """Hooks that read one layer, or several places, during training forwards.

    A forward counts when the causal model (or, where a trainer calls it directly, the transformer below) is entered in
    training mode with gradients on. The layer is read while that forward lasts. So evaluation, generation and the
    probes do not count; nor does gradient checkpointing's recomputation, which runs in the backward pass: of the
    reentrant kind the first forward through a layer has no gradients, of the other kind both have them, but both enter
    the model with gradients on.

    Of a step that is not due only the tokens are counted. At a due step (`armed`) all its micro-batches are pooled.

    Args:
        features: with the places that they are read in.
        settings: which tokens are read.
        on_error: gets what a hook raised; the hooks are off from then on.
    """

    def __init__(
        self,
        features: FeatureGroups,
        settings: PassiveReading,
        on_error: Callable[[Exception], None],
        seed: int = 0,
    ) -> None:
        self.features, self.settings, self.on_error, self.seed = features, settings, on_error, seed
        self.armed = self.with_fit = self.fired = self.scoped = False
        self.unlabelled = self.in_eval_mode = self._warned = False
        self.micro_batches, self.seconds, self.tokens_seen = 1, 0.0, 0
        self._handles: list[RemovableHandle] = []
        self._call: Call | None = None
        self._opener: nn.Module | None = None
        self._sums: PassiveSums | None = None
        self._seen: dict[Place, Tensor] = {}
        self._tokens: Tensor | int = 0

    def attach(self, model: nn.Module, micro_batches: int = 1, scoped: bool = False) -> None:
        """Put the hooks on, below any wrapper.

        Args:
            micro_batches: per optimizer step; they share `max_tokens`.
            scoped: the caller is sure to call `detach`; otherwise the hooks are taken off when a forward raises.
        """
        self.detach()
        inner = unwrap(model)
        self.micro_batches, self.scoped, self._tokens = max(1, micro_batches), scoped, 0
        causal, transformer = causal_model(inner), base_transformer(inner)
        reader: weakref.ref[PassiveReader] = weakref.ref(self)  # a hook must not keep a forgotten monitor alive
        enter, leave = (_calling(reader, m) for m in (PassiveReader.enter, PassiveReader.leave))
        for module in dict.fromkeys((causal, transformer)):
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        self._handles += [_hooked(reader, inner, place) for place in self.features.places]
        weakref.finalize(self, _remove, self._handles).atexit = False

    def detach(self) -> None:
        """Take the hooks off; safe to call twice."""
        _remove(self._handles)
        self._call = self._opener = None
        self.disarm()

    @property
    def attached(self) -> bool:
        """Whether the hooks are on."""
        return bool(self._handles)

    def arm(self, with_fit: bool) -> None:
        """Read all forwards until `take`, as one step."""
        self.armed, self.with_fit, self._sums, self.seconds = self.attached, with_fit, None, 0.0

    def disarm(self) -> None:
        """Read nothing; tokens are still counted."""
        self.armed, self._sums = False, None

    def take(self) -> Snapshot | None:
        """The snapshot since `arm`; None if the step was not due or had no token to read. One transfer to the host.

        Raises:
            InputError: no training forward was seen; the message gives the reason.
        """
        sums, armed, self._sums, self.armed = self._sums, self.armed, None, False
        if armed and not self.fired:
            raise InputError(EVAL_MODE if self.in_eval_mode else DEAD_HOOK)
        if self.unlabelled and not self._warned:
            self._warned = True
            log.warning(UNLABELLED)
        snapshot = None
        if sums is None:
            self.tokens_seen = int(self._tokens)
        else:
            snapshot, self.tokens_seen = sums.fetch(self.features, self._tokens)
        return snapshot

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Pre-hook of the model: a training forward begins."""
        if self._opener is not None or not torch.is_grad_enabled():
            return
        self.in_eval_mode = self.in_eval_mode or not module.training
        rows = running()
        tokens = real_tokens(args, kwargs, rows) if module.training else None
        if tokens is not None:
            self._seen.clear()
            self._opener, self._call, self._tokens = module, (args, kwargs, rows), self._tokens + tokens

    def leave(self, module: nn.Module, _args: object, output: object) -> None:
        """Hook of the model: the forward ended. Without output it raised, and so will training."""
        if module is self._opener:
            self._opener = self._call = None
            if output is None and not self.scoped:
                self.detach()

    @torch.no_grad()
    def see(self, place: Place, activation: Tensor) -> None:
        """Hook of a place; when all places were seen, the micro-batch is read."""
        if self._call is None:
            return
        self.fired = True
        rows = self._call[2]
        if not self.armed or (rows is not None and rows.beginning):  # of what all rows share nothing is trained
            return
        begin = time.perf_counter()
        self._seen[place] = activation.detach()
        if len(self._seen) == len(self.features.places):
            with same_randomness(), torch.autocast(activation.device.type, enabled=False):
                self._read(self._seen, BatchView.of(*self._call))
            self._seen.clear()
        self.seconds += time.perf_counter() - begin

    def _read(self, seen: Mapping[Place, Tensor], view: BatchView) -> None:
        self.unlabelled = self.unlabelled or (self.settings.positions == "response" and view.trained is None)
        device = seen[self.features.parts[0].reads].device
        places, weight = evenly_spaced_tokens(view.selected(self.settings.positions).to(device), self._limit())
        x = {place: a.flatten(0, 1).index_select(0, places.to(a.device)).float() for place, a in seen.items()}
        if self._sums is None:
            generator = torch.Generator(device).manual_seed(self.seed)
            self._sums = PassiveSums(len(self.features.names), self.features.new_sums(x), device, generator)
        columns = self.features.columns(x, self._sums.fits, with_fit=self.with_fit, weight=weight)
        sequence = view.sequence.to(device).flatten().index_select(0, places)
        self._sums.add(columns, weight, sequence, view.sequences)
        self._sums.bad += not_finite(x, device, weight)
        if (place := self.features.direction_place) is not None:
            self._sums.add_center(x[place].to(device), weight, sequence, view.sequences)

    def _limit(self) -> int:
        default = TOKENS_ENCODED if self.features.encodes_all(self.with_fit) else TOKENS_READ
        return max(1, (self.settings.max_tokens or default) // self.micro_batches)


def _hooked(reader: "weakref.ref[PassiveReader]", model: nn.Module, place: Place) -> RemovableHandle:
    """A hook that shows the reader what is in a place."""
    site = find_site(model, place)

    def output(reader: PassiveReader, _module: nn.Module, _args: object, given: object) -> None:
        reader.see(place, output_value(given))

    if site.side == "output":
        return site.module.register_forward_hook(_calling(reader, output))
    norm = Normalizer(site.module) if site.side == "normalized" else None

    def taken(reader: PassiveReader, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        value = input_value(args, kwargs)
        reader.see(place, value if norm is None or not reader.armed else norm(value))

    return site.module.register_forward_pre_hook(_calling(reader, taken), with_kwargs=True)


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _calling(reference: "weakref.ref[PassiveReader]", method: Callable[..., None]) -> Callable[..., None]:
    """A hook that calls a method of the reader, if that still exists, and never raises into training."""

    def hook(*args: Any) -> None:
        reader = reference()
        if reader is None or not reader.attached:
            return
        try:
            method(reader, *args)
        except Exception as error:
            reader.detach()
            reader.on_error(error)

    # `torch.compile` must not trace a Python object's state. Its import is heavy: done only where it is in use.
    uncompiled: Any = torch.compiler.disable
    return uncompiled(hook) if "torch._dynamo" in sys.modules else hook
