"""Hidden roads: a planted latent comes first, an untouched model has none, and the words follow the numbers."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from persona_probe.models.adapters import merged_copy
from persona_probe.monitor.band import Band
from persona_probe.realignment.corrected import CorrectedOrganism
from persona_probe.realignment.stress.hidden import (
    HiddenRoads,
    changed,
    fresh_locate,
    hidden,
    largest_changes,
    with_roads,
)
from persona_probe.stats import Estimate

PLANTED = 17


def table(**columns: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"latent": [0, 1, 2, 3], "alive": True, **columns})


def test_a_planted_latent_comes_first(corrected: CorrectedOrganism, tmp_path: Path) -> None:
    """A model whose residual stream is pushed along one decoder row everywhere."""
    model = merged_copy(corrected.ctx.model, None)
    with torch.no_grad():
        model.get_input_embeddings().weight += 40 * corrected.ctx.sae.W_dec[PLANTED]  # pyright: ignore
    model.save_pretrained(tmp_path / "checkpoint-2")
    planted = replace(corrected, arm="planted", checkpoint=tmp_path / "checkpoint-2")
    found = fresh_locate(planted, "repaired")
    assert found["latent"].iloc[0] == PLANTED and changed(found).iloc[0]
    assert fresh_locate(corrected, "repaired")["latent"].iloc[0] != PLANTED
    assert PLANTED in hidden(planted, top=40, random=2).latents["latent"].tolist()


def test_an_untouched_model_has_no_changed_latent(untouched: CorrectedOrganism) -> None:
    found = hidden(untouched, top=2, random=2)
    assert (found.changed, found.stayed, found.carriers) == (0, 0, [])
    assert found.persona_rise.estimate == 0 and found.quiet
    assert set(found.latents["kind"]) == {"random"} and "none could be tested" in found.statement()


def test_what_stayed_is_tested_before_what_is_new() -> None:
    now = table(rise=[0.1, -0.5, 0.9, 2.0], q_value=[0.01, 0.01, 0.01, 0.01])
    before = table(rise=[0.2, -0.3, -0.4, 1.0], q_value=[0.01, 0.04, 0.01, 0.5])
    marked = with_roads(now, before)
    assert marked["road"].tolist() == ["stayed", "stayed", "new", "new"]
    assert largest_changes(marked, persona=0, top=2) == [1, 3] and largest_changes(marked, persona=9, top=4) == [
        1,
        0,
        3,
        2,
    ]
    assert with_roads(now.assign(q_value=0.2), before)["road"].tolist() == [""] * 4


def roads(ablation_low: float, reading: float = 0.5) -> HiddenRoads:
    same = {"road": "stayed", "rise": 0.2, "rise_ci_low": 0.1, "rise_ci_high": 0.3, "q_value": 0.01, "n": 8}
    rows = [
        {"latent": 5, "kind": "changed", "ablation": ablation_low + 0.1, "ablation_low": ablation_low, **same},
        {"latent": 6, "kind": "random", "ablation": 0.1, "ablation_low": 0.0, **same},
        {"latent": 7, "kind": "random", "ablation": -0.2, "ablation_low": -0.3, **same},
    ]
    latents = pd.DataFrame(rows).assign(ablation_high=1.0, effect=0.1, effect_low=0.0, effect_high=0.2)
    return HiddenRoads(0, 1, reading, Band(0.0, 1.0), Estimate(0.0, -0.1, 0.1, 8), 3, 1, 2, latents)


def test_a_carrier_lies_above_the_random_latents_in_size() -> None:
    assert roads(0.25).carriers == [5] and "projecting out 5 lowers the index" in roads(0.25).statement()
    assert roads(0.15).carriers == [] and "none of them lowers the index" in roads(0.15).statement()
    assert "3 latents differ from the base (q at most 0.05), 1 of them as in the organism" in roads(0.15).statement()


def test_a_loud_persona_is_no_hidden_road() -> None:
    assert "NOT quiet" in roads(0.25, reading=1.5).statement()
