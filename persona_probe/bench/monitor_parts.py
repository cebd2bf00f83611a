"""The parts of `make bench-monitor`: training watched and unwatched, encoding, today's way, waits for a GPU."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.bench.monitor_clock import SyncCounter
from persona_probe.bench.monitor_costs import (
    against_bridge,
    encoders,
    evenly,
    least_every,
    made_up_sae,
    most_probes,
    probe_seconds,
)
from persona_probe.bench.monitor_runs import Trained, fit, train
from persona_probe.bench.timing import in_turn, ratios, spread
from persona_probe.commands import echo
from persona_probe.config import Training
from persona_probe.data.chat import Conversation
from persona_probe.finetune.sft import with_adapter
from persona_probe.models.adapters import strip_adapter
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.schedule import EVERY, PROBES

AIM, PASSIVE_AIM, BRIDGE_AIM = 0.02, 0.01, 10
"""Shares of training time that probe and passive readings may take; how much cheaper than the bridge a reading is."""
COUNTS, WIDTH, DICTIONARIES, CHOSEN = (2, 4, 8, 12, 16, 24, 32), 576, (4_608, 131_072), (1, 16, 256)
NO_GPU = "no GPU that torch can use"


@dataclass(frozen=True)
class Bench:
    """What is trained and read."""

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
        """A monitor at the bench's cadence; an error in it is raised."""
        settings = {"probes": evenly(self.probes, self.count), "every": self.every, "on_error": "raise", **settings}
        return FeatureMonitor(self.sae, {"persona": self.latent}, **settings)

    def run(self, monitor: FeatureMonitor | None = None) -> Trained:
        """One training run."""
        return train(self.model, self.tokenizer, self.rows, self.training, monitor)


def reading_costs(bench: Bench) -> dict[int, float]:
    """Median seconds of a reading by number of probes."""
    tuned: Any = with_adapter(bench.model, bench.training, seed=0)
    counts = [n for n in COUNTS if n < len(bench.probes)] + [len(bench.probes)]
    features = {"persona": bench.latent}
    times = probe_seconds(tuned, bench.tokenizer, bench.sae, features, bench.probes, counts, bench.repeats)
    strip_adapter(tuned)
    return {n: statistics.median(found) for n, found in times.items()}


def runs_in_turn(works: dict[str, Callable[[], Trained]], repeats: int) -> dict[str, list[Trained]]:
    """Each run once, then each again; what runs first changes from repeat to repeat."""
    found: dict[str, list[Trained]] = {label: [] for label in works}
    for number in range(repeats):
        for label in list(works)[:: -1 if number % 2 else 1]:
            found[label].append(works[label]())
    return found


def describe(label: str, found: Sequence[Trained], plain: Sequence[Trained], aim: float) -> list[str]:
    """Wall ratio, and the monitor's own seconds over training's, as lines."""
    ratio = ratios({"with": [r.wall for r in found], "without": [r.wall for r in plain]}, "with", "without")
    shares, costs = [100 * r.share for r in found], [cost for r in found for cost in r.readings]
    step = statistics.median(r.step for r in found)
    verdict = "within" if statistics.median(shares) <= 100 * aim else "ABOVE"
    return [
        f"{label}: wall time {spread(ratio)} of the same training without",
        f"{label}: the monitor's own seconds are {spread(shares)}% of training's, {verdict} the aim of {100 * aim:g}%",
        f"{label}: {len(costs) // len(found)} readings of {spread(costs)} s, a step {step:.2f} s; "
        f"before the first step, once, {statistics.median(r.once for r in found):.2f} s",
    ]


def bench_training(bench: Bench) -> None:
    """Training without, with probes, with as many probes as the aim allows, and with passive readings."""
    replace(bench, training=replace(bench.training, steps=2)).run()  # warm-up
    rough = bench.run()
    costs = reading_costs(bench)
    echo(f"reading, by probes: {', '.join(f'{n}: {cost:.2f} s' for n, cost in costs.items())}")
    few = most_probes(costs, rough.step, bench.every, AIM)
    works = {"without": bench.run, "probe mode": lambda: bench.run(bench.monitor())}
    if few is not None and few < bench.count:
        chosen = evenly(bench.probes, few)
        works["fewer probes"] = lambda: bench.run(bench.monitor(probes=chosen))
    works["passive mode"] = lambda: bench.run(bench.monitor(mode="passive"))
    found = runs_in_turn(works, bench.repeats)
    names = {
        "probe mode": f"probe mode, {bench.count} probes every {bench.every} steps",
        "fewer probes": f"probe mode, {few} probes every {bench.every} steps",
        "passive mode": f"passive mode every {bench.every} steps",
    }
    for label in list(works)[1:]:
        aim = PASSIVE_AIM if label == "passive mode" else AIM
        echo("\n".join(describe(names[label], found[label], found["without"], aim)))
    echo(allowance(found, costs, bench.count, bench.every))


def allowance(found: dict[str, list[Trained]], costs: dict[int, float], probes: int, every: int) -> str:
    """What the aim of probe mode allows, from what the runs measured."""
    step = statistics.median(run.step for run in found["without"])
    cost = statistics.median(cost for run in found["probe mode"] for cost in run.readings)
    few = most_probes(costs, step, every, AIM)
    at_default = "no reading" if few is None else f"{few} probes"
    return (
        f"{100 * AIM:g}% of training time allows {probes} probes every {least_every(cost, step, AIM)} steps, "
        f"or {at_default} every {every} (a step {step:.2f} s, a reading {cost:.2f} s)"
    )


def bench_encode(repeats: int, tokens: int, device: torch.device, dictionaries: Sequence[int] = DICTIONARIES) -> None:
    """Sliced against full encoding, float32."""
    for size in dictionaries:
        sae, x = made_up_sae(WIDTH, size, device), torch.randn(tokens, WIDTH, device=device)
        times = in_turn(encoders(sae, x, CHOSEN), repeats)
        full = statistics.median(times["all"])
        echo(f"encoding {tokens} tokens at all {size} latents: {1000 * full:.1f} ms")
        for count in CHOSEN:
            own = 1000 * statistics.median(times[str(count)])
            faster = spread(ratios(times, "all", str(count)))
            echo(f"encoding {count} of {size} latents: {own:.2f} ms, {faster} times as fast as all")


def bench_today(bench: Bench, name: str) -> None:
    """One reading against TransformerLens' bridge of a merged copy, with the default probes and with all."""
    tuned: Any = with_adapter(bench.model, bench.training, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        strip_adapter(tuned)
        for count in sorted({bench.count, len(bench.probes)}):
            _today(bench, name, Path(folder), evenly(bench.probes, count))


def _today(bench: Bench, name: str, folder: Path, probes: Sequence[Conversation]) -> None:
    times, apart = against_bridge(
        bench.model, bench.tokenizer, folder, name, bench.sae, bench.latent, probes, bench.repeats
    )
    echo(f"{len(probes)} probes read: {spread(times['ours'])} s; largest difference to the bridge's {apart:.3f}")
    for label in list(times)[1:]:
        ratio = ratios(times, label, "ours")
        verdict = "reached" if statistics.median(ratio) >= BRIDGE_AIM else "MISSED"
        echo(f"run_with_cache on a merged copy's {label}: {spread(times[label])} s, {spread(ratio)} times ours")
        echo(f"  aim of {BRIDGE_AIM} times: {verdict}")


def bench_syncs(bench: Bench) -> None:
    """Waits of the host for the GPU that the monitor adds to a step."""
    if bench.model.device.type != "cuda":
        echo(f"host synchronisations: skipped, {NO_GPU}")
        return
    counts = {}
    for mode in ("without", "probe", "passive"):
        counter = SyncCounter()
        watching = [] if mode == "without" else [bench.monitor(mode=mode)]
        fit(bench.model, bench.tokenizer, bench.rows, bench.training, [*watching, counter])
        counts[mode] = counter.counts
    for mode in ("probe", "passive"):
        at, between = added_syncs(counts[mode], counts["without"], bench.every)
        echo(f"host synchronisations that {mode} mode adds: at steps that are read {at}, at others {between}")


def added_syncs(found: Sequence[int], plain: Sequence[int], every: int) -> tuple[list[int], list[int]]:
    """Extra synchronisations of each step, first those of steps that are read; step 1 is left out (set-up)."""
    extra = {step: a - b for step, (a, b) in enumerate(zip(found, plain, strict=True), 1) if step > 1}
    return [n for s, n in extra.items() if s % every == 0], [n for s, n in extra.items() if s % every]
