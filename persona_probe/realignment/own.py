"""`pp.realign`: correct an organism of your own, with a FeatureMonitor that reads the persona and may stop the run."""

import html
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.config import Training
from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.load import Row
from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.answers import answer_batches, capability_groups
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.finetune.sft import check_rows
from persona_probe.models.adapters import is_adapted
from persona_probe.models.ranks import unwrap
from persona_probe.monitor.band import Band
from persona_probe.monitor.features import flatten
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.monitored_run import feature_set, probe_reader
from persona_probe.monitor.reading import undisturbed
from persona_probe.realignment.measure import MeasuredModel, Measurements
from persona_probe.realignment.methods import CorrectiveRun, Recorder, as_one, checkpoint_in, prepare, train_watched
from persona_probe.realignment.outcome import outcome
from persona_probe.realignment.rows import (
    ModelPair,
    background,
    choose_rows,
    corrective_rows,
    feature_direction,
    refuse_overlap,
)
from persona_probe.realignment.spec import Correction
from persona_probe.realignment.verdict import RealignVerdict, judge_realignment
from persona_probe.verdicts import MARGIN
from persona_probe.writing import whole_folder

# --- The result of `pp.realign`, in numbers and in words


@dataclass(frozen=True, eq=False, repr=False)
class Realigned:
    """A corrected organism and the result of its correction, shown as a table in a terminal and in a notebook."""

    model: nn.Module
    """The corrected model, in eval mode."""
    readings: pd.DataFrame
    """The monitor's readings: step, feature, mean, interval, base, explained variance."""
    evals: pd.DataFrame
    """Behaviour, one row per item and step; empty where it was not measured."""
    verdict: RealignVerdict
    """Feature, behaviour, perplexity, capability and the SAE's fit, each judged on its own."""
    outcome: dict[str, Any]
    """Numbers over the steps (see `outcome.outcome`), with lengths and notes of the corrective rows."""
    rows: list[Conversation]
    """The rows that were trained on."""
    training: dict[str, Any]
    """Losses, answer tokens and rows."""
    checkpoint: Path | None
    """Where it was saved."""

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return int(self.outcome["steps"])

    def _lines(self) -> list[str]:
        since = [_since("feature in its band", self.outcome["steps_to_band"])]
        change = self.outcome["index_minus_base"]
        if change is not None and change["ci_low"] == change["ci_low"]:  # one number has no interval, and no word
            since.append(_since("behaviour back", self.outcome["steps_to_behaviour"]))
        summary = f"{len(self.rows)} corrective rows, {self.steps} steps; {', '.join(since)}"
        return [summary, *(f"note: {note}" for note in self.outcome["notes"])]

    def __str__(self) -> str:
        return "\n".join([*self._lines(), str(self.verdict)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(f"<p>{html.escape(line)}</p>" for line in self._lines()) + self.verdict._repr_html_()


def _since(what: str, step: float | None) -> str:
    return f"{what} {'not by the end' if step is None else f'for good from step {step:.0f}'}"


def realign(
    model: nn.Module,
    data: str | Sequence[str] | Sequence[Conversation],
    monitor: FeatureMonitor,
    *,
    tokenizer: PreTrainedTokenizerBase,
    # the correction
    rows: int | None = None,
    choose_by: str = "random",
    method: str = "continued",
    steps: int = 35,
    batch_size: int = 4,
    lr: float = 1e-4,
    max_length: int = 256,
    seed: int = 0,
    # what it is judged by, and when it stops
    behaviour: "Behaviour | Callable[[nn.Module], float] | None" = None,
    feature: str | None = None,
    stop: int = 2,
    stop_by: "Behaviour | None" = None,
    control: pd.DataFrame | None = None,
    margin: float = MARGIN,
    # what it is compared with
    base: nn.Module | None = None,
    inducing: Sequence[Conversation] = (),
    # where it is saved
    out: str | Path | None = None,
) -> Realigned:
    """Fine-tune an organism on corrective rows while a monitor reads the persona feature.

    A PEFT model's adapters, and a plain model's weights, are trained in place; `method="full"` of a PEFT model trains
    a merged copy. `fresh` joins the organism's adapter and the new one into an adapter called `repaired`, whose rank is
    the sum of theirs.

    Args:
        model: the organism: a PEFT model, or a plain one (then pass `base`).
        data: a packaged set or file, several (`a+b` or a list), or conversations that end with the good answer.
        monitor: reads probes of the persona feature; everything is measured at the steps of its schedule.
        rows: the dose; None takes all rows.
        choose_by: how the rows are chosen, see `rows.choose_rows`.
        method: `continued`, `fresh` (a new LoRA on top) or `full` (all weights).
        behaviour: contrast items (rows with id, category, question, aligned and misaligned, or `ContrastItems`), or a
            function of the model whose value is higher for more misaligned. One number can stop a correction, but has
            no interval, so that behaviour stays `undecided`. None: the feature alone decides.
        stop: stop after this many readings in a row with the feature in its base band and behaviour no higher than
            the base's; 0 never stops.
        stop_by: contrast items for that rule alone, so that the verdict's items do not choose the stopping time. None
            takes those of `behaviour`.
        control: `behaviour` of your control arm (good answers to the same questions), as `contrast_index` gives it, one
            row per item with its value: the verdict is then against it too.
        margin: share of the organism's rise that may be left where behaviour counts as restored.
        base: the base of a plain model; the base of a PEFT model is the model with its adapters off.
        feature: which of the monitor's features is the persona; None takes its first.
        inducing: the rows that made the organism: notes report overlaps with them, and a difference in length.
        max_length: longest row in tokens.
        out: folder for the checkpoint, which must not exist; it loads as one organism (`models.adapters.organism`).

    Raises:
        InputError: rows that cannot be used or overlap the contrast questions, fewer rows than the dose, an unknown
            choice, method or feature, a monitor without probes, or no base.
        TrainingDiverged: the loss became NaN.
    """
    correction = Correction(
        _names(data) or ("rows of the caller",),
        rows,
        choose_by,
        method,
        steps,
        batch_size,
        lr,
        readings=tuple(s for s in range(steps + 1) if s == steps or monitor.due(s)),
        stop_readings=stop,
    )
    if out is not None and Path(out).exists():
        raise InputError(f"{out} exists: choose another out=")
    name, settings = _feature(monitor, feature), monitor.settings
    pair, behaviour_measure = (
        _pair(model, base, monitor, tokenizer, name),
        _as_behaviour(behaviour, tokenizer, settings.bf16),
    )
    usable = _usable(data, tokenizer, max_length, behaviour_measure.items)
    training_rows = choose_rows(usable, rows, choose_by, seed=seed, pair=pair)
    about_rows = background(training_rows, tokenizer, inducing, behaviour_measure.items)
    measurements = _measurements(monitor, tokenizer, name, model)
    with pair.require_base()() as clean:
        before = replace(measurements.measure(clean), items=behaviour_measure.table(clean))
    if settings.base is None:  # a monitor that was given no base compares with this one
        monitor.settings = replace(settings, base=before.snapshot)
    recorder = _recorder(monitor, name, behaviour_measure, before.items, correction.readings)
    if stop_by is not None and behaviour_measure.call is not None and stop:
        recorder.stop_by = _stop_by(_as_behaviour(stop_by, tokenizer, settings.bf16), pair)
    training = correction.training(Training(max_length=max_length, bf16=settings.bf16))
    run = CorrectiveRun(
        training_rows, training, seed, tokenizer, " + ".join(_names(data)) or None, correction.stop_readings
    )
    with _folder(out) as folder:
        tuned = prepare(model, method, seed)
        fitted = train_watched(tuned, run, recorder, Path(folder))
        checkpoint = checkpoint_in(Path(folder)) if out else None
        corrected = as_one(tuned, checkpoint, whole_weights=not isinstance(model, PeftModel))
    checkpoint = checkpoint_in(Path(out)) if out else None  # moved in, now that it is whole
    after = replace(measurements.measure(corrected), items=recorder.latest)
    evals, band = recorder.evals, recorder.band()
    organism = None if evals.empty else MeasuredModel(items=evals[evals["step"] == evals["step"].min()])
    against = None if control is None else MeasuredModel(items=control)
    verdict = judge_realignment(
        "realigned", seed, before, after, organism=organism, control=against, band=band, feature=name, margin=margin
    )
    numbers = outcome(recorder.curve(), evals, recorder.base_evals, band, name, control_evals=control, margin=margin)
    return Realigned(
        model=corrected,
        readings=monitor.readings,
        evals=recorder.evals,
        verdict=verdict,
        outcome={**numbers, **about_rows.to_dict()},
        rows=training_rows,
        training=asdict(fitted),
        checkpoint=checkpoint,
    )


# --- Behaviour, as the caller measures it

Behaviour = ContrastItems | Sequence[Row]
"""Contrast items, tokenised or as rows."""


@dataclass(frozen=True)
class _MeasuredBehaviour:
    """A measurement of behaviour, item by item; one without `call` measures nothing."""

    call: Callable[[nn.Module], pd.DataFrame] | None = None
    """Columns item, category and value; higher is more misaligned."""
    items: tuple[Row, ...] = ()
    """The contrast items behind it, if any."""

    def table(self, model: nn.Module) -> pd.DataFrame | None:
        """The items of a model, which may be in training."""
        if self.call is None:
            return None
        with undisturbed(model):
            return self.call(model)


def _as_behaviour(
    behaviour: "Behaviour | Callable[[nn.Module], float] | None", tokenizer: PreTrainedTokenizerBase, bf16: bool
) -> _MeasuredBehaviour:
    if behaviour is None:
        return _MeasuredBehaviour()
    if callable(behaviour):
        call = behaviour
        return _MeasuredBehaviour(
            lambda model: pd.DataFrame([{"item": "all", "category": "all", "value": float(call(model))}])
        )
    items = behaviour if isinstance(behaviour, ContrastItems) else ContrastItems.build(tokenizer, behaviour)
    return _MeasuredBehaviour(lambda model: contrast_index(model, items, bf16=bf16), items.rows)


def _recorder(
    monitor: FeatureMonitor,
    feature: str,
    behaviour_measure: _MeasuredBehaviour,
    base_items: pd.DataFrame | None,
    steps: tuple[int, ...],
) -> Recorder:
    def curve() -> pd.DataFrame:
        readings = monitor.readings
        return readings[(readings["feature"] == feature) & (readings["mode"] == "probe")]

    def band() -> Band:
        last = curve().iloc[-1]
        return Band.of(float(last["base_mean"]), float(last["base_sd"]), monitor.settings.band_sd)

    def behaviour(model: nn.Module, step: int) -> pd.DataFrame:
        items = behaviour_measure.table(model)
        assert items is not None
        return items.assign(step=step)

    base_evals = pd.DataFrame() if base_items is None else base_items
    return Recorder(monitor, steps, curve, band, behaviour if behaviour_measure.call else None, base_evals)


def _stop_by(measure: _MeasuredBehaviour, pair: ModelPair) -> Callable[[nn.Module, int], bool]:
    with pair.require_base()() as clean:
        table = measure.table(clean)
    assert table is not None
    level = float(table["value"].mean())

    def no_higher(model: nn.Module, _step: int) -> bool:
        items = measure.table(model)
        return items is not None and float(items["value"].mean()) <= level

    return no_higher


# --- Rows, feature, base and what to measure with, from the caller's arguments


def _usable(
    data: str | Sequence[str] | Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    items: Sequence[Row],
) -> list[Conversation]:
    specs = [data] if isinstance(data, str) else [item for item in data if isinstance(item, str)]
    rows = corrective_rows(specs) if specs else [item for item in data if not isinstance(item, str)]
    check_rows(tokenizer, rows, max_length)
    refuse_overlap(rows, [row["question"] for row in items])
    return rows


def _names(data: str | Sequence[str] | Sequence[Conversation]) -> tuple[str, ...]:
    """Names of sets and files; conversations have none."""
    return (data,) if isinstance(data, str) else tuple(item for item in data if isinstance(item, str))


def _feature(monitor: FeatureMonitor, feature: str | None) -> str:
    if not monitor.settings.runs_probes:
        raise InputError("the monitor reads no probes: take mode='probe' or 'both'")
    features = flatten(monitor.settings.features)
    name = next(iter(features)) if feature is None else feature
    if name not in features:
        raise unknown("feature", name, features)
    return name


def _pair(
    model: nn.Module, base: nn.Module | None, monitor: FeatureMonitor, tokenizer: PreTrainedTokenizerBase, feature: str
) -> ModelPair:
    if base is None and not is_adapted(model):
        raise InputError("a plain model does not know its base: pass base=, the model before the misaligned training")
    settings = monitor.settings
    one, chosen = settings.groups.parts[0], flatten(settings.features)[feature]
    if settings.groups.several or isinstance(chosen, tuple) or one.reads != one.writes or not one.reads.is_residual:
        raise InputError("realign chooses rows in one residual stream: give it a monitor with one SAE of that stream")
    direction = feature_direction(settings.sae, chosen)
    return ModelPair.of_models(model, base, tokenizer, one.reads.layer, direction, settings.bf16)


def _measurements(
    monitor: FeatureMonitor, tokenizer: PreTrainedTokenizerBase, feature: str, model: nn.Module
) -> Measurements:
    """The monitor's features and probes, the answers among these as neutral chat, and the capability set."""
    settings = monitor.settings
    answered = [talk for talk in settings.probes if split_answer(talk)[1]]
    return Measurements(
        tokenizer,
        reader=probe_reader(settings, feature_set(settings, unwrap(model)), tokenizer),
        feature=feature,
        neutral=answer_batches(tokenizer, answered),
        capability=capability_groups(tokenizer),
        bf16=settings.bf16,
    )


def _folder(out: str | Path | None) -> "tempfile.TemporaryDirectory[str] | AbstractContextManager[Path]":
    return tempfile.TemporaryDirectory() if out is None else whole_folder(Path(out), "choose another out=")
