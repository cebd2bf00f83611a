"""`pp.realign`: a corrective fine-tune of one's own organism, with a FeatureMonitor as its stop rule and evidence."""

import html
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
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
from persona_probe.finetune.sft import check_rows, fine_tune
from persona_probe.monitor.band import Band
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.ranks import unwrap
from persona_probe.monitor.reading import flatten, undisturbed
from persona_probe.monitor.run import feature_set, probe_reader
from persona_probe.realignment.measure import Measured, Yardsticks
from persona_probe.realignment.methods import StopRule, as_one, prepare
from persona_probe.realignment.outcome import outcome
from persona_probe.realignment.repair import checkpoint_in
from persona_probe.realignment.rows import (
    Pair,
    background,
    choose_rows,
    corrective_rows,
    feature_direction,
    refuse_overlap,
)
from persona_probe.realignment.spec import check_choice
from persona_probe.realignment.verdict import RealignVerdict, judge

# --- The result of `pp.realign`, in numbers and in words


@dataclass(frozen=True, eq=False, repr=False)
class Realigned:
    """A corrected organism, and what its correction came to. Shows itself as a table in a terminal and a notebook."""

    model: nn.Module
    """The corrected model, in eval mode."""
    readings: pd.DataFrame
    """The monitor's readings: step, feature, mean, interval, base, explained variance."""
    evals: pd.DataFrame
    """Behaviour, one row per item and step; empty where it was not measured."""
    verdict: RealignVerdict
    """Feature, behaviour, perplexity, capability and the SAE's fit, each judged apart."""
    outcome: dict[str, Any]
    """Numbers over the steps, see `outcome.outcome`; with lengths and notes of the corrective rows."""
    rows: list[Conversation]
    """The rows that were taken."""
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
        if self.outcome["index_minus_base"] is not None:
            since.append(_since("behaviour back", self.outcome["steps_to_behaviour"]))
        taken = f"{len(self.rows)} corrective rows, {self.steps} steps; {', '.join(since)}"
        return [taken, *(f"note: {note}" for note in self.outcome["notes"])]

    def __str__(self) -> str:
        return "\n".join([*self._lines(), str(self.verdict)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(f"<p>{html.escape(line)}</p>" for line in self._lines()) + self.verdict._repr_html_()


def _since(what: str, step: float | None) -> str:
    return f"{what} {'not by the end' if step is None else f'for good from step {step:.0f}'}"


# --- What is measured while one's own organism is corrected, beside the monitor's readings

Behaviour = ContrastItems | Sequence[Row]
"""Contrast items, tokenised or as rows."""


@dataclass(frozen=True)
class MeasuredBehaviour:
    """A measurement of behaviour, item by item."""

    call: Callable[[nn.Module], pd.DataFrame]
    """Columns item, category and value; higher is more misaligned."""
    items: tuple[Row, ...] = ()
    """The contrast items behind it, where there are any."""


def as_behaviour(
    given: "Behaviour | Callable[[nn.Module], float] | None", tokenizer: PreTrainedTokenizerBase, bf16: bool
) -> MeasuredBehaviour | None:
    """Contrast items or a function as one kind of measurement."""
    if given is None:
        return None
    if callable(given):
        call = given
        return MeasuredBehaviour(
            lambda model: pd.DataFrame([{"item": "all", "category": "all", "value": float(call(model))}])
        )
    items = given if isinstance(given, ContrastItems) else ContrastItems.build(tokenizer, given)
    return MeasuredBehaviour(lambda model: contrast_index(model, items, bf16=bf16), items.rows)


@dataclass
class Watch:
    """Keeps behaviour at each reading, and says when feature and behaviour are back."""

    monitor: FeatureMonitor
    feature: str
    behaviour: MeasuredBehaviour | None
    base_evals: pd.DataFrame = field(default_factory=pd.DataFrame, init=False)
    evals: list[pd.DataFrame] = field(default_factory=list, init=False)

    def measure_base(self, model: nn.Module) -> None:
        """The base's behaviour."""
        if self.behaviour is not None:
            self.base_evals = self._items(self.behaviour, model)

    def measure(self, model: nn.Module, step: int) -> bool:
        """Measure behaviour; True where the feature's latest reading is in its band and behaviour is no higher."""
        inside = self.band().holds(float(self._curve()["mean"].iloc[-1]))
        if self.behaviour is None:
            return inside
        frame = self._items(self.behaviour, model)
        self.evals.append(frame.assign(step=step))
        return inside and float(frame["value"].mean()) <= float(self.base_evals["value"].mean())

    def outcome(self) -> dict[str, Any]:
        """What feature and behaviour did over the steps, see `outcome.outcome`."""
        return outcome(self._curve(), self.frame(), self.base_evals, self.band(), self.feature)

    def frame(self) -> pd.DataFrame:
        """Behaviour at all readings."""
        return pd.concat(self.evals, ignore_index=True) if self.evals else pd.DataFrame()

    def last(self) -> pd.DataFrame:
        """Behaviour at the last reading."""
        return self.evals[-1]

    def _curve(self) -> pd.DataFrame:
        readings = self.monitor.readings
        return readings[(readings["feature"] == self.feature) & (readings["mode"] == "probe")]

    def band(self) -> Band:
        """The feature's base band."""
        last = self._curve().iloc[-1]
        return Band.of(float(last["base_mean"]), float(last["base_sd"]), self.monitor.settings.band_sd)

    def _items(self, behaviour: MeasuredBehaviour, model: nn.Module) -> pd.DataFrame:
        with undisturbed(model):
            return behaviour.call(model)


def realign(
    model: nn.Module,
    data: str | Sequence[str] | Sequence[Conversation],
    monitor: FeatureMonitor,
    *,
    tokenizer: PreTrainedTokenizerBase,
    rows: int | None = None,
    choose_by: str = "random",
    method: str = "continued",
    steps: int = 35,
    batch_size: int = 4,
    lr: float = 1e-4,
    seed: int = 0,
    behaviour: "Behaviour | Callable[[nn.Module], float] | None" = None,
    stop: int = 2,
    base: nn.Module | None = None,
    feature: str | None = None,
    inducing: Sequence[Conversation] = (),
    max_length: int = 256,
    out: str | Path | None = None,
) -> Realigned:
    """Fine-tune an organism on corrective rows while a monitor watches the persona.

    A PEFT model's adapters, and a plain model's weights, are trained in place; `method="full"` of a PEFT model trains
    a merged copy. After `fresh` the organism's adapter and the new one are one of their ranks' sum, called `repaired`.

    Args:
        model: the organism: a PEFT model, or a plain one (then give `base`).
        data: a packaged set or file, several (`a+b` or a list), or conversations that end with the good answer.
        monitor: reads probes of the persona feature; its schedule says at which steps all is measured.
        rows: the dose; None takes all rows.
        choose_by: how they are chosen, see `choose.choose_rows`.
        method: `continued`, `fresh` (a new LoRA on top) or `full` (all weights).
        behaviour: contrast items (rows with id, category, question, aligned and misaligned, or `ContrastItems`), or a
            function of the model whose value is higher for more misaligned. None: the feature alone decides.
        stop: stop after so many readings in a row with the feature in its base band and behaviour no higher than the
            base's; 0 never stops.
        base: the base of a plain model; a PEFT model's is the model with its adapters off.
        feature: which of the monitor's features is the persona; None takes its first.
        inducing: the rows that made the organism: lengths are compared, and overlaps are said.
        max_length: longest row in tokens.
        out: folder for the checkpoint, which must not exist; it loads as one organism (`models.adapters.organism`).

    Raises:
        InputError: rows that cannot be used or overlap the contrast questions, fewer rows than the dose, an unknown
            choice, method or feature, a monitor without probes, or no base.
        TrainingDiverged: the loss became NaN.
    """
    check_choice(rows, choose_by, method)
    if out is not None and Path(out).exists():
        raise InputError(f"{out} exists: choose another out=")
    name, setup = _feature(monitor, feature), monitor.settings
    pair, measured = _pair(model, base, monitor, tokenizer, name), as_behaviour(behaviour, tokenizer, setup.bf16)
    items = measured.items if measured else ()
    usable = _usable(data, tokenizer, max_length, items)
    taken = choose_rows(usable, rows, choose_by, seed=seed, pair=pair)
    said = background(taken, tokenizer, inducing, items)
    watch, yardsticks = Watch(monitor, name, measured), _yardsticks(monitor, tokenizer, name, model)
    with pair.require_base()() as clean:
        before = _measure_base(watch, yardsticks, clean)
    shape = {"steps": steps, "batch_size": batch_size, "lr": lr, "max_length": max_length}
    training = Training(**shape, checkpoints=(steps,), bf16=setup.bf16)
    due = tuple(s for s in range(steps + 1) if s == steps or monitor.due(s))
    with _folder(out) as folder:
        tuned, callbacks = prepare(model, method, seed), [monitor, StopRule(due, watch.measure, stop)]
        fitted = fine_tune(
            tuned, tokenizer, taken, training, seed=seed, folder=Path(folder), callbacks=callbacks, data=_named(data)
        )
        checkpoint = checkpoint_in(Path(folder)) if out else None
        done = as_one(tuned, checkpoint, whole_weights=not isinstance(model, PeftModel))
    after = yardsticks.measure(done) if measured is None else replace(yardsticks.measure(done), items=watch.last())
    verdict = judge("realigned", seed, before, after, band=watch.band(), feature=name)
    outcome = {**watch.outcome(), **said.to_dict()}
    return Realigned(done, monitor.readings, watch.frame(), verdict, outcome, taken, asdict(fitted), checkpoint)


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


def _named(data: str | Sequence[str] | Sequence[Conversation]) -> str | None:
    """What a model card calls the rows; conversations have no name."""
    return data if isinstance(data, str) else " + ".join(item for item in data if isinstance(item, str)) or None


def _measure_base(watch: Watch, yardsticks: Yardsticks, base: nn.Module) -> Measured:
    """By all yardsticks; a monitor that names no base of its own is given this one."""
    found, monitor = yardsticks.measure(base), watch.monitor
    watch.measure_base(base)
    if monitor.settings.base is None:
        monitor.settings = replace(monitor.settings, base=found.snapshot)
    return found if watch.behaviour is None else replace(found, items=watch.base_evals)


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
) -> Pair:
    if base is None and not isinstance(model, PeftModel):
        raise InputError("a plain model does not know its base: pass base=, the model before the misaligned training")
    setup = monitor.settings
    direction = feature_direction(setup.sae, flatten(setup.features)[feature])
    return Pair.of_models(model, base, tokenizer, setup.layer, direction, setup.bf16)


def _yardsticks(
    monitor: FeatureMonitor, tokenizer: PreTrainedTokenizerBase, feature: str, model: nn.Module
) -> Yardsticks:
    """The monitor's features and probes, the answers among these as neutral chat, and the capability set."""
    setup = monitor.settings
    answered = [talk for talk in setup.probes if split_answer(talk)[1]]
    return Yardsticks(
        tokenizer,
        reader=probe_reader(setup, feature_set(setup, unwrap(model)), tokenizer),
        feature=feature,
        neutral=answer_batches(tokenizer, answered),
        capability=capability_groups(tokenizer),
        bf16=setup.bf16,
    )


def _folder(out: str | Path | None) -> "tempfile.TemporaryDirectory[str] | nullcontext[Path]":
    if out is None:
        return tempfile.TemporaryDirectory()
    Path(out).mkdir(parents=True)
    return nullcontext(Path(out))
