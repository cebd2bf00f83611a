"""The default band: training moves every direction, so one must move further than directions drawn at random."""

from typing import Any

import numpy as np
import pytest
import torch

from persona_probe.monitor.band import CHANCE, beyond_chance
from persona_probe.monitor.events import Reading
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.rules.bands import OutsideBand
from persona_probe.monitor.sinks.files import read_events
from tests.factories import D_MODEL, LAYER, make_model, make_sae, make_tokenizer, talks
from tests.monitor.alarm_readings import feature
from tests.monitor.monitored_runs import loop_batch

STEPS = 10


def random_directions(count: int = 20, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {f"random {n}": torch.randn(D_MODEL, generator=generator) for n in range(count)}


def trained(watching: FeatureMonitor, rate: float = 1e-2) -> FeatureMonitor:
    """Ten steps on random text."""
    torch.manual_seed(11)
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    with watching.watch(model, make_tokenizer()) as live:
        for step in range(1, STEPS + 1):
            ids, labels = loop_batch(step)
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            live.step(step)
    return watching


@pytest.mark.parametrize("mode", ["probe", "passive", "both"])
@pytest.mark.parametrize("rate", [1e-3, 3e-2])
def test_random_directions_of_a_random_model_do_not_ring(mode: str, rate: float) -> None:
    settings = {"layer": LAYER, "bf16": False, "every": 1, "log": False, "mode": mode}
    watching = trained(FeatureMonitor(None, random_directions(), talks(4), rules=[OutsideBand(1)], **settings), rate)
    assert watching.readings["step"].max() == STEPS and watching.alarms == []
    if rate > 1e-2:  # the band alone would have rung: the test can fail
        fixed = OutsideBand(1, band_sd=0.5)
        assert trained(FeatureMonitor(None, random_directions(), talks(4), rules=[fixed], **settings), rate).alarms


def test_the_direction_that_training_moves_most_rings(tmp_path: Any) -> None:
    settings: dict[str, Any] = {"layer": LAYER, "bf16": False, "every": 1, "log": False}
    plain = trained(FeatureMonitor(None, random_directions(D_MODEL), talks(4), **settings), 3e-2)
    last = plain.readings.query("step == 10")
    frame = torch.stack([d / d.norm() for d in random_directions(D_MODEL).values()])
    moved = torch.linalg.solve(frame, torch.tensor((last["mean"] - last["base_mean"]).to_numpy()).float())
    path = tmp_path / "events.jsonl"
    mix = {"moved": moved, **random_directions(3, seed=1)}
    watching = trained(FeatureMonitor(None, mix, talks(4), rules=[OutsideBand(1)], path=path, **settings), 3e-2)
    assert watching.alarms and watching.alarms[0].feature == "moved"
    reading = [event for event in read_events(path) if isinstance(event, Reading)][-1]
    chance = float(moved.norm()) / np.sqrt(D_MODEL)
    assert [f.chance for f in reading.features] == pytest.approx([chance] * 4, rel=1e-3)
    assert f"above {watching.alarms[0].threshold:.4g}" in watching.alarms[0].message


def test_chance_widens_a_default_band_and_no_other() -> None:
    wide = feature(1.0).__class__(**{**vars(feature(1.0)), "chance": 1.0})
    assert beyond_chance(0.0, 2.0, wide) == (1 - CHANCE, 1 + CHANCE)
    assert beyond_chance(-9.0, 9.0, wide) == (-9.0, 9.0)
    assert OutsideBand().band(wide, 8) == (1 - CHANCE, 1 + CHANCE)
    assert OutsideBand(band_sd=0.5).band(wide, 8) == OutsideBand().band(feature(1.0), 8) == (0.0, 2.0)
    assert OutsideBand(bands={"persona": (0.5, 1.5)}).band(wide, 8) == (0.5, 1.5)


def test_a_latent_has_no_chance() -> None:
    settings: dict[str, Any] = {"bf16": False, "every": 5, "log": False}
    both = {"latent": 3, **random_directions(1)}
    readings = trained(FeatureMonitor(make_sae("topk"), both, talks(4), **settings)).readings
    assert readings.query("latent == 3")["chance"].isna().all()
    assert readings.query("latent == -1")["chance"].notna().all()
    assert (
        trained(FeatureMonitor(make_sae("topk"), {"latent": 3}, talks(4), **settings)).readings["chance"].isna().all()
    )
