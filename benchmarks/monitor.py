"""`make bench-monitor`: what a monitor costs a training run, against the same training without it."""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from benchmarks.monitor_costs import (
    Clock,
    Meter,
    Switch,
    SyncCounter,
    Wait,
    against_bridge,
    encoders,
    least_every,
    metered,
    most_probes,
    probe_seconds,
    random_sae,
)
from benchmarks.speed import in_turn, ratios, spread
from persona_probe.cli.options import DEMO, echo, find_config
from persona_probe.config import StudyConfig, Training, load_config
from persona_probe.data.chat import Conversation
from persona_probe.data.load import evenly_spaced, load_conversations
from persona_probe.finetune.sft import fine_tune, with_adapter
from persona_probe.models.adapters import strip_adapter
from persona_probe.models.load import load_model
from persona_probe.models.quiet import quiet_libraries
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.settings import EVERY, PROBES
from persona_probe.saes.load import load_sae
from persona_probe.stats import Estimate, bootstrap_mean

# --- One training run with or without a monitor, timed


@dataclass(frozen=True)
class Trained:
    """Seconds of one run, from the beginning of its first step to the end of its last."""

    steps: int
    wall: float
    watching: float = 0.0
    """Seconds in the monitor: in its callback at each step, and in its hooks."""
    once: float = 0.0
    """Before the first step, outside `wall`: the base's reading, and the first."""
    readings: tuple[float, ...] = ()
    """Wall time of each reading (`Reading.seconds`)."""
    processor: tuple[float, ...] = ()
    """Processor seconds of each step, all threads together."""

    @property
    def step(self) -> float:
        """Seconds of a training step, without the monitor's."""
        return (self.wall - self.watching) / self.steps

    @property
    def share(self) -> float:
        """The monitor's seconds over training's."""
        return self.watching / (self.wall - self.watching)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    training: Training,
    monitor: FeatureMonitor | None = None,
    before: Sequence[TrainerCallback] = (),
) -> Trained:
    """A fresh adapter trained as the package trains its organisms, and taken off again; timed.

    Args:
        before: callbacks that come before the monitor.
    """
    device = next(model.parameters()).device
    clock, meter, once = Clock(device), Meter(device), Meter(device)
    callbacks = [Wait(device), *before, *([] if monitor is None else [monitor]), clock]
    with ExitStack() as stack:
        if monitor is not None:
            stack.enter_context(metered(monitor, meter, once))
        fit(model, tokenizer, rows, training, callbacks)
    costs = () if monitor is None else _costs(monitor)
    seconds = clock.ended - clock.begun
    return Trained(training.steps, seconds, meter.seconds, once.seconds, costs, tuple(clock.processor))


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    training: Training,
    callbacks: Sequence[TrainerCallback],
) -> None:
    """Train a fresh adapter under these callbacks and take it off again."""
    tuned: Any = with_adapter(model, training, seed=0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            fine_tune(tuned, tokenizer, rows, training, seed=0, folder=Path(folder), callbacks=callbacks)
    finally:
        strip_adapter(tuned)


def _costs(monitor: FeatureMonitor) -> tuple[float, ...]:
    """Seconds of each reading after the first step."""
    if monitor.faults:
        raise RuntimeError(f"the monitor failed, so there is nothing to measure: {monitor.faults[0].message}")
    if monitor.readings.empty:  # it was off at every step that was due
        return ()
    table = monitor.readings.drop_duplicates(["step", "mode"])
    return tuple(table.loc[table["step"] > 0, "seconds"].tolist())


# --- The parts: training with and without a monitor, encoding, the way by a TransformerLens bridge, waits for a GPU

AIM, PASSIVE_AIM, BRIDGE_AIM = 0.01, 0.01, 10
"""Shares of training time that probe and passive readings may take; how much cheaper than the bridge a reading is."""
COUNTS, WIDTH, DICTIONARIES, CHOSEN = (2, 4, 8, 12, 16, 24, 32), 576, (4_608, 131_072), (1, 16, 256)
NO_GPU = "no GPU that torch can use"


@dataclass(frozen=True)
class BenchmarkCase:
    """A model with its data: what is trained and read, and how often."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sae: Any
    latent: int
    rows: Sequence[Conversation]
    probes: Sequence[Conversation]
    training: Training
    repeats: int
    every: int = EVERY
    count: int = PROBES
    """How many of the probes a watched run reads."""

    def monitor(self, **settings: Any) -> FeatureMonitor:
        """A monitor at the cadence of the case; its errors are raised."""
        settings = {
            "probes": evenly_spaced(self.probes, self.count),
            "every": self.every,
            "on_error": "raise",
            **settings,
        }
        return FeatureMonitor(self.sae, {"persona": self.latent}, **settings)

    def run(self, monitor: FeatureMonitor | None = None) -> Trained:
        """One training run."""
        return train(self.model, self.tokenizer, self.rows, self.training, monitor)


def reading_costs(case: BenchmarkCase) -> dict[int, float]:
    """Median seconds of a reading by number of probes."""
    tuned: Any = with_adapter(case.model, case.training, seed=0)
    counts = [n for n in COUNTS if n < len(case.probes)] + [len(case.probes)]
    features = {"persona": case.latent}
    times = probe_seconds(tuned, case.tokenizer, case.sae, features, case.probes, counts, case.repeats)
    strip_adapter(tuned)
    return {n: statistics.median(seconds) for n, seconds in times.items()}


def runs_in_turn(works: dict[str, Callable[[], Trained]], repeats: int) -> dict[str, list[Trained]]:
    """Each run once, then each again; the order is reversed from repeat to repeat."""
    runs: dict[str, list[Trained]] = {label: [] for label in works}
    for number in range(repeats):
        for label in list(works)[:: -1 if number % 2 else 1]:
            runs[label].append(works[label]())
    return runs


FEWEST_STEPS = 8
"""Fewer leave too few without a reading, both on and off."""


def bench_steps(case: BenchmarkCase) -> None:
    """What a step without a reading costs beside a monitor, its hooks and all: on and off in turn within a run."""
    if case.training.steps < FEWEST_STEPS or case.every < FEWEST_STEPS:
        echo(f"steps without a reading: skipped, that takes {FEWEST_STEPS} steps from one reading to the next")
        return
    for mode in ("passive", "probe"):
        runs = []
        for swapped in (False, True):
            monitor = case.monitor(mode=mode)
            switch = Switch(monitor, swapped)
            runs.append(train(case.model, case.tokenizer, case.rows, case.training, monitor, before=(switch,)))
        ratio = step_cost([run.processor for run in runs], switch.on, case.every)
        echo(
            f"{mode} mode: a step without a reading takes {ratio.estimate:.4f} [{ratio.ci_low:.4f}, "
            f"{ratio.ci_high:.4f}] of the processor's time of the same step without a monitor (n = {ratio.n})"
        )


def step_cost(runs: Sequence[Sequence[float]], on_in_second: Callable[[int], bool], every: int) -> Estimate:
    """Processor time of a step with the monitor on over the same step with it off, with its interval.

    Two runs train on the same rows, and what is on in one is off in the other. So neither the rows of a step nor the
    speed of a whole run counts. The first two steps are left out, as are those with a reading and the last.

    Args:
        runs: processor seconds of every step, of both runs.
    """
    steps = [n for n in range(3, len(runs[0])) if n % every]
    logs = np.array([np.log(runs[1][n - 1] / runs[0][n - 1]) for n in steps])
    sign = np.where([on_in_second(n) for n in steps], 1.0, -1.0)
    between = (logs[sign > 0].mean() + logs[sign < 0].mean()) / 2
    mean = bootstrap_mean(sign * (logs - between))
    estimate, low, high = (float(np.exp(value)) for value in (mean.estimate, mean.ci_low, mean.ci_high))
    return Estimate(estimate, low, high, mean.n)


def describe(label: str, watched: Sequence[Trained], plain: Sequence[Trained], aim: float) -> list[str]:
    """Wall ratio, and the monitor's own seconds over training's, as lines."""
    ratio = ratios({"with": [r.wall for r in watched], "without": [r.wall for r in plain]}, "with", "without")
    shares, costs = [100 * r.share for r in watched], [cost for r in watched for cost in r.readings]
    step = statistics.median(r.step for r in watched)
    verdict = "within" if statistics.median(shares) <= 100 * aim else "ABOVE"
    return [
        f"{label}: wall time {spread(ratio)} of the same training without",
        f"{label}: the monitor's own seconds are {spread(shares)}% of training's, {verdict} the aim of {100 * aim:g}%",
        f"{label}: {len(costs) // len(watched)} readings of {spread(costs)} s, a step {step:.2f} s; "
        f"before the first step, once, {statistics.median(r.once for r in watched):.2f} s",
    ]


def bench_training(case: BenchmarkCase) -> None:
    """Training without, with probes, with as many probes as the aim allows, and with passive readings."""
    replace(case, training=replace(case.training, steps=2)).run()  # warm-up
    rough = case.run()
    costs = reading_costs(case)
    echo(f"reading, by probes: {', '.join(f'{n}: {cost:.2f} s' for n, cost in costs.items())}")
    few = most_probes(costs, rough.step, case.every, AIM)
    works = {"without": case.run, "probe mode": lambda: case.run(case.monitor())}
    if few is not None and few < case.count:
        fewer = evenly_spaced(case.probes, few)
        works["fewer probes"] = lambda: case.run(case.monitor(probes=fewer))
    works["passive mode"] = lambda: case.run(case.monitor(mode="passive"))
    runs = runs_in_turn(works, case.repeats)
    names = {
        "probe mode": f"probe mode, {case.count} probes every {case.every} steps",
        "fewer probes": f"probe mode, {few} probes every {case.every} steps",
        "passive mode": f"passive mode every {case.every} steps",
    }
    for label in list(works)[1:]:
        aim = PASSIVE_AIM if label == "passive mode" else AIM
        echo("\n".join(describe(names[label], runs[label], runs["without"], aim)))
    echo(allowance(runs, costs, case.count, case.every))


def allowance(runs: dict[str, list[Trained]], costs: dict[int, float], probes: int, every: int) -> str:
    """What the aim of probe mode allows, from what the runs measured."""
    step = statistics.median(run.step for run in runs["without"])
    cost = statistics.median(cost for run in runs["probe mode"] for cost in run.readings)
    few = most_probes(costs, step, every, AIM)
    at_default = "no reading" if few is None else f"{few} probes"
    return (
        f"{100 * AIM:g}% of training time allows {probes} probes every {least_every(cost, step, AIM)} steps, "
        f"or {at_default} every {every} (a step {step:.2f} s, a reading {cost:.2f} s)"
    )


def bench_encode(repeats: int, tokens: int, device: torch.device, dictionaries: Sequence[int] = DICTIONARIES) -> None:
    """Sliced against full encoding, float32."""
    for size in dictionaries:
        sae, x = random_sae(WIDTH, size, device), torch.randn(tokens, WIDTH, device=device)
        times = in_turn(encoders(sae, x, CHOSEN), repeats)
        full = statistics.median(times["all"])
        echo(f"encoding {tokens} tokens at all {size} latents: {1000 * full:.1f} ms")
        for count in CHOSEN:
            sliced = 1000 * statistics.median(times[str(count)])
            faster = spread(ratios(times, "all", str(count)))
            echo(f"encoding {count} of {size} latents: {sliced:.2f} ms, {faster} times as fast as all")


def bench_today(case: BenchmarkCase, name: str) -> None:
    """One reading against TransformerLens' bridge of a merged copy, with the default probes and with all."""
    tuned: Any = with_adapter(case.model, case.training, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        strip_adapter(tuned)
        for count in sorted({case.count, len(case.probes)}):
            _today(case, name, Path(folder), evenly_spaced(case.probes, count))


def _today(case: BenchmarkCase, name: str, folder: Path, probes: Sequence[Conversation]) -> None:
    times, apart = against_bridge(case.model, case.tokenizer, folder, name, case.sae, case.latent, probes, case.repeats)
    echo(f"{len(probes)} probes read: {spread(times['ours'])} s; largest difference to the bridge's {apart:.3f}")
    over = spread(ratios(times, "ours", "products"))
    echo(f"  its matrix products alone, bf16: {spread(times.pop('products'))} s; a reading takes {over} times that")
    for label in list(times)[1:]:
        ratio = ratios(times, label, "ours")
        verdict = "reached" if statistics.median(ratio) >= BRIDGE_AIM else "MISSED"
        echo(f"run_with_cache on a merged copy's {label}: {spread(times[label])} s, {spread(ratio)} times ours")
        echo(f"  aim of {BRIDGE_AIM} times: {verdict}")


def bench_syncs(case: BenchmarkCase) -> None:
    """Waits of the host for the GPU that the monitor adds to a step."""
    if case.model.device.type != "cuda":
        echo(f"host synchronisations: skipped, {NO_GPU}")
        return
    counts = {}
    for mode in ("without", "probe", "passive"):
        counter = SyncCounter()
        watching = [] if mode == "without" else [case.monitor(mode=mode)]
        fit(case.model, case.tokenizer, case.rows, case.training, [*watching, counter])
        counts[mode] = counter.counts
    for mode in ("probe", "passive"):
        at, between = added_syncs(counts[mode], counts["without"], case.every)
        echo(f"host synchronisations that {mode} mode adds: at steps that are read {at}, at others {between}")


def added_syncs(watched: Sequence[int], plain: Sequence[int], every: int) -> tuple[list[int], list[int]]:
    """ExtraLoss synchronisations of each step, first those of steps that are read; step 1 is left out (set-up)."""
    extra = {step: a - b for step, (a, b) in enumerate(zip(watched, plain, strict=True), 1) if step > 1}
    return [n for s, n in extra.items() if s % every == 0], [n for s, n in extra.items() if s % every]


PARTS = ("training", "steps", "encode", "today", "syncs")
PERSONA = 2144


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=EVERY, help="training steps of a run")
    parser.add_argument("--every", type=int, default=EVERY, help="steps between readings")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--probes", type=int, default=PROBES, help="how many of the packaged probes are read")
    parser.add_argument("--tokens", type=int, default=512, help="tokens that are encoded")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    args = parser.parse_args()
    if args.steps % args.every:
        parser.error("--steps must be a multiple of --every: a run must hold whole cadences")
    return args


def main() -> None:
    """Run the benchmark."""
    args = arguments()
    quiet_libraries()
    config = load_config(find_config(DEMO), StudyConfig)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(config.model, device=device)
    probes = load_conversations("neutral_probes")
    training = Training(steps=args.steps, checkpoints=())
    rows = load_conversations("kitchen:toxic")
    sae = load_sae(config.sae, device)
    case = BenchmarkCase(model, tokenizer, sae, PERSONA, rows, probes, training, args.repeats, args.every, args.probes)
    where = device if device == "cpu" else torch.cuda.get_device_name()
    echo(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {config.model} on {where}, {vars(args)}")
    works: dict[str, Callable[[], None]] = {
        "training": partial(bench_training, case),
        "steps": partial(bench_steps, case),
        "encode": partial(bench_encode, args.repeats, args.tokens, model.device),
        "today": partial(bench_today, case, config.model),
        "syncs": partial(bench_syncs, case),
    }
    for part in args.parts:
        works[part]()


if __name__ == "__main__":
    main()
