"""One monitored training run: what is read when a step is due, and what all processes agree on after."""

import hashlib
import logging
import math
import time
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.tokens import batches
from persona_probe.errors import InputError
from persona_probe.models.adapters import base_weights
from persona_probe.models.layers import causal_model, decoder_layer, hidden_size
from persona_probe.monitor.events import BASE_KEY, Alarm, Behaviour, End, Reading, Start
from persona_probe.monitor.outlets import Outlets
from persona_probe.monitor.passive import PassiveReader
from persona_probe.monitor.ranks import Ranks, is_partitioned, is_sharded, unwrap
from persona_probe.monitor.reading import FeatureReader, FeatureSet, Snapshot, flatten, undisturbed
from persona_probe.monitor.records import (
    Anchor,
    StepInfo,
    anchor_from,
    fingerprint,
    make_reading,
    recorded,
    write_values,
)
from persona_probe.monitor.setup import Measure, Setup, Training
from persona_probe.runs import versions
from persona_probe.saes.load import check_fit

# --- Measurements of what the model does, taken beside the readings


def measure(name: str, call: Measure, model: nn.Module, step: int) -> Behaviour:
    """Call a user's measurement in eval mode, without gradients; modes and random states come back."""
    with undisturbed(model):
        found = call(model)
    return replace(found, step=step) if isinstance(found, Behaviour) else Behaviour(step, name, float(found))


log = logging.getLogger(__name__)


def feature_set(setup: Setup, inner: nn.Module) -> FeatureSet:
    """The features, checked against the model (below all wrappers).

    Raises:
        InputError: an SAE, layer or direction that does not fit it.
    """
    if setup.probing and is_partitioned(inner):
        raise InputError("probes cannot be run on a model that ZeRO-3 holds in parts: take mode='passive', or FSDP")
    if setup.sae is not None:
        check_fit(setup.sae, inner, setup.layer)
    decoder_layer(inner, setup.layer)
    return FeatureSet(setup.sae, setup.features, hidden_size(inner))


def probe_reader(setup: Setup, features: FeatureSet, tokenizer: PreTrainedTokenizerBase | None) -> FeatureReader:
    """The reader of the probes.

    Raises:
        InputError: no tokenizer.
    """
    if tokenizer is None:
        raise InputError("FeatureMonitor needs a tokenizer: pass tokenizer= (the trainer has none)")
    groups = list(batches(tokenizer, setup.probes, batch_size=32))
    return FeatureReader(setup.sae, features, groups, setup.layer, setup.positions, setup.bf16)


def earlier_anchor(setup: Setup, inner: nn.Module, step: int) -> Anchor | None:
    """The base that the event file holds, for a run of full weights that is resumed: its own weights are no base.

    With an adapter the base is read again, adapters off, so nothing is taken from the file.
    """
    if step == 0 or isinstance(inner, PeftModel):
        return None
    found = None if setup.path is None else recorded(setup.path)
    if found is not None and found[1] == base_fingerprint(setup):
        return found[0]
    log.warning(
        "training goes on from step %d and no base was recorded for these features and probes: "
        "readings are anchored to the model as it is now; pass base=, or the path= of the first run",
        step,
    )
    return None


def base_fingerprint(setup: Setup) -> str:
    """Tells whether two runs' bases were read alike."""
    features = {name: _content(f) for name, f in flatten(setup.features).items()}
    probes = {"probes": setup.probes, "positions": setup.positions} if setup.probing else {}
    return fingerprint({"features": features, "layer": setup.layer, "probing": setup.probing, **probes})


def _content(feature: int | Tensor) -> object:
    if isinstance(feature, int):
        return feature
    return hashlib.sha256(feature.detach().float().cpu().numpy().tobytes()).hexdigest()


def start_event(setup: Setup, features: FeatureSet, anchor: Anchor, inner: nn.Module) -> Start:
    """What readers of the event file need to know."""
    config = causal_model(inner).config
    metadata: dict[str, Any] = {
        "base": anchor.record(),
        "fingerprint": base_fingerprint(setup),
        "mode": setup.mode,
        "positions": setup.positions if setup.probing else setup.passive_positions,
        "model": str(config.name_or_path or type(causal_model(inner)).__name__),
        "sae": None if setup.sae is None else str(setup.sae.cfg.metadata.hook_name or setup.sae.cfg.architecture()),
        "versions": versions(),
    }
    if math.isfinite(anchor.explained_variance):
        metadata[BASE_KEY] = anchor.explained_variance
    return Start(
        features=dict(zip(features.names, features.latents, strict=True)),
        layer=setup.layer,
        n_probes=len(setup.probes),
        bands=anchor.bands(setup.band_sd),
        metadata=metadata,
    )


# --- Snapshots become readings: compared with the base, kept, handed on, judged

ON_READING, VALUES = "on_reading", "values_path"


class Recorder:
    """The readings of one run.

    Args:
        inner: the model below all wrappers; the start event names it.
        recording: whether this process records (the first of a distributed run); the others only keep count.
    """

    def __init__(self, setup: Setup, outlets: Outlets, features: FeatureSet, inner: nn.Module, recording: bool) -> None:
        self.setup, self.outlets, self.features, self.inner, self.recording = setup, outlets, features, inner, recording
        self.anchor: Anchor | None = None
        self.readings: list[Reading] = []
        self.count = {"probe": 0, "passive": 0}
        self.seconds = 0.0

    def announce(self, anchor: Anchor) -> None:
        """The base is known: tell sinks and rules that the run starts."""
        self.anchor = anchor
        self.outlets.announce(start_event(self.setup, self.features, anchor, self.inner))

    def with_fit(self, mode: str) -> bool:
        """Whether the next reading of a mode is to say how well the SAE fits."""
        return self.count[mode] % self.setup.fit_every == 0

    def record(
        self, snapshot: Snapshot, mode: str, step: int, seconds: float, info: StepInfo, model: nn.Module
    ) -> list[Alarm]:
        """Keep a reading, hand it on, and ask the rules. Without a base the first reading is the base."""
        self.count[mode] += 1
        if self.anchor is None:
            self.announce(Anchor.of(snapshot))
        assert self.anchor is not None
        reading = make_reading(snapshot, self.anchor, step=step, mode=mode, seconds=seconds, info=info)
        if not self.recording:
            return []
        self.readings.append(reading)
        self.seconds += seconds
        self.outlets.emit(reading)
        self._hand_on(snapshot, mode, step, model)
        return self.outlets.judge(reading)

    def _hand_on(self, snapshot: Snapshot, mode: str, step: int, model: nn.Module) -> None:
        on_reading, folder = self.setup.on_reading, self.setup.values_path
        if on_reading is not None:
            self.outlets.attempt(ON_READING, step, lambda: on_reading(step, snapshot, model))
        if folder is not None:
            self.outlets.attempt(VALUES, step, lambda: write_values(folder, snapshot, mode, step))

    def frame(self) -> pd.DataFrame:
        """All readings as a table, one row per reading and feature."""
        return pd.DataFrame([row for reading in self.readings for row in reading.rows()])


log = logging.getLogger(__name__)

PROBE, PASSIVE = "probe reading", "passive reading"


class Run:
    """The state of a monitor while one model trains.

    Args:
        monitor: what actions know as the monitor.
        step: the training step at which it begins (above zero where a run is resumed).
        scoped: somebody is sure to call `close`, errors included.

    Raises:
        InputError: an SAE, layer, direction or base that does not fit, no tokenizer, or a rule for an unknown feature.
    """

    def __init__(
        self,
        monitor: Any,
        setup: Setup,
        outlets: Outlets,
        training: Training,
        tokenizer: PreTrainedTokenizerBase | None,
        step: int,
        scoped: bool,
    ) -> None:
        self.monitor, self.setup, self.outlets, self.training, self.step = monitor, setup, outlets, training, step
        self.ranks, inner = Ranks(), unwrap(training.model)
        self.sharded = is_sharded(training.model)
        self.reads = self.ranks.first or self.sharded
        self.outlets.begin(self.ranks.first)
        self.last_step, self.wanted, self.closed, self._took = -1, False, False, False
        self.tokens_seen: int | None = None
        self.base: Snapshot | None = setup.base if isinstance(setup.base, Snapshot) else None
        features = feature_set(setup, inner)
        self.recorder = Recorder(setup, outlets, features, inner, self.ranks.first)
        self.probe = probe_reader(setup, features, tokenizer) if setup.probing else None
        self.passive: PassiveReader | None = None
        if (anchor := self._anchor(inner)) is not None:
            self.recorder.announce(anchor)
        if setup.passive:  # last: what raises above leaves no hook
            if training.replicated:
                raise InputError("DataParallel copies the model at every step: take mode='probe', or use torchrun")
            limits = setup.passive_positions, setup.max_passive_tokens
            self.passive = PassiveReader(features, setup.layer, *limits, self._passive_failed)
            self.passive.attach(training.model, training.micro_batches, scoped)

    def _passive_failed(self, error: Exception) -> None:
        if self.outlets.on_error == "raise":
            raise error
        self.outlets.fail(PASSIVE, self.step + 1, error)

    def _anchor(self, inner: nn.Module) -> Anchor | None:
        if self.setup.base is not None:
            return anchor_from(self.setup.base, self.recorder.features.names)
        earlier = earlier_anchor(self.setup, inner, self.step)
        if earlier is not None or self.probe is None or not self.reads:
            return earlier
        self.base = self.outlets.attempt(PROBE, self.step, self._base_reading, always=(InputError,))
        return None if self.base is None else Anchor.of(self.base)

    def _base_reading(self) -> Snapshot:
        """The model as it is now, adapters off."""
        assert self.probe is not None
        model = self.training.model
        with undisturbed(model), base_weights(unwrap(model)):
            return self.probe.read(model)

    def arm(self, step: int) -> None:
        """Get ready for the training step that comes: read it passively where it is due.

        Without probes the first step is always read: its forwards run on the weights that training begins with.
        """
        first = self.probe is None and not self._took
        self.wanted = first or step == self.training.last_step
        if self.passive is not None:
            if self.wanted or self.setup.schedule.due(step):
                self.passive.arm(self.recorder.with_fit("passive"))
            else:
                self.passive.disarm()

    def take(self, step: int) -> None:
        """All readings of a step; then rules, actions and, in a distributed run, what all processes must agree on."""
        self._took, self.step, self.last_step, alarms = True, step, step, list[Alarm]()
        begin = time.perf_counter()
        passive = None if self.passive is None else self.outlets.attempt(PASSIVE, step, self.passive.take)
        if self.passive is not None and not self.outlets.is_on(PASSIVE):
            self.passive.detach()
        spent = time.perf_counter() - begin
        self._count_tokens()
        if self.probe is not None and self.reads:
            found = self.outlets.attempt(PROBE, step, lambda: self.read_probes(step))
            alarms += [] if found is None else found[1]
        if passive is not None and self.passive is not None:
            alarms += self._record(passive, "passive", step, spent + self.passive.seconds)
        self._measure_behaviour(step)
        self._conclude(step, alarms)

    def read_probes(self, step: int) -> tuple[Snapshot, list[Alarm]]:
        """Run the probes now and record it."""
        if self.probe is None:
            raise InputError("mode='passive' has no probes to read: take mode='probe' or 'both'")
        begin = time.perf_counter()
        snapshot = self.probe.read(self.training.model, self.recorder.with_fit("probe"))
        self.last_step = step
        return snapshot, self._record(snapshot, "probe", step, time.perf_counter() - begin)

    def _record(self, snapshot: Snapshot, mode: str, step: int, seconds: float) -> list[Alarm]:
        training = self.training
        info = StepInfo(training.loss, training.learning_rate, self.tokens_seen)
        return self.recorder.record(snapshot, mode, step, seconds, info, training.model)

    def _count_tokens(self) -> None:
        """Training tokens so far: the trainer's count, else what the passive hooks of all processes saw."""
        self.tokens_seen = self.training.counted_tokens
        if self.passive is not None:
            (total,) = self.ranks.total([float(self.passive.tokens_seen)], self._device)
            if self.tokens_seen is None and self.outlets.is_on(PASSIVE):
                self.tokens_seen = int(total)

    @property
    def _device(self) -> torch.device:
        return next(self.training.model.parameters()).device

    def _measure_behaviour(self, step: int) -> None:
        every = self.setup.behaviour_every
        if not self.reads or (every is not None and step % every != 0):
            return
        model = self.training.model if self.sharded else unwrap(self.training.model)
        for name, call in self.setup.behaviour.items():
            part = f"behaviour {name!r}"
            found = self.outlets.attempt(part, step, lambda name=name, call=call: measure(name, call, model, step))
            if found is not None:
                self.outlets.emit(found)

    def _conclude(self, step: int, alarms: list[Alarm]) -> None:
        """Let actions act, in every process that they must act in, and stop everywhere where one stops."""
        clean = not alarms and self.outlets.all_inside()
        if self.ranks.many:
            alarms, clean = self.ranks.from_first((alarms, clean))
        self.outlets.act(alarms, clean, lambda: self.training.context(step, self.monitor))
        if self.ranks.many:
            self._agree()
        if self.monitor.should_stop and self.training.control is not None:
            self.training.control.should_training_stop = True

    def _agree(self) -> None:
        """One small collective: a stop counts everywhere; probes that failed in one process are off in all."""
        control = self.training.control
        stop = self.monitor.should_stop or (control is not None and control.should_training_stop)
        failed = not self.outlets.is_on(PROBE)
        stops, failures = self.ranks.total([float(stop), float(failed)], self._device)
        if stops > 0:
            self.monitor.request_stop()
        if failures > 0:
            self.outlets.switch_off(PROBE)

    def finish(self, step: int) -> None:
        """Training is over: read once more unless just done, and say so."""
        if self.passive is not None:
            self.passive.disarm()
        if self.last_step != step:
            self.take(step)
        self.outlets.emit(End(step, len(self.recorder.readings), self.recorder.seconds))
        self.close()

    def close(self) -> None:
        """Take the hooks off and close the sinks; safe to call twice."""
        if self.passive is not None:
            self.passive.detach()
        if not self.closed:
            self.outlets.close(self.step)
        self.closed = True
