"""One monitored training run: what is read when a step is due, and what all processes agree on afterwards."""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from persona_probe.data.tokens import batches
from persona_probe.errors import InputError
from persona_probe.models.adapters import base_weights, is_adapted, trains_base
from persona_probe.models.layers import causal_model, hidden_size
from persona_probe.models.places import as_place, find_site
from persona_probe.models.ranks import Ranks, is_partitioned, is_sharded, unwrap
from persona_probe.monitor.events import BASE_KEY, Alarm, Behaviour, End, Reading, Start
from persona_probe.monitor.features import Feature, FeatureGroups, flatten
from persona_probe.monitor.hub import EventHub
from persona_probe.monitor.passive import PassiveReader
from persona_probe.monitor.reading import FeatureReader, Snapshot, nothing_left, undisturbed
from persona_probe.monitor.reading_records import (
    Anchor,
    StepInfo,
    anchor_from,
    fingerprint,
    make_reading,
    recorded,
    write_values,
)
from persona_probe.monitor.settings import Measure, MonitorSettings
from persona_probe.runs import versions
from persona_probe.saes.load import check_placed

if TYPE_CHECKING:
    from persona_probe.monitor.actions.action import ActionContext

log = logging.getLogger(__name__)

PROBE, PASSIVE, ON_READING, VALUES = "probe reading", "passive reading", "on_reading", "values_path"
MONITOR = "monitor"
"""Parts of a monitor, as faults name them."""
_WEIGHTS = 16
"""Trained tensors of which values are noted at each step; an optimizer moves all of them."""


@dataclass
class TrainingState:
    """The training run around a monitor, as far as the monitor knows it; a plain loop has no control, state or args."""

    model: nn.Module
    control: TrainerControl | None = None
    state: TrainerState | None = None
    args: TrainingArguments | None = None
    optimizer: Optimizer | None = None
    scheduler: Any = None
    checkpoint_folder: Path | None = None
    accumulation: int = 1
    """Micro-batches per optimizer step, where no args say it."""
    max_steps: int | None = None
    """The last step of training, where no state says it."""
    logged_loss: float | Tensor | None = None
    logged_rate: float | None = None

    @property
    def loss(self) -> float | None:
        """The latest loss that was logged; a tensor is fetched only here."""
        return _number(self.logged_loss)

    @property
    def learning_rate(self) -> float | None:
        """The rate of the optimizer's first group; without an optimizer, the latest that was logged."""
        groups = getattr(self.optimizer, "param_groups", None)
        return _number(groups[0]["lr"] if groups else self.logged_rate)

    @property
    def replicated(self) -> bool:
        """Whether the trainer splits batches over devices in one process (`nn.DataParallel`)."""
        if isinstance(self.model, nn.DataParallel):
            return True
        return self.args is not None and self.args.parallel_mode is ParallelMode.NOT_DISTRIBUTED

    @property
    def micro_batches(self) -> int:
        """Micro-batches per optimizer step."""
        return self.accumulation if self.args is None else self.args.gradient_accumulation_steps

    @property
    def last_step(self) -> int | None:
        """The step at which training ends, where the trainer knows."""
        return self.max_steps if self.state is None else self.state.max_steps

    @property
    def counted_tokens(self) -> int | None:
        """The trainer's own count of training tokens, where it keeps one without padding."""
        if self.args is None or self.state is None or self.args.include_num_input_tokens_seen != "non_padding":
            return None
        return int(self.state.num_input_tokens_seen)

    def note(self, logs: dict[str, Any]) -> None:
        """Take loss and learning rate from what a trainer logs."""
        self.logged_loss = logs.get("loss", self.logged_loss)
        self.logged_rate = logs.get("learning_rate", self.logged_rate)

    def context(self, step: int, monitor: Any) -> "ActionContext":
        """The training run as actions see it."""
        from persona_probe.monitor.actions.action import ActionContext

        return ActionContext(
            step=step,
            model=self.model,
            monitor=monitor,
            control=self.control,
            state=self.state,
            args=self.args,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            checkpoint_folder=self.checkpoint_folder,
        )


def _number(value: Any) -> float | None:
    """A number that a trainer logs, which may be a tensor or text; None where it is no number."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


class MonitoredRun:
    """One model in training, and what the monitor knows of it.

    Args:
        monitor: what actions get as the monitor.
        step: the training step at which it begins (above zero for a run that is resumed).
        scoped: the caller is sure to call `close`, also after an error.
        before: the monitor's run before this one.

    Raises:
        InputError: an SAE, layer, direction or base that does not fit, no tokenizer, or a rule for an unknown feature.
    """

    def __init__(
        self,
        monitor: Any,
        settings: MonitorSettings,
        hub: EventHub,
        training: TrainingState,
        tokenizer: PreTrainedTokenizerBase | None,
        step: int,
        scoped: bool,
        before: "MonitoredRun | None" = None,
    ) -> None:
        self.monitor, self.settings, self.hub, self.training, self.step = monitor, settings, hub, training, step
        self.ranks, inner = Ranks(), unwrap(training.model)
        self.sharded = is_sharded(training.model)
        self.reads = self.ranks.first or self.sharded
        self.hub.begin(self.ranks.first)
        self.last_step, self.must_read, self._closed, self._has_read = -1, False, False, False
        self._steps_read: set[int] = set()
        self.tokens_seen: int | None = None
        self._reading = False
        self.base: Snapshot | None = settings.base if isinstance(settings.base, Snapshot) else None
        self._sample: WeightSample | None = None
        self._weights: Tensor | None = None
        features = feature_set(settings, inner)
        self.reading_log = ReadingLog(settings, hub, features, inner, self.ranks.first)
        self.probe = probe_reader(settings, features, tokenizer) if settings.runs_probes else None
        self.passive: PassiveReader | None = None
        if (anchor := self._anchor(inner, before)) is not None:
            self.reading_log.announce(anchor)
        if settings.reads_batches:  # last: an error above must leave no hook behind
            if training.replicated:
                raise InputError("DataParallel copies the model at every step: take mode='probe', or use torchrun")
            self.passive = PassiveReader(features, settings.passive, self._passive_failed)
            try:
                self.passive.attach(training.model, training.micro_batches, scoped)
            except BaseException:
                self.passive.detach()
                raise

    def _passive_failed(self, error: Exception) -> None:
        if self.hub.on_error == "raise":
            raise error
        self.hub.fail(PASSIVE, self.step + 1, error)

    def _anchor(self, inner: nn.Module, before: "MonitoredRun | None") -> Anchor | None:
        if self.settings.base is not None:
            return anchor_from(self.settings.base, self.reading_log.features.names)
        if before is not None and before.has_trained(inner) and before.reading_log.anchor is not None:
            log.warning(
                "training begins again at step %d on a model that was trained before: its weights are no base, and "
                "readings stay compared with the base that was read then",
                self.step,
            )
            self.base = before.base
            return before.reading_log.anchor
        earlier = _earlier_anchor(self.settings, inner, self.step)
        if earlier is not None or self.probe is None or not self.reads:
            return earlier
        self.base = self.hub.attempt(PROBE, self.step, self._read_base, always=(InputError,))
        return None if self.base is None else Anchor.of(self.base)

    def _read_base(self) -> Snapshot:
        """The model as it is now, adapters off."""
        assert self.probe is not None
        model = self.training.model
        with undisturbed(model), base_weights(unwrap(model)):
            return self.probe.read(model)

    def has_trained(self, inner: nn.Module) -> bool:
        """Whether this run saw optimizer steps on a model's own weights: these are then no longer the base's."""
        same = unwrap(self.training.model) is inner
        return same and self._weights is not None and (not is_adapted(inner) or trains_base(inner))

    def note_weights(self) -> None:
        """An optimizer step is done: note a few of the weights that it left."""
        self._sample = self._sample or WeightSample(self.training.model, self.sharded)
        self._weights = self._sample.values()

    def _is_swapped(self) -> bool:
        """Whether the weights are others than those that the last step left; every process must call it."""
        swapped = False
        if self._sample is not None and self._weights is not None:
            now = self._sample.values()
            swapped = now.shape == self._weights.shape and not torch.equal(now, self._weights)
        (swaps,) = self.ranks.total([float(swapped)], self._device)
        return swaps > 0

    def guarded(self, call: Callable[[], object], step: int) -> None:
        """Call what belongs to the monitor itself; an error there turns the whole monitor off, and training goes on."""
        self.hub.attempt(MONITOR, step, call)
        if self.passive is not None and not self.hub.is_on(MONITOR):
            self.passive.detach()

    def arm(self, step: int) -> None:
        """Get ready for the next training step: read it passively where it is due.

        Without probes the first step is always read: its forwards run on the weights that training begins with.
        """
        first = self.probe is None and not self._has_read
        self.must_read = first or step == self.training.last_step
        if self.passive is not None:
            if self.must_read or self.settings.schedule.due(step):
                self.passive.arm(self.reading_log.with_fit("passive"))
            else:
                self.passive.disarm()

    def take(self, step: int) -> None:
        """All readings of a step; then rules, actions and, in a distributed run, what all processes must agree on."""
        self._has_read, self.step, self.last_step, readings = True, step, step, list[Reading | None]()
        self._steps_read.add(step)
        begin = time.perf_counter()
        passive = None if self.passive is None else self.hub.attempt(PASSIVE, step, self.passive.take)
        if self.passive is not None and not self.hub.is_on(PASSIVE):
            self.passive.detach()
        spent = time.perf_counter() - begin
        self._count_tokens()
        if self.probe is not None and self.reads:
            result = self.hub.attempt(PROBE, step, lambda: self._read_probes(step))
            readings += [] if result is None else [result[1]]
        if passive is not None and self.passive is not None:
            readings.append(self._record(passive, "passive", step, spent + self.passive.seconds))
        # Measured before any rule is asked, so that a rule of rules sees all of a step at once.
        with self._busy():
            measured = self._measure_behaviour(step)
            alarms = self.hub.judge(step, [reading for reading in readings if reading is not None], measured)
        self._conclude(step, alarms)
        self.hub.flush(step)

    def read_probes(self, step: int) -> Snapshot:
        """Run the probes now, record the reading, and ask the rules."""
        snapshot, reading = self._read_probes(step)
        with self._busy():
            self.hub.judge(step, [] if reading is None else [reading], {})
        return snapshot

    def _read_probes(self, step: int) -> tuple[Snapshot, Reading | None]:
        if self.probe is None:
            raise InputError("mode='passive' has no probes to read: take mode='probe' or 'both'")
        with self._busy():
            begin = time.perf_counter()
            snapshot = self.probe.read(self.training.model, self.reading_log.with_fit("probe"))
            self.last_step = step
            self._steps_read.add(step)
            return snapshot, self._record(snapshot, "probe", step, time.perf_counter() - begin)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """While the block lasts no other reading can start."""
        if self._reading:
            raise InputError("a reading is going on: a rule, a measurement or on_reading must not start another one")
        self._reading = True
        try:
            yield
        finally:
            self._reading = False

    def _record(self, snapshot: Snapshot, mode: str, step: int, seconds: float) -> Reading | None:
        training = self.training
        info = StepInfo(training.loss, training.learning_rate, self.tokens_seen)
        return self.reading_log.record(snapshot, mode, step, seconds, info, training.model)

    def _count_tokens(self) -> None:
        """Training tokens so far: the trainer's count, else what the passive hooks of all processes saw."""
        self.tokens_seen = self.training.counted_tokens
        if self.passive is not None:
            (total,) = self.ranks.total([float(self.passive.tokens_seen)], self._device)
            if self.tokens_seen is None and self.hub.is_on(PASSIVE):
                self.tokens_seen = int(total)

    @property
    def _device(self) -> torch.device:
        return next(self.training.model.parameters()).device

    def _measure_behaviour(self, step: int) -> dict[str, Behaviour]:
        """The measurements that are due, by their names in the settings; sinks get them."""
        behaviour, measured = self.settings.behaviour, dict[str, Behaviour]()
        if behaviour is None or not self.reads or not behaviour.due(step):
            return measured
        model = self.training.model if self.sharded else unwrap(self.training.model)
        for name, call in behaviour.by_name.items():
            part = f"behaviour {name!r}"
            event = self.hub.attempt(part, step, lambda name=name, call=call: self._measured(name, call, model, step))
            if event is not None:
                self.hub.emit(event)
                measured[name] = event
        return measured

    def _measured(self, name: str, call: Measure, model: nn.Module, step: int) -> Behaviour:
        with nullcontext() if self.sharded else nothing_left(model):
            return _measure(name, call, model, step)

    def _conclude(self, step: int, alarms: list[Alarm]) -> None:
        """Let actions act, in every process that they must act in, and stop all processes where one stops."""
        clean = not alarms and self.hub.all_inside(step)
        if self.ranks.many:
            alarms, clean = self.ranks.from_first((alarms, clean))
        self.hub.act(alarms, clean, lambda: self.training.context(step, self.monitor))
        if self.ranks.many:
            self._agree()
        if self.monitor.should_stop and self.training.control is not None:
            self.training.control.should_training_stop = True

    def _agree(self) -> None:
        """One small collective: a stop counts everywhere; probes that failed in one process are off in all."""
        control = self.training.control
        stop = self.monitor.should_stop or (control is not None and control.should_training_stop)
        failed = not self.hub.is_on(PROBE)
        stops, failures = self.ranks.total([float(stop), float(failed)], self._device)
        if stops > 0:
            self.monitor.request_stop()
        if failures > 0:
            self.hub.switch_off(PROBE)

    def read_last(self, step: int) -> None:
        """Read after the last step, unless that was just done, or the weights are no longer those of that step."""
        if self.passive is not None:
            self.passive.disarm()
        if step in self._steps_read:  # also where an action has read something by hand since
            return
        if self._is_swapped():
            log.warning(
                "no reading at the end: the weights are not those of step %d any more (a best checkpoint, an average)",
                step,
            )
            return
        self.take(step)

    def finish(self, step: int) -> None:
        """Training is over: read once more unless that was just done, then emit the end."""
        self.guarded(lambda: self.read_last(step), step)
        self.hub.emit(End(step, len(self.reading_log.readings), self.reading_log.seconds))
        self.close()

    def close(self) -> None:
        """Take the hooks off and close the sinks; safe to call twice."""
        if self.passive is not None:
            self.passive.detach()
        if not self._closed:
            self._closed = True
            self.hub.close(self.step)


class WeightSample:
    """A few values of the trained weights, at places that are chosen once: a step must not walk through the model.

    None of a sharded model, whose parts come and go.
    """

    def __init__(self, model: nn.Module, sharded: bool) -> None:
        owned = [(m, name) for m in model.modules() for name, p in m._parameters.items() if p is not None]
        trained = [] if sharded else [(m, name) for m, name in owned if getattr(m, name).requires_grad]
        self.places = trained[:: max(1, len(trained) // _WEIGHTS)]

    def values(self) -> Tensor:
        """The values now, on one device; none where a place is gone."""
        parts = [getattr(module, name, None) for module, name in self.places]
        weights = [p.detach().flatten()[:: max(1, p.numel() // 4)][:4].float() for p in parts if isinstance(p, Tensor)]
        whole = bool(weights) and len(weights) == len(parts)
        return torch.cat([w.to(weights[0].device) for w in weights]) if whole else torch.empty(0)


def _measure(name: str, call: Measure, model: nn.Module, step: int) -> Behaviour:
    """Call a user's measurement in eval mode, without gradients; modes and random states are put back."""
    with undisturbed(model):
        result = call(model)
    return replace(result, step=step) if isinstance(result, Behaviour) else Behaviour(step, name, float(result))


class ReadingLog:
    """The readings of one run: compared with the base, kept and passed on.

    Args:
        inner: the model below all wrappers; the start event names it.
        recording: whether this process records (the first of a distributed run); the others only count.
    """

    def __init__(
        self, settings: MonitorSettings, hub: EventHub, features: FeatureGroups, inner: nn.Module, recording: bool
    ) -> None:
        self.settings, self.hub, self.features, self.inner, self.recording = settings, hub, features, inner, recording
        self.anchor: Anchor | None = None
        self.readings: list[Reading] = []
        self.count = {"probe": 0, "passive": 0}
        self.seconds = 0.0

    def announce(self, anchor: Anchor) -> None:
        """The base is known: tell sinks and rules that the run starts."""
        self.anchor = anchor
        self.hub.announce(_start_event(self.settings, self.features, anchor, self.inner))

    def with_fit(self, mode: str) -> bool:
        """Whether the next reading of a mode measures how well the SAE fits."""
        return self.count[mode] % self.settings.fit_every == 0

    def record(
        self, snapshot: Snapshot, mode: str, step: int, seconds: float, info: StepInfo, model: nn.Module
    ) -> Reading | None:
        """Keep a reading and pass it on; None in a process that does not record.

        Without a base the first reading is the base.
        """
        self.count[mode] += 1
        if self.anchor is None:
            self.announce(Anchor.of(snapshot))
        assert self.anchor is not None
        reading = make_reading(snapshot, self.anchor, step=step, mode=mode, seconds=seconds, info=info)
        if not self.recording:
            return None
        self.readings.append(reading)
        self.seconds += seconds
        self.hub.emit(reading)
        self._pass_on(snapshot, mode, step, model)
        return reading

    def _pass_on(self, snapshot: Snapshot, mode: str, step: int, model: nn.Module) -> None:
        on_reading, folder = self.settings.on_reading, self.settings.values_path
        if folder is not None:  # first: a function of the user's might change the values
            self.hub.attempt(VALUES, step, lambda: write_values(folder, snapshot, mode, step))
        if on_reading is not None:
            with nullcontext() if is_sharded(model) else nothing_left(model):
                self.hub.attempt(ON_READING, step, lambda: on_reading(step, snapshot, model))

    def frame(self) -> pd.DataFrame:
        """All readings as a table, one row per reading and feature."""
        return pd.DataFrame([row for reading in self.readings for row in reading.rows()])


# --- What a run needs before its first reading


def feature_set(settings: MonitorSettings, inner: nn.Module) -> FeatureGroups:
    """The features, checked against the model (below all wrappers).

    Raises:
        InputError: an SAE, layer or direction that does not fit it.
    """
    if settings.runs_probes and is_partitioned(inner):
        raise InputError("probes cannot be run on a model that ZeRO-3 holds in parts: take mode='passive', or FSDP")
    for placed in settings.saes:
        check_placed(placed, inner)
    for place in settings.groups.places:
        find_site(inner, place)
    return FeatureGroups.of(settings.sae, settings.features, settings.layer, hidden_size(inner))


def probe_reader(
    settings: MonitorSettings, features: FeatureGroups, tokenizer: PreTrainedTokenizerBase | None
) -> FeatureReader:
    """The reader of the probes.

    Raises:
        InputError: no tokenizer.
    """
    if tokenizer is None:
        raise InputError("FeatureMonitor needs a tokenizer: pass tokenizer= (the trainer has none)")
    groups = list(batches(tokenizer, settings.probes, batch_size=32))
    return FeatureReader(settings.sae, features, groups, settings.layer, settings.positions, settings.bf16)


def _earlier_anchor(settings: MonitorSettings, inner: nn.Module, step: int) -> Anchor | None:
    """The base that the event file holds, for a run of full weights that is resumed: its own weights are no base.

    With an adapter the base is read again, adapters off, so nothing is taken from the file, unless it trains the
    base's own biases.
    """
    if step == 0 or (is_adapted(inner) and not trains_base(inner)):
        return None
    earlier = None if settings.path is None else recorded(settings.path)
    if earlier is not None and earlier[1] == base_fingerprint(settings):
        return earlier[0]
    log.warning(
        "training resumes at step %d and no base was recorded for these features and probes: "
        "readings are anchored to the model as it is now; pass base=, or the path= of the first run",
        step,
    )
    return None


def base_fingerprint(settings: MonitorSettings) -> str:
    """A hash that is equal for two runs whose bases were read alike."""
    features = {name: _content(f) for name, f in flatten(settings.features).items()}
    probing = settings.runs_probes
    probes = {"probes": settings.probes, "positions": settings.positions} if probing else {}
    layer = settings.layer if settings.layer is None or isinstance(settings.layer, int) else str(settings.layer)
    named = isinstance(settings.sae, (Mapping, list, tuple))
    saes = {"saes": {p.name: [str(p.reads), str(p.writes)] for p in settings.saes}} if named else {}
    return fingerprint({"features": features, "layer": layer, "probing": probing, **probes, **saes})


def _content(feature: Feature) -> object:
    if not isinstance(feature, Tensor):
        return feature
    return hashlib.sha256(feature.detach().float().cpu().numpy().tobytes()).hexdigest()


def _hook_of(sae: Any) -> str:
    return str(sae.cfg.metadata.hook_name or sae.cfg.architecture())


def _start_event(settings: MonitorSettings, features: FeatureGroups, anchor: Anchor, inner: nn.Module) -> Start:
    config, saes = causal_model(inner).config, {p.name: _hook_of(p.sae) for p in settings.saes}
    several = isinstance(settings.sae, (Mapping, list, tuple))
    first = features.parts[0].reads if settings.layer is None else as_place(settings.layer)
    metadata: dict[str, Any] = {
        "base": anchor.record(),
        "fingerprint": base_fingerprint(settings),
        "mode": settings.mode,
        "positions": settings.positions if settings.runs_probes else settings.passive.positions,
        "model": str(config.name_or_path or type(causal_model(inner)).__name__),
        "sae": saes if several else next(iter(saes.values()), None),
        "versions": versions(),
    }
    if math.isfinite(anchor.explained_variance):
        metadata[BASE_KEY] = anchor.explained_variance
    return Start(
        features=dict(zip(features.names, features.latents, strict=True)),
        layer=first.layer,
        n_probes=len(settings.probes),
        bands=anchor.bands(settings.band_sd),
        metadata=metadata,
    )
