"""The dry run's times against stages that were measured, and what a run says before it starts."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_probe.config import StudyConfig, load_config
from persona_probe.study.plan import speed
from persona_probe.study.plan.outlook import outlook
from persona_probe.study.plan.plan import dry_run

FOLDER = Path(__file__).parents[3] / "finetune_configs"
MEASURED: dict[str, Any] = json.loads(Path(__file__).with_name("stage_seconds.json").read_text(encoding="utf-8"))
RUNS: dict[str, Any] = MEASURED["runs"]
PARTS = (
    ({"induce"}, {"induce"}),
    ({"locate"}, {"locate", "cards"}),
    ({"track", "realign"}, {"track", "realign", "harm and register"}),
    ({"evaluate"}, {"samples", "judge"}),
    ({"report"}, {"report"}),
)
"""Stages of the plan, and what a manifest counts for them."""


@pytest.mark.parametrize("tflops", MEASURED["tflops_per_thread"])
@pytest.mark.parametrize("name", RUNS)
def test_times_are_within_half_of_what_was_measured(name: str, tflops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RUNS[name]
    flops = run["threads"] * tflops * 1e12
    monkeypatch.setattr(speed, "layer_speed", lambda _mixed: flops)
    plan = dry_run(load_config(FOLDER / f"{run['config']}.yaml", StudyConfig))
    times = {work.stage: plan.stage_seconds(work) for work in plan.stages}
    pairs = [
        (sum(times[stage] for stage in planned), sum(run["seconds"].get(stage, 0.0) for stage in counted))
        for planned, counted in PARTS
        if counted & run["seconds"].keys()
    ]
    assert 1 / 1.5 < sum(planned for planned, _ in pairs) / sum(counted for _, counted in pairs) < 1.5
    assert all(1 / 2 < planned / counted < 2 for planned, counted in pairs)


def test_the_speed_of_a_layer_does_not_hang_on_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "BUDGET_S", 0.1)
    before, layer = torch.get_num_threads(), torch.nn.TransformerEncoderLayer
    alone, forward = speed.layer_speed(False), layer.forward

    def interrupted(*args: Any, **named: Any) -> Any:
        time.sleep(0.3)  # another process has the core
        return forward(*args, **named)

    monkeypatch.setattr(layer, "forward", interrupted)
    assert speed.layer_speed(False) > alone / 2
    assert torch.get_num_threads() == before


def test_a_run_says_what_it_is_about_to_do() -> None:
    config = load_config(FOLDER / "demo.yaml", StudyConfig)
    lines = outlook(config, "cpu", ["induce"], "runs/demo/report.html")
    text, stages = " ".join(" ".join(lines).split()), [line.split() for line in lines[1:] if line[:1].islower()][:6]
    assert [words[0] for words in stages] == ["induce", "locate", "track", "realign", "evaluate", "report"]
    assert stages[0][1] == "done" and not any({"done", "unknown"} & set(words[1:3]) for words in stages[1:])
    assert all(len(line) <= 80 for line in lines[:-1]), "a terminal of 80 columns"
    assert "64 random latents" in text and "realigned_benign" in text and "answers of 7 models" in text
    assert "runs/demo/report.html" in lines[-1] and "about " in lines[-2]


def test_where_nothing_is_known_of_a_model_there_are_no_times(local: StudyConfig) -> None:
    lines = outlook(replace(local, model="owner/nobody-knows-it"), "cpu", [], "report.html")
    stages = [line.split() for line in lines[1:] if line[:1].islower()]
    assert [words[1] for words in stages] == ["unknown"] * 6 and "about" not in lines[-2]
