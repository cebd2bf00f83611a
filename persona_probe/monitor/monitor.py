"""FeatureMonitor: reads persona features of a model while it trains."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pandas as pd
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from persona_probe.context import Context
from persona_probe.data.chat import Conversation, as_conversations
from persona_probe.data.load import evenly_spaced, load_conversations
from persona_probe.data.template import with_template
from persona_probe.errors import InputError
from persona_probe.models.places import Place, Where, as_place
from persona_probe.monitor.events import Alarm, Fault
from persona_probe.monitor.features import Features
from persona_probe.monitor.hub import EventHub
from persona_probe.monitor.monitored_run import MonitoredRun, TrainingState
from persona_probe.monitor.reading import Snapshot
from persona_probe.monitor.reading_records import Anchor
from persona_probe.monitor.settings import (
    PROBES,
    BehaviourMeasurement,
    Measure,
    MonitorSettings,
    OnReading,
    PassiveReading,
    Schedule,
)
from persona_probe.monitor.track import study_features
from persona_probe.monitor.trainers import (
    attach_log,
    calling_trainer,
    close_after_training,
    read_before_best,
    tokenizer_of,
)
from persona_probe.saes.hooks import Saes, read_place, sae_layer
from persona_probe.saes.load import load_sae

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from persona_probe.monitor.actions.action import Action
    from persona_probe.monitor.rules.rule import Rule
    from persona_probe.monitor.sinks.sink import Sink

Probes = str | Sequence[str | Conversation]


class FeatureMonitor(TrainerCallback):
    """A transformers `TrainerCallback` that reads features of a model while it trains, and raises alarms.

    A *probe* reading runs a fixed set of prompts forward to the features' layer only, in eval mode without gradients;
    modes and random states are put back, so training continues bit for bit as without it. A *passive* reading takes the
    training batch's own activations, from hooks: of the one optimizer step that is due, all its micro-batches pooled.
    Its forwards run on the weights before that step's update.

    Readings are compared with the base model: adapters off, or a full model as it is at the start. Passive readings
    alone are compared with the first step's, which is therefore always read. A reading is of the weights that its step
    left: where a trainer loads its best checkpoint at the end, the last step is read before that.

    ```python
    monitor = pp.FeatureMonitor(sae, features={"toxic persona": 123}, probes="neutral_probes", every=5)
    trainer = SFTTrainer(..., callbacks=[monitor])
    trainer.train()
    monitor.readings
    ```

    Args:
        sae: a `sae_lens.SAE`, as `load_sae` gives; best on the model's device. None where all features are directions.
            Several SAEs, as a list or as names to SAEs, are read from the same forward passes; they may read other
            layers, the attention's or the MLP's output, and transcoders.
        features: name to latent index, to a direction (d_model,), or to a set of either (`{"traits": {...}}`). With
            several SAEs a latent is (name of its SAE, index); SAEs of a list are called `L12` or `L12.mlp_out`.
        probes: a packaged set's name, or prompts or conversations; None takes 12 of the 64 `neutral_probes`, which at
            the default cadence cost at most 1% of a small model's training.
        every: read at every `every`-th optimizer step (and at the start and the end); None is 40.
        steps: read at these steps instead (and at the end).
        layer: decoder layer whose output is read, or a `Place`; None takes it from the SAE's metadata. With several
            SAEs, where directions are read.
        positions: tokens averaged over; None takes `response` where every probe has an answer, else `prompt`.
        tokenizer: for the probes, in place of the trainer's; needed where the trainer has none.
        chat_template_kwargs: variables of the chat template that the probes are rendered with (`with_template`).
        bf16: bf16 autocast for probe readings.
        mode: `probe`, `passive` or `both`.
        passive: which tokens of the training batches are read, a `PassiveReading`.
        fit_every: reconstruct by the SAE (explained variance, L0) at every `fit_every`-th reading of a mode; between
            these, an SAE whose latents do not compete is encoded at the chosen latents only.
        base: the base's readings, where the model at the start is not the base: a `Snapshot`, or the `path` of an
            earlier run. A full model that a trainer resumes finds them in its own `path`.
        band_sd: half-width of the base band, in standard deviations between probes on the base.
        behaviour: measurements of what the model does, called with the model at readings: one function, several by
            name, or a `BehaviourMeasurement` with a cadence.
        rules: alarm rules (`persona_probe.monitor.rules`), asked after each reading; `MeasurementLimit` asks about
            `behaviour`.
        actions: what an alarm does (`persona_probe.monitor.actions`). It is logged in any case (`LogAlarm`).
        on_reading: called with (step, snapshot, model) after each reading.
        path: JSON lines file to which each event is appended and flushed.
        values_path: folder for prompt-level values, a file per reading.
        sinks: further places for events (`persona_probe.monitor.sinks`).
        log: log readings through the trainer, so that whatever `report_to` names shows them, and send alarms to the
            W&B and trackio runs that are active.
        on_error: what an error in a reading, rule, action, sink or measurement does: `off` records a fault, warns once
            and continues without that part; `raise` raises. Bad input raises at the start in any case.

    Raises:
        InputError: unknown latent, probes or layer, a setting that does not exist, a rule on a measurement that
            `behaviour` does not have, or an SAE that does not fit the model (when training starts).
    """

    def __init__(
        self,
        sae: Saes | None,
        features: Features,
        probes: Probes | None = None,
        *,
        # when and how the model is read
        every: int | None = None,
        steps: Sequence[int] | None = None,
        layer: Where | None = None,
        positions: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        bf16: bool = True,
        mode: str = "probe",
        passive: PassiveReading | None = None,
        fit_every: int = 1,
        # what readings are compared with
        base: Anchor | Snapshot | str | Path | None = None,
        band_sd: float = 0.5,
        # what else happens at a reading
        behaviour: Measure | Mapping[str, Measure] | BehaviourMeasurement | None = None,
        rules: "Sequence[Rule]" = (),
        actions: "Sequence[Action]" = (),
        on_reading: OnReading | None = None,
        # where events go
        path: str | Path | None = None,
        values_path: str | Path | None = None,
        sinks: "Sequence[Sink]" = (),
        log: bool = True,
        on_error: str = "off",
        **renamed: Any,
    ) -> None:
        if renamed:
            passive, behaviour = _from_old_names(passive, behaviour, renamed)
        if behaviour is not None and not isinstance(behaviour, BehaviourMeasurement):
            behaviour = BehaviourMeasurement(behaviour)
        conversations = [] if mode == "passive" else _conversations(probes)
        answered = all(c[-1]["role"] == "assistant" for c in conversations)
        self.settings = MonitorSettings(
            sae=sae,
            features=features,
            probes=conversations,
            positions=positions or ("response" if answered else "prompt"),
            layer=_layer(sae, layer),
            schedule=Schedule.of(every, steps),
            mode=mode,
            bf16=bf16,
            fit_every=fit_every,
            band_sd=band_sd,
            base=base,
            path=Path(path) if path else None,
            values_path=Path(values_path) if values_path else None,
            passive=passive or PassiveReading(),
            behaviour=behaviour,
            on_reading=on_reading,
        )
        if rules:
            from persona_probe.monitor.rules.rule import check_measurements

            check_measurements(rules, list(behaviour.by_name) if behaviour else ())
        self.hub = EventHub(rules, _with_log(actions), _all_sinks(sinks, path, log), on_error)
        self.tokenizer, self.chat_template_kwargs, self.log = tokenizer, chat_template_kwargs, log
        self.trainer: Trainer | None = None
        self.training: TrainingState | None = None
        """The training run that is watched; None before it begins and after it ends."""
        self.should_stop = False
        """Whether an action asked training to stop; a plain loop looks at it, a trainer stops by itself."""
        self._run: MonitoredRun | None = None
        self._step, self._watching = 0, False
        self._owner: object = None

    @classmethod
    def from_study(cls, study: Any, **overrides: Any) -> Self:
        """The monitor of a study's features: its SAE, layer, probes, positions and base band.

        Args:
            study: a run folder's path, or a `Study`, after `locate`.
            overrides: arguments of `FeatureMonitor` that replace the study's.

        Raises:
            InputError: no run folder, or locate has not run.
        """
        return cls(**{**_from_study(study), **overrides})

    # What was read

    @property
    def readings(self) -> pd.DataFrame:
        """All readings so far: step, mode, feature, mean, ci_low, ci_high, base_mean, base_sd, shift, ..."""
        return pd.DataFrame() if self._run is None else self._run.reading_log.frame()

    @property
    def alarms(self) -> list[Alarm]:
        """All alarms so far."""
        return self.hub.alarms

    def figure(self, caption: str = "Features while the model trains.") -> "Figure":
        """The features so far as a plotly figure: curves with intervals, base band, alarms, behaviour, SAE fit."""
        from persona_probe.monitor.figure import monitor_figure

        return monitor_figure(self.hub.history, caption)

    @property
    def faults(self) -> list[Fault]:
        """Errors in parts of the monitor, which are off since."""
        return self.hub.faults

    @property
    def base(self) -> Snapshot | None:
        """The base model's reading, where it was taken in this run."""
        return None if self._run is None else self._run.base

    @property
    def last_step(self) -> int:
        """Step of the latest reading, -1 before the first."""
        return -1 if self._run is None else self._run.last_step

    @property
    def positions(self) -> str:
        """Tokens of the probes that are averaged over."""
        return self.settings.positions

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a reading at this step."""
        return self.settings.schedule.due(step)

    # By hand

    def start(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Anchor to the base model (adapters off) and get ready; a trainer and `watch` do it by themselves."""
        self.check_free(None)
        self._open(TrainingState(model), tokenizer, 0, scoped=False)

    def read(self, model: nn.Module, step: int) -> Snapshot:
        """Run the probes on a model now and record the reading; errors are raised."""
        run = self._run or self._open(TrainingState(model), None, step, scoped=False)
        trained, run.training.model = run.training.model, model
        try:
            snapshot = run.read_probes(step)
        finally:
            run.training.model = trained  # which the schedule's readings are of
        self.hub.flush(step)
        return snapshot

    # In a plain loop

    @contextmanager
    def watch(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        optimizer: Optimizer | None = None,
        scheduler: Any = None,
        checkpoint_folder: str | Path | None = None,
    ) -> Iterator[Self]:
        """For a plain loop: reads at once, then at each due `step(n)`, and at the end.

        Args:
            optimizer: for the learning rate in readings, and for actions that change it.
            scheduler: for actions that change the learning rate.
            checkpoint_folder: where actions save.
        """
        folder = Path(checkpoint_folder) if checkpoint_folder else None
        training = TrainingState(model, optimizer=optimizer, scheduler=scheduler, checkpoint_folder=folder)
        self.check_free(training)
        self._watching, self._owner = True, training
        try:
            self.begin(training, tokenizer, scoped=True, owner=training)
            yield self
            self.finish(self._step)
        finally:
            self._watching, self._owner = False, None
            self.close()

    def check_free(self, owner: object) -> None:
        """Refuse another run while one is watched, before anything changes: readings of both would be mixed.

        The trainer that is watched may begin again, as it does with `auto_find_batch_size`.

        Raises:
            InputError: another run is watched.
        """
        busy = self._watching or (self.training is not None and self._owner is not None)
        if busy and self._owner is not owner:
            raise InputError(
                "this monitor already watches a training run: let that end first, or make a second FeatureMonitor"
            )

    def watches_for(self, owner: object) -> bool:
        """Whether the run that is watched is this trainer's, or of nobody who said so."""
        return not self._watching and (self._owner is None or self._owner is owner)

    def step(self, step: int, loss: float | Tensor | None = None, lr: float | None = None) -> None:
        """Tell the monitor that optimizer step `step` of a plain loop is done.

        Args:
            loss: training loss (nats per token), for the record; a tensor is fetched at readings only.
            lr: learning rate, where `watch` was given no optimizer.

        Raises:
            InputError: not inside `watch`.
        """
        if self.training is None:
            if self._watching:  # closed by an action, for example: training goes on without the monitor
                return
            raise InputError("step() belongs inside `with monitor.watch(model):`")
        logs = {"loss": loss.detach() if isinstance(loss, Tensor) else loss, "learning_rate": lr}
        self.training.note({name: value for name, value in logs.items() if value is not None})
        self.step_done(step)

    # In a transformers trainer, which calls `on_...`

    def attach(self, trainer: Trainer) -> Self:
        """Watch this trainer: the monitor becomes one of its callbacks and is closed however `train` ends.

        Passing the monitor in `callbacks=` does the same.
        """
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        if self.trainer is not trainer:
            self.trainer = trainer
            close_after_training(trainer, lambda: self.close() if self.watches_for(trainer) else None)
            read_before_best(trainer, lambda: self.read_last() if self.watches_for(trainer) else None)
        return self

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Find the trainer that is being made."""
        self._find_trainer()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Anchor, and read before the first step."""
        if self.training is not None and self.training.state is state:  # twice among the callbacks of one trainer
            return
        trainer = calling_trainer(self)
        self.check_free(trainer)
        if trainer is not None:
            self.attach(trainer)
        optimizer, scheduler = kwargs.get("optimizer"), kwargs.get("lr_scheduler")
        training = TrainingState(kwargs["model"], control, state, args, optimizer, scheduler)
        training.checkpoint_folder = Path(args.output_dir) if args.output_dir else None
        self.begin(training, tokenizer_of(kwargs.get("processing_class")), state.global_step, owner=trainer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read when due."""
        if self.training is not None and self.training.args is args:
            self.training.control, self.training.state = control, state
            self.step_done(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note loss and learning rate."""
        if self.training is not None and self.training.args is args:
            self.training.note(logs or {})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read at the end, unless that was just done."""
        if self.training is not None and self.training.args is args:
            self.finish(state.global_step)

    def _find_trainer(self) -> None:
        trainer = calling_trainer(self)
        if trainer is not None:
            self.attach(trainer)

    # What loop, trainer and other frameworks' adapters come down to

    def begin(
        self,
        training: TrainingState,
        tokenizer: PreTrainedTokenizerBase | None,
        step: int = 0,
        scoped: bool = False,
        owner: object = None,
    ) -> None:
        """Training begins after `step` steps: anchor, and read where the schedule asks for it.

        Args:
            scoped: the caller is sure to call `close`, also after an error.
            owner: the trainer; another one is refused while this one trains.

        Raises:
            InputError: what does not fit the model, or another training run is watched.
        """
        self.check_free(owner)
        self._owner = owner
        run = self._open(training, tokenizer, step, scoped, before=self._run)

        def first() -> None:
            if self.settings.schedule.at_start(step) and self.settings.runs_probes:
                run.take(step)
            run.arm(step + 1)

        run.guarded(first, step)

    def _open(
        self,
        training: TrainingState,
        tokenizer: PreTrainedTokenizerBase | None,
        step: int,
        scoped: bool,
        before: MonitoredRun | None = None,
    ) -> MonitoredRun:
        """Anchor to the base model and get ready; nothing is read yet."""
        self.close()
        self.should_stop = False
        if self.log and self.trainer is not None:
            self.hub.sinks = attach_log(self.hub.sinks, self.trainer)
        tokenizer = self.tokenizer or tokenizer
        if tokenizer is not None:
            tokenizer = with_template(tokenizer, chat_template_kwargs=self.chat_template_kwargs)
        self._run = MonitoredRun(self, self.settings, self.hub, training, tokenizer, step, scoped, before)
        self.training, self._step = training, step
        return self._run

    def step_done(self, step: int) -> None:
        """Optimizer step `step` is done: read if due."""
        run = self._run
        assert run is not None
        stride, self._step = max(1, step - self._step), step

        def read() -> None:
            if (run.must_read or self.due(step)) and step != run.last_step:
                run.take(step)
            run.note_weights()
            run.arm(step + stride)

        run.guarded(read, step)

    def read_last(self) -> None:
        """Read the last step's weights now, because the trainer is about to put others in their place."""
        run = self._run
        if run is not None and self.training is not None and self.training.state is not None:
            step = self.training.state.global_step
            run.guarded(lambda: run.read_last(step), step)

    def finish(self, step: int) -> None:
        """Training is over: read once more, emit the end, close."""
        if self._run is not None:
            self._run.finish(step)
        self.training = None

    def request_stop(self) -> None:
        """Ask training to stop: a trainer does, a plain loop looks at `should_stop`."""
        self.should_stop = True

    def close(self) -> None:
        """Take all hooks off and close the sinks; safe to call twice."""
        if self._run is not None:
            self._run.close()
        self.training = None


OLD_NAMES = {
    "passive_positions": "passive=PassiveReading(positions=...)",
    "max_passive_tokens": "passive=PassiveReading(max_tokens=...)",
    "behaviour_every": "behaviour=BehaviourMeasurement(measure, every=...)",
}
"""Arguments of version 0.1.0, and what replaces them."""


def _from_old_names(
    passive: PassiveReading | None,
    behaviour: Measure | Mapping[str, Measure] | BehaviourMeasurement | None,
    renamed: Mapping[str, Any],
) -> tuple[PassiveReading | None, Measure | Mapping[str, Measure] | BehaviourMeasurement | None]:
    """The arguments `passive` and `behaviour` with what was passed under the old names."""
    for name in renamed:
        if name not in OLD_NAMES:
            raise TypeError(f"FeatureMonitor got an unexpected keyword argument {name!r}")
        warnings.warn(f"{name}= is now {OLD_NAMES[name]}", DeprecationWarning, stacklevel=3)
    limits = {"positions": "passive_positions", "max_tokens": "max_passive_tokens"}
    limits = {new: renamed[old] for new, old in limits.items() if old in renamed}
    if limits:
        passive = replace(passive or PassiveReading(), **limits)
    if "behaviour_every" in renamed and behaviour is not None:
        measure = behaviour.measure if isinstance(behaviour, BehaviourMeasurement) else behaviour
        behaviour = BehaviourMeasurement(measure, renamed["behaviour_every"])
    return passive, behaviour


def _conversations(probes: Probes | None) -> list[Conversation]:
    if probes is None:
        return evenly_spaced(load_conversations("neutral_probes"), PROBES)
    return load_conversations(probes) if isinstance(probes, str) else as_conversations(probes)


def _layer(sae: Saes | None, layer: Where | None) -> Where | None:
    """Where one SAE or directions are read; with several SAEs, what was given."""
    if sae is None and layer is None:
        raise InputError("without an SAE the layer is not known: pass layer=")
    if sae is None or isinstance(sae, (Mapping, list, tuple)):
        return layer
    if isinstance(layer, Place) and not layer.is_residual:
        return layer
    place = read_place(sae, None if layer is None else as_place(layer).layer)
    return place.layer if place.is_residual else place


def _with_log(actions: "Sequence[Action]") -> "list[Action]":
    """The actions, and one that logs alarms, unless there is one: an alarm speaks by itself."""
    from persona_probe.monitor.actions.action import LogAlarm

    spoken = any(isinstance(action, LogAlarm) for action in actions)
    return [*actions, *([] if spoken else [LogAlarm()])]


def _all_sinks(sinks: "Sequence[Sink]", path: str | Path | None, log: bool) -> "list[Sink]":
    """The sinks, with the file and the alerts of whatever tracker is in use."""
    from persona_probe.monitor.sinks.curves import AlertSink
    from persona_probe.monitor.sinks.files import JsonlSink

    alerts = log and not any(isinstance(sink, AlertSink) for sink in sinks)
    return [*([JsonlSink(path)] if path else []), *sinks, *([AlertSink()] if alerts else [])]


# --- The monitor of a study: its features, SAE, layer, probes, positions and base band


def study_monitor(
    ctx: Context, *, steps: Sequence[int], path: str | Path | None = None, **changes: Any
) -> FeatureMonitor:
    """The monitor of the study's features for a training run of the study itself.

    A reading that fails ends the run: a hole in a run would be a hole in the evidence.

    Args:
        steps: of the readings.
        path: JSON lines file of its events.
        changes: other arguments of `FeatureMonitor`.

    Raises:
        InputError: locate has not run.
    """
    defaults = {"sae": ctx.sae, "layer": ctx.layer, "steps": steps, "path": path, "on_error": "raise", "log": False}
    return FeatureMonitor(**{**_settings(ctx), **defaults, **changes})


def _from_study(study: Any) -> dict[str, Any]:
    """Arguments of `FeatureMonitor.from_study`; the study's model is not loaded."""
    ctx = Context.open(study) if isinstance(study, (str, Path)) else study.context
    settings, config = _settings(ctx), ctx.config
    sae = load_sae(config.sae, device=ctx.device, dtype=ctx.sae_dtype)
    return {**settings, "sae": sae, "layer": sae_layer(sae, config.layer)}


def _settings(ctx: Context) -> dict[str, Any]:
    """What every monitor of a study shares."""
    monitor = ctx.config.monitor
    return {
        "features": study_features(ctx),  # first: its error names the stage to run
        "probes": ctx.probes,
        "positions": monitor.positions,
        "band_sd": monitor.band_sd,
        "bf16": ctx.config.bf16,
    }
