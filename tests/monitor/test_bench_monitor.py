"""The monitor's benchmark: its arithmetic, and its runs on the tiny model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import monitor as bench_module
from benchmarks.monitor import (
    BenchmarkCase,
    Trained,
    added_syncs,
    allowance,
    bench_encode,
    bench_steps,
    bench_syncs,
    bench_training,
    describe,
    step_cost,
    train,
)
from benchmarks.monitor_costs import (
    BRIDGED,
    HOOKS,
    Meter,
    Switch,
    against_bridge,
    encoders,
    least_every,
    most_probes,
    random_sae,
)
from persona_probe.config import Training
from persona_probe.finetune.sft import with_adapter
from persona_probe.models.adapters import strip_adapter
from persona_probe.models.load import load_model
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.passive import PassiveReader
from tests.factories import D_MODEL, make_model, make_sae, make_tokenizer, talks

CPU = torch.device("cpu")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the benchmark says."""
    said: list[str] = []
    monkeypatch.setattr(bench_module, "echo", lambda text: said.extend(text.splitlines()))
    return said


def make_bench(**settings: Any) -> BenchmarkCase:
    training = Training(rank=2, alpha=2, steps=2, batch_size=2, checkpoints=(), bf16=False)
    training = settings.pop("training", training)
    parts = (make_model(), make_tokenizer(), make_sae("topk"), 3, talks(4), talks(3), training)
    return BenchmarkCase(*parts, repeats=1, every=2, count=3, **settings)


def test_the_monitors_share_is_its_seconds_over_training_without_them() -> None:
    run = Trained(steps=10, wall=20.4, watching=0.4)
    assert run.step == pytest.approx(2.0) and run.share == pytest.approx(0.02)


def test_what_an_aim_allows() -> None:
    assert least_every(1.0, step=2.0, aim=0.02) == 25
    assert least_every(0.01, step=2.0, aim=0.02) == 1
    costs = {8: 0.2, 16: 0.4, 64: 1.6}
    assert most_probes(costs, step=2.0, every=10, aim=0.02) == 16
    assert most_probes(costs, step=0.5, every=10, aim=0.02) is None
    runs = {"without": [Trained(10, 20.0)], "probe mode": [Trained(10, 21.6, 1.6, readings=(1.6,))]}
    assert "1% of training time allows 64 probes every 80 steps, or 8 probes every 10" in allowance(runs, costs, 64, 10)


def test_ratio_and_share_are_those_of_the_runs() -> None:
    with_it, without = [Trained(10, 22.0, 2.0, 0.5, (2.0,))], [Trained(10, 20.0)]
    wall, own, costs = describe("x", with_it, without, 0.02)
    assert "1.100 (1.100 to 1.100)" in wall
    assert "10.000 (10.000 to 10.000)% of training's, ABOVE the aim of 2%" in own
    assert "1 readings of 2.000" in costs and "a step 2.00 s" in costs


def test_a_step_is_compared_with_itself_whatever_its_rows_and_the_run() -> None:
    # The second run is slower by half, and the rows differ from step to step; on, a step costs a tenth more.
    rows = np.array([1.0, 2.0, 3.0, 1.0, 4.0, 2.0, 5.0, 3.0, 2.0, 9.0])
    switch = Switch(make_bench().monitor(), swapped=True)
    on = np.array([switch.on(n) for n in range(1, 11)])
    runs = [rows * np.where(on, 1.0, 1.1), 1.5 * rows * np.where(on, 1.1, 1.0)]
    ratio = step_cost([run.tolist() for run in runs], switch.on, every=5)
    assert ratio.n == 6 and ratio.estimate == pytest.approx(1.1) and ratio.ci_high == pytest.approx(1.1)


def test_steps_are_compared_though_none_is_read(lines: list[str]) -> None:
    training = Training(rank=2, alpha=2, steps=8, batch_size=2, checkpoints=(), bf16=False)
    bench_steps(replace(make_bench(training=training), every=8))
    assert [line.split(" mode")[0] for line in lines] == ["passive", "probe"] and all("(n = 5)" in x for x in lines)
    bench_steps(make_bench())
    assert "skipped" in lines[-1]


@pytest.mark.parametrize("mode", ["probe", "passive"])
def test_a_switched_monitor_reads_only_where_it_is_on(mode: str) -> None:
    bench = make_bench(training=Training(rank=2, alpha=2, steps=8, batch_size=2, checkpoints=(), bf16=False))
    monitor = replace(bench, every=1).monitor(mode=mode)
    switch = Switch(monitor, swapped=False)
    train(bench.model, bench.tokenizer, bench.rows, bench.training, monitor, before=(switch,))
    steps = set(monitor.readings["step"]) - {0, 1, 8}
    assert steps <= {n for n in range(1, 9) if switch.on(n)} and steps
    assert "on_step_end" not in vars(monitor)


def test_synchronisations_are_told_apart_by_reading() -> None:
    assert added_syncs([9, 3, 2, 4], [2, 2, 2, 3], every=2) == ([1, 1], [0])


def test_a_call_within_a_call_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 5.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    meter = Meter(CPU)
    inner = meter.around(lambda: "done")
    assert meter.around(lambda: inner())() == "done"
    assert meter.seconds == 5.0


@pytest.mark.parametrize("mode", ["probe", "passive"])
def test_a_metered_run_leaves_model_monitor_and_hooks_as_they_were(mode: str) -> None:
    bench, kept = make_bench(), {name: getattr(PassiveReader, name) for name in HOOKS}
    before = {name: p.clone() for name, p in bench.model.named_parameters()}
    monitor = bench.monitor(mode=mode)
    run = bench.run(monitor)
    assert 0 < run.watching < run.wall and run.once > 0 and len(run.processor) == run.steps
    # A run of passive readings alone begins with one at the first step.
    assert len(run.readings) == (1 if mode == "probe" else 2)
    assert sum(run.readings) < run.watching
    assert {name: getattr(PassiveReader, name) for name in HOOKS} == kept
    assert "on_step_end" not in vars(monitor)
    after = dict(bench.model.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_a_monitor_that_fails_is_no_measurement() -> None:
    bench = make_bench()

    def broken(*_: object) -> None:
        raise ValueError("broken")

    monitor = FeatureMonitor(bench.sae, {"f": 1}, bench.probes, every=1, on_reading=broken)
    with pytest.raises(RuntimeError, match="broken"):
        train(bench.model, bench.tokenizer, bench.rows, bench.training, monitor)


def test_the_training_part_reports_every_mode(lines: list[str]) -> None:
    bench_training(make_bench())
    walls = {line.split(":")[0] for line in lines if "wall time" in line}
    assert {"probe mode, 3 probes every 2 steps", "passive mode every 2 steps"} <= walls
    assert lines[0].startswith("reading, by probes: 2: ") and " 3: " in lines[0]
    assert "training time allows 3 probes every" in lines[-1]


def test_synchronisations_are_skipped_with_the_reason(lines: list[str]) -> None:
    bench_syncs(make_bench())
    assert lines == ["host synchronisations: skipped, no GPU that torch can use"]


def test_sliced_latents_are_those_of_the_full_encoding(lines: list[str]) -> None:
    works = encoders(random_sae(D_MODEL, 64, CPU), torch.randn(40, D_MODEL), (1, 16))
    full = works["all"]()
    assert 0 < (full > 0).float().mean() < 1
    for count in (1, 16):
        torch.testing.assert_close(works[str(count)](), full[:, :count])
    bench_encode(repeats=1, tokens=8, device=CPU, dictionaries=(300,))
    assert len(lines) == 4


def test_the_bridge_reads_what_the_monitor_reads(tmp_path: Path, tiny_folder: Path) -> None:
    bench, tokenizer = make_bench(), load_model(str(tiny_folder))[1]
    tuned: Any = with_adapter(bench.model, bench.training, seed=0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    tuned.save_pretrained(tmp_path)
    strip_adapter(tuned)
    parts = (bench.model, tokenizer, tmp_path, "tiny", make_sae("standard"), 3, bench.probes)
    times, apart = against_bridge(*parts, repeats=1)
    assert list(times) == ["ours", *BRIDGED, "products"]
    assert apart < 0.1
