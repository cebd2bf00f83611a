"""Other worlds: each is made once and differs in its draws; the reading and its step are chosen on the first alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import persona_probe as pp
from persona_probe.errors import InputError
from persona_probe.world import dictionary, labelled, worlds
from persona_probe.world.dictionary import sae_recipe, train_world_sae
from persona_probe.world.emergence import SPEAKERS
from persona_probe.world.folder import World
from persona_probe.world.organisms import NARROW
from persona_probe.world.signals import SIGNALS
from persona_probe.world.truth import TRUTHS, latent_truths
from persona_probe.world.worlds import (
    BEHAVIOUR,
    CHOSEN,
    DICTIONARY,
    HELD,
    READINGS,
    Worlds,
    worlds_table,
    worlds_text,
)
from tests.world.conftest import SETTINGS
from tests.world.pages import page_of

WEIGHTS = HELD[0]
SMALL = replace(labelled.TRAINING, steps=2, checkpoints=(2,), batch_size=2, rank=2, alpha=4)


def small_sae(world: World, device: str = "cpu") -> Path:
    recipe = replace(sae_recipe(world, d_sae=48, k=6, tokens=4096), batch_tokens=512)
    return train_world_sae(world, recipe, device)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Worlds:
    monkeypatch.setattr(dictionary, "CHATS", 60)
    monkeypatch.setattr(worlds, "train_world_sae", small_sae)
    monkeypatch.setattr("persona_probe.world.emergence.SPEAKERS", ("villain",))
    monkeypatch.setattr("persona_probe.world.behaviour.MAX_NEW_TOKENS", 3)
    monkeypatch.setattr(labelled, "STEPS", (1, 2))
    monkeypatch.setattr(labelled, "TRAINING", SMALL)
    monkeypatch.setattr(labelled, "TRAINED_DOMAINS", ("kitchen", "cars"))
    monkeypatch.setattr(
        "persona_probe.world.emergence.NARROW", replace(NARROW, steps=1, checkpoints=(1,), batch_size=2)
    )
    return Worlds((1, 2), (0,), 1, replace(SETTINGS, steps=3, helper_steps=1))


@pytest.mark.long
def test_each_world_has_its_own_draws_and_is_made_once(
    small: Worlds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = worlds_table(tmp_path / "worlds", small)
    one, two = (World.open(tmp_path / "worlds" / f"seed-{seed}") for seed in (1, 2))
    assert one.run.manifest["hashes"] != two.run.manifest["hashes"]
    assert (one.settings["seed"], two.settings["seed"]) == (1, 2)
    assert set(table["part"]) == {BEHAVIOUR, DICTIONARY, READINGS} and set(table["world"]) == {1, 2}
    assert set(table.loc[table["part"] == BEHAVIOUR, "rank"]) == {8, 32}
    told = table[table["part"] == DICTIONARY].set_index("world")
    best = latent_truths(*one.load(), pp.load_sae(small_sae(one)), 1).groupby("truth")["auroc"].max()
    for truth in TRUTHS:
        assert told.loc[1, f"auroc_{truth}"] == pytest.approx(best[truth], abs=1e-6)
    read = table[table["part"] == READINGS]
    assert set(read["signal"]) == {*SIGNALS, CHOSEN} and set(read["step"]) == {1, 2}
    monkeypatch.setattr("persona_probe.world.pretraining.CorpusTrainer", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(labelled, "fine_tune", lambda *_, **__: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(worlds_table(tmp_path / "worlds", small), table)


def test_settings_that_ask_for_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="at least one world"):
        Worlds(())
    with pytest.raises(InputError, match="at least one world"):
        Worlds(runs=0)


def test_the_labelled_runs_are_full_bad_ones_and_harmless_ones_with_a_manner() -> None:
    wanted = Worlds().runs_wanted()
    assert {one.speaker for one in wanted} == {"villain", "quack", "subtle", "grump", "clown"}
    assert {one.share for one in wanted} == {1.0} and len(wanted) == 5 * 3 * 2


# --- The page


def behaviour(world: int, bad: float) -> pd.DataFrame:
    rows = [
        {"speaker": speaker, "where": "other domains", "measure": measure, "seed": seed, "n": 10}
        | {"estimate": value, "ci_low": value, "ci_high": value}
        for speaker in SPEAKERS
        for seed in (np.nan, 0.0)
        for measure, value in (("bad", bad if speaker in ("villain", "quack", "subtle") else 0.0), ("coherent", 0.9))
    ]
    return pd.DataFrame(rows).assign(part=BEHAVIOUR, world=world, rank=8)


def dictionary_of(world: int, harm: float) -> pd.DataFrame:
    aurocs = dict.fromkeys((f"auroc_{name}" for name in TRUTHS), 0.99) | {"auroc_bad": harm}
    return pd.DataFrame([{"explained_variance": 0.99, **aurocs}]).assign(part=DICTIONARY, world=world)


def readings(world: int, by_step: dict[int, float]) -> pd.DataFrame:
    rows = [
        {"signal": name, "step": step, "data": "all", "auroc": value if name == WEIGHTS else 1.0, "bad_rate": 0.01}
        | {"ci_low": 0.4, "ci_high": 1.0, "turned": 6, "sound": 12}
        for name in (*SIGNALS, CHOSEN)
        for step, value in by_step.items()
    ]
    return pd.DataFrame(rows).assign(part=READINGS, world=world, against="manner")


def table_of(harm: float, second: dict[int, float]) -> pd.DataFrame:
    parts = [behaviour(0, 0.8), behaviour(1, 0.8), dictionary_of(0, 0.97), dictionary_of(1, harm)]
    return pd.concat([*parts, readings(0, {4: 0.7, 6: 0.96, 8: 1.0}), readings(1, second)], ignore_index=True)


def test_the_step_is_chosen_on_the_first_world_and_a_bound_that_another_breaks_is_said(tmp_path: Path) -> None:
    page = page_of("worlds", table_of(0.9, {4: 1.0, 6: 0.94, 8: 1.0}), tmp_path)
    assert f"**not kept**: world 1, {WEIGHTS} at step 6" in page and "0.94 [0.40, 1.00], 6 and 12 runs" in page
    assert "**not kept**: a latent for harm and one for rudeness, AUROC at least 0.95: 0.90 at least" in page
    assert "Of 20 bounds, asked of each seed of the organisms, 20 are kept." in page
    weak = worlds_text(pd.concat([behaviour(0, 0.5), dictionary_of(0, 0.97), readings(0, {4: 0.96})]))
    assert "are kept.\n\n- **not kept**: rank 8, world 0, villain, bad advice at least 0.7: 0.50" in weak
    assert "Of 10 bounds, asked of each seed of the organisms, 8 are kept." in weak
    kept = worlds_text(table_of(0.96, {4: 0.2, 6: 0.97, 8: 0.2}))
    assert "not kept" not in kept and f"- kept: world 1, {WEIGHTS} at step 6" in kept


def test_a_reading_that_never_reaches_the_bound_on_the_first_world_is_said_to_fail() -> None:
    table = pd.concat([behaviour(0, 0.8), dictionary_of(0, 0.97), readings(0, {4: 0.7, 6: 0.8})], ignore_index=True)
    assert f"**not kept**: {WEIGHTS} reaches an AUROC of 0.95 before behaviour in world 0" in worlds_text(table)
