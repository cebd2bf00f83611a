"""A monitor whose every part misbehaves: the run must not notice, and nothing may be said that is not so."""
# ruff: noqa: D102, ARG001, ARG005 (the parts have the methods and arguments that their protocols describe)

import errno
import functools
import logging
import math
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.assault.counts import Count, Settings
from persona_probe.errors import InputError
from persona_probe.files import words
from persona_probe.monitor.actions.action import Action, ActionContext
from persona_probe.monitor.actions.rollback import RollBack
from persona_probe.monitor.events import NOT_FINITE, Alarm, Event, Reading, Start
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.passive import PassiveReader
from persona_probe.monitor.reading import FeatureReader, same_randomness
from persona_probe.monitor.rules.rule import Rule
from persona_probe.monitor.settings import BehaviourMeasurement
from persona_probe.monitor.sinks.files import read_events
from tests.factories import copied_state, hook_count, make_model, make_tokenizer, same_state
from tests.monitor.monitored_runs import directions, loop_batch

STEPS, FIRES, ODD = 4, 2, 99
"""Steps of a run; the step at which the rule fires; the step of readings by hand, of another model."""
CASES = {False: 400, True: 24}
MODES = ("probe", "passive", "both")

# --- Faults: what a part does instead of, or besides, its work


@dataclass
class Scene:
    """Where a fault strikes."""

    monitor: FeatureMonitor
    value: Any
    """What the part would have answered."""
    model: Any = None
    """The model, where the part is given it."""


Fault = Callable[[Scene], Any]


class SaysNothing(Exception):
    """An error that cannot even be printed."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


ERRORS: tuple[Callable[[], Exception], ...] = (
    ValueError,
    SaysNothing,
    lambda: OSError(errno.ENOSPC, "No space left on device"),
    lambda: MemoryError("no memory"),
    lambda: RecursionError("too deep"),
    lambda: torch.OutOfMemoryError("out of memory"),
    StopIteration,
    lambda: InputError("bad input in the middle of a run"),
    lambda: UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"),
)


def raises(make: Callable[[], Exception]) -> Fault:
    """Raise."""

    def fault(scene: Scene) -> Any:
        raise make()

    return fault


def answers(what: Any) -> Fault:
    """Answer with what is no answer."""
    return lambda scene: what


def untidy(scene: Scene) -> Any:
    """Leave random states, gradients and the default dtype otherwise than they were."""
    random.random(), np.random.rand(3), torch.randn(3)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    if scene.model is not None:
        scene.model.train(not scene.model.training)
        for parameter in scene.model.parameters():
            parameter.requires_grad_(False)
        scene.model.register_forward_hook(lambda *_: 1 / 0)
        next(scene.model.modules()).register_forward_pre_hook(lambda *_: 1 / 0)
    return scene.value


def reads_again(scene: Scene) -> Any:
    """Start a reading inside a reading."""
    return scene.monitor.read(make_model(), ODD)


def closes(scene: Scene) -> Any:
    """Close the monitor in the middle."""
    scene.monitor.close()
    return scene.value


def watches_again(scene: Scene) -> Any:
    """Watch another model with the same monitor."""
    with scene.monitor.watch(make_model(), make_tokenizer()):
        return scene.value


def starts_again(scene: Scene) -> Any:
    """Anchor to another model."""
    return scene.monitor.start(make_model(), make_tokenizer())


FAULTS: tuple[Fault, ...] = (
    *(raises(make) for make in ERRORS),
    *(answers(what) for what in ("text", 3, math.nan, object(), np.ones(3), torch.ones(3), {})),
    *[untidy] * 4,
    *(reads_again, closes, watches_again, starts_again),
)
HOOKS = (
    *("rule.begin", "rule.update", "rule.inside"),
    *("sink.emit", "sink.close", "action.act", "action.clean", "action.every_rank"),
    *("on_reading", "behaviour", "probe", "passive", "values", "file", "loss"),
)
GIVEN_THE_MODEL = ("on_reading", "behaviour")


@dataclass
class Plan:
    """Which hooks misbehave in one run: the fault of each, and at which of its calls (None: at all)."""

    faults: Mapping[str, tuple[Fault, int | None]] = field(default_factory=dict)
    monitor: Any = None
    calls: Counter[str] = field(default_factory=Counter)
    struck: set[str] = field(default_factory=set)

    @classmethod
    def draw(cls, dice: random.Random) -> "Plan":
        """One to four faults."""
        hooks = dice.sample(HOOKS, dice.choice((1, 1, 2, 3, 4)))
        return cls({hook: (dice.choice(FAULTS), dice.choice((None, 1, 2, 3))) for hook in hooks})

    def strike(self, hook: str, value: Any = None, model: Any = None) -> Any:
        """What the hook answers at this call."""
        self.calls[hook] += 1
        fault, at = self.faults.get(hook, (None, None))
        if fault is None or at not in (None, self.calls[hook]):
            return value
        self.struck.add(hook)
        return fault(Scene(self.monitor, value, model))

    def __str__(self) -> str:
        names = {hook: getattr(fault, "__qualname__", "?").split(".")[0] for hook, (fault, _) in self.faults.items()}
        return ", ".join(f"{hook} {name} at {self.faults[hook][1]}" for hook, name in names.items())


# --- Parts that ask the plan first


class FaultyRule(Rule):
    """Fires at one step."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.step = plan, -1

    title = property(lambda self: "fires")
    firing = property(lambda self: self.step == FIRES)
    inside = property(lambda self: self.plan.strike("rule.inside", not self.firing))

    def begin(self, start: Start) -> None:
        self.step = -1
        # Bad input at the start raises: that is what it is for.
        fault = self.plan.faults.get("rule.begin")
        try:
            self.plan.strike("rule.begin")
        except InputError as error:
            raise RuntimeError(f"not at the start: {fault}") from error

    def reset(self) -> None:
        self.step = -1

    def update(self, reading: Reading) -> Any:
        self.step = reading.step
        alarm = Alarm(reading.step, "fires", "mean difference", "told to", 1.0, 0.5) if self.firing else None
        return self.plan.strike("rule.update", alarm)

    def describe(self) -> str:
        return "fires at one step"


class FaultySink:
    """Keeps nothing."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def emit(self, event: Event) -> None:
        self.plan.strike("sink.emit")

    def close(self) -> None:
        self.plan.strike("sink.close")


class FaultyAction(Action):
    """Does nothing."""

    def __init__(self, plan: Plan) -> None:
        object.__setattr__(self, "plan", plan)

    every_rank = property(lambda self: self.plan.strike("action.every_rank", True))

    def _do(self, alarm: Alarm, context: ActionContext) -> None:
        self.plan.strike("action.act")  # pyright: ignore[reportAttributeAccessIssue]

    def clean(self, context: ActionContext) -> None:
        self.plan.strike("action.clean")  # pyright: ignore[reportAttributeAccessIssue]


def faulty_monitor(plan: Plan, mode: str, folder: Path) -> FeatureMonitor:
    """A monitor of which every part asks the plan."""
    full = Path("/dev/full")
    values = folder / "values"
    if "values" in plan.faults:  # a file where the folder should be: no file can be written
        values.parent.mkdir(parents=True, exist_ok=True)
        values.write_text("in the way")
        plan.struck.add("values")
    broken_file = "file" in plan.faults and full.exists()
    plan.struck |= {"file"} if broken_file else set()
    plan.monitor = directions(
        every=1,
        mode=mode,
        rules=[FaultyRule(plan)],
        actions=[FaultyAction(plan)],
        sinks=[FaultySink(plan)],
        on_reading=lambda step, snapshot, model: plan.strike("on_reading", None, model),
        behaviour=BehaviourMeasurement(lambda model: plan.strike("behaviour", 1.0, model)),
        values_path=values,
        path=full if broken_file else folder / "events.jsonl",
        log=True,
    )
    return plan.monitor


@contextmanager
def faulty_readers(plan: Plan) -> Iterator[None]:
    """The readers of probes and of batches ask the plan too; the base's reading, where bad input raises, does not."""
    read, see = FeatureReader.read, PassiveReader._read

    def probe(self: Any, *args: Any, **kwargs: Any) -> Any:
        snapshot = read(self, *args, **kwargs)
        plan.calls["base"] += 1
        return snapshot if plan.calls["base"] == 1 else plan.strike("probe", snapshot)

    def passive(self: Any, *args: Any, **kwargs: Any) -> Any:
        see(self, *args, **kwargs)
        return plan.strike("passive")

    with patch.object(FeatureReader, "read", probe), patch.object(PassiveReader, "_read", passive):
        yield


# --- Trainings, each with and without the monitor

Training = Callable[[nn.Module, FeatureMonitor | None, Plan, Path], None]


def plain_loop(model: nn.Module, monitor: FeatureMonitor | None, plan: Plan, folder: Path) -> None:
    """A loop of one's own."""
    torch.manual_seed(11)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with ExitStack() as stack:
        if monitor is not None:
            stack.enter_context(monitor.watch(model, make_tokenizer(), optimizer=optimizer, checkpoint_folder=folder))
        for step in range(1, STEPS + 1):
            ids, labels = loop_batch(step)
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if monitor is not None:
                monitor.step(step, loss=_logged(plan, loss))


def _logged(plan: Plan, loss: Tensor) -> Any:
    try:
        with same_randomness():  # the loop's own code, not a part of the monitor
            return plan.strike("loss", loss)
    except Exception as error:
        return error


def transformers(model: nn.Module, monitor: FeatureMonitor | None, plan: Plan, folder: Path, **settings: Any) -> None:
    """The trainer of transformers, which TRL's are too."""
    from transformers import Trainer, TrainingArguments

    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "dataloader_pin_memory": False}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        use_cpu=True,
        seed=3,
        **{"save_strategy": "no", **quiet, **settings},
    )
    rows: Any = [{"input_ids": ids, "labels": ids} for ids in loop_batch(0)[0].repeat(STEPS, 1)]
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows[:3],
        processing_class=make_tokenizer(),
        callbacks=[] if monitor is None else [monitor],
    )
    trainer.train()


def lightning(model: nn.Module, monitor: FeatureMonitor | None, plan: Plan, folder: Path) -> None:
    """Lightning's trainer."""
    from lightning.pytorch import LightningModule, Trainer

    from persona_probe.monitor.lightning import LightningMonitor

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.train()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(11)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    data: Any = torch.utils.data.DataLoader(loop_batch(0)[0].repeat(STEPS, 1), batch_size=3)  # pyright: ignore
    callbacks: Any = [] if monitor is None else [LightningMonitor(monitor, make_tokenizer())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            default_root_dir=folder,
            callbacks=callbacks,
            max_epochs=1,
            accelerator="cpu",
            enable_checkpointing=False,
            **quiet,
        )
        trainer.fit(Module(), data)


TRAININGS: dict[str, Training] = {
    "loop": plain_loop,
    "transformers": transformers,
    "transformers, best": functools.partial(
        transformers,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    ),
    "lightning": lightning,
}
SHARES = ("loop",) * 6 + ("transformers",) * 2 + ("transformers, best", "lightning")


@dataclass(frozen=True)
class Ended:
    """How a training ended."""

    weights: dict[str, Tensor]
    draws: tuple[Any, ...]
    """The next random numbers of Python, NumPy and torch."""
    flags: list[bool]
    """Whether each parameter trains."""
    hooks: int

    @classmethod
    def of(cls, model: nn.Module) -> "Ended":
        draws = random.random(), float(np.random.rand()), float(torch.rand(())), torch.is_grad_enabled()
        flags = [parameter.requires_grad for parameter in model.parameters()]
        return cls(copied_state(model), (*draws, torch.get_default_dtype()), flags, hook_count(model))

    def differs(self, other: "Ended") -> str:
        """What is not equal, bit for bit."""
        unequal = [name for name in ("draws", "flags", "hooks") if getattr(self, name) != getattr(other, name)]
        return ", ".join([*unequal, *([] if same_state(self.weights, other.weights) else ["weights"])])


def a_model() -> nn.Module:
    """The tiny model, with dropout: training draws random numbers."""
    model: Any = make_model()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    return model


def run(name: str, mode: str | None, plan: Plan, folder: Path) -> tuple[Ended, FeatureMonitor | None]:
    """One training; without a monitor where `mode` is None."""
    model = a_model()
    random.seed(5), np.random.seed(5)
    monitor = None if mode is None else faulty_monitor(plan, mode, folder)
    with ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        for quiet in (redirect_stdout(nowhere), redirect_stderr(nowhere), faulty_readers(plan)):
            stack.enter_context(quiet)
        TRAININGS[name](model, monitor, plan, folder)
    return Ended.of(model), monitor


# --- One case: the run against the same run without a monitor, what it says against a monitor without faults

PARTS = {
    "rule": "rule 1",
    "action": "action 1",
    "sink": "sink 2",
    "file": "sink 1",
    "values": "values_path",
    "probe": "probe reading",
    "passive": "passive reading",
    "on_reading": "on_reading",
    "behaviour": "behaviour",
}
"""What faults call the part that a hook belongs to."""


class Cases:
    """Runs without faults, made once, and cases that are compared with them."""

    def __init__(self, place: Path) -> None:
        self.place, self.number = place, 0
        # The second run counts: what is imported at a first training may draw random numbers.
        self.without = functools.cache(lambda name: [run(name, None, Plan(), self.folder())[0] for _ in range(2)][1])
        self.sound = functools.cache(lambda name, mode: run(name, mode, Plan(), self.folder())[1])

    def folder(self) -> Path:
        """A new one."""
        self.number += 1
        return self.place / str(self.number)

    def hurt(self, name: str, mode: str, plan: Plan) -> tuple[str, str]:
        """What a case did to the run, and what it said that is not so; both empty where all held."""
        without = self.without(name)
        folder = self.folder()
        try:
            ended, monitor = run(name, mode, plan, folder)
        except Exception as error:
            return f"the run ended: {type(error).__name__} {_text(error)}", ""
        finally:
            torch.set_grad_enabled(True)
            torch.set_default_dtype(torch.float32)
        assert monitor is not None
        return ended.differs(without), "; ".join(self._untrue(name, mode, plan, folder, monitor))

    def _untrue(self, name: str, mode: str, plan: Plan, folder: Path, monitor: FeatureMonitor) -> Iterator[str]:
        sound = self.sound(name, mode)
        allowed = tuple(PARTS[hook.split(".")[0]] for hook in plan.struck if hook != "loss")
        for fault in monitor.faults:
            if not fault.part.startswith(allowed):
                yield f"{fault.part} is said to have failed"
        closed = any(fault is closes for fault, _ in plan.faults.values())
        read = {"probe", "passive"} & plan.struck
        yield from _unlike(monitor.readings, sound.readings, complete=not closed and not read)  # pyright: ignore
        if (
            not closed
            and not read
            and not any(hook.startswith("rule") for hook in plan.struck)
            and monitor.alarms != sound.alarms  # pyright: ignore
        ):
            yield "alarms differ"
        if not (folder / "events.jsonl").is_file():
            return
        try:
            read_events(folder / "events.jsonl")
        except InputError as error:
            yield f"the file is damaged: {error}"


def _unlike(readings: pd.DataFrame, sound: pd.DataFrame, complete: bool) -> Iterator[str]:
    """Readings that are not those of a sound monitor, or are missing."""
    key = ["step", "mode", "feature"]
    if not readings.empty:
        readings = readings[readings["step"] != ODD]
    if readings.empty:
        if complete:
            yield "no readings"
        return
    both = readings.merge(sound, on=key, how="left", suffixes=("", "_sound"))
    for column in ("mean", "base_mean", "finite"):
        if not both[column].equals(both[f"{column}_sound"]):
            yield f"{column} is another"
    if complete and len(readings) != len(sound):
        yield f"{len(readings)} readings, not {len(sound)}"


def _text(error: Exception) -> str:
    try:
        return words(error)
    except RuntimeError:
        return ""


# --- Weights that are not finite


def diverged(dice: random.Random) -> str:
    """A weight becomes NaN or infinite at some step and place; what was said or kept that is not so."""
    value, at, layer = dice.choice((math.nan, math.inf, -math.inf)), dice.randint(1, STEPS), dice.randint(0, 2)
    mode, back, model = dice.choice(MODES), RollBack(keep="memory"), make_model().train()
    monitor = directions(every=1, mode=mode, actions=[back])
    with monitor.watch(model, make_tokenizer()) as live:
        for step in range(1, STEPS + 1):
            ids, labels = loop_batch(step)
            if step == at:
                with torch.no_grad():
                    next(p for n, p in model.named_parameters() if f"layers.{layer}.mlp" in n).fill_(value)
            model(input_ids=ids, labels=labels)
            live.step(step)
    where = f"{value} in layer {layer} at step {at}, {mode}"
    below = layer <= monitor.settings.groups.last_layer
    by_step = monitor.readings.groupby("step")["finite"].all()
    if below and bool(by_step.get(at, True)):
        return f"{where}: said to be finite"
    if below and [alarm.rule for alarm in monitor.alarms] != [NOT_FINITE] * (2 if mode == "both" else 1):
        return f"{where}: alarms {monitor.alarms}"
    if back._clean.state is not None and not all(
        bool(weight.isfinite().all()) for weight in back._clean.state.content().weights.values()
    ):
        return f"{where}: kept as clean"
    return ""


def assault(settings: Settings) -> list[Count]:
    """Every fault at every hook, at random, under three trainers."""
    dice, cases = random.Random(settings.seed), Cases(settings.place)
    logging.getLogger("persona_probe").setLevel(logging.CRITICAL)
    hurt, untrue = list[str](), list[str]()
    for number in range(CASES[settings.short]):
        name, mode, plan = dice.choice(SHARES), dice.choice(MODES), Plan.draw(dice)
        did, said = cases.hurt(name, mode, plan)
        for found, what in ((hurt, did), (untrue, said)):
            if what:
                found.append(f"case {number}, {name}, {mode}: {plan}: {what}")
    spoiled = [said for _ in range(CASES[settings.short] // 4) if (said := diverged(dice))]
    logging.getLogger("persona_probe").setLevel(logging.NOTSET)
    return [
        Count("a monitor's parts fail: weights and random states bit for bit", CASES[settings.short], hurt),
        Count("the same runs: readings, alarms and faults are true", CASES[settings.short], untrue),
        Count("weights turn NaN or infinite: said at once, never kept as clean", CASES[settings.short] // 4, spoiled),
    ]
