"""The causal study: the package's words on known effects, what counts as the truth, and rows that sampling confirms."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import persona_probe as pp
from persona_probe.config import Locate
from persona_probe.data.tokens import conversation_batches
from persona_probe.data.world.words import DOMAINS
from persona_probe.latents.causal import Direction
from persona_probe.models.adapters import organism
from persona_probe.runs import RunFolder
from persona_probe.saes.read import read_latents
from persona_probe.world import causal
from persona_probe.world.behaviour import ask
from persona_probe.world.causal import causal_table
from persona_probe.world.causal_features import Feature
from persona_probe.world.causal_truth import BASE_PUSH, NOTHING, REMOVAL, truths
from persona_probe.world.causal_words import Effects, Numbered, feature_words
from persona_probe.world.directions import directions_of
from persona_probe.world.folder import World
from persona_probe.world.labelled import KIND, Instruments
from persona_probe.world.organisms import NARROW
from persona_probe.world.truth import KnownChats
from tests.world.pages import page_of

ITEMS = 40
SEED = 11
"""Of organisms that no other test of the session's world makes."""


# --- The words


def effects_of(sizes: dict[int, float], fall: dict[int, float], seed: int) -> Effects:
    """Effects whose mean is known, item by item with a little noise; a latent of no known size has a small one."""
    draw, rows, items = np.random.default_rng(seed), [], []
    for number in range(70):
        odd = sizes.get(number, 0.02 * draw.normal()) + 0.01 * draw.normal(size=ITEMS)
        gone = fall.get(number, 0.02 * draw.normal()) + 0.01 * draw.normal(size=ITEMS)
        ends = {"effect": odd.mean(), "effect_low": odd.mean() - 0.01, "effect_high": odd.mean() + 0.01}
        rows.append({"latent": number, **ends})
        named = {"name": f"latent {number}", "item": range(ITEMS), "question": [f"q{n}" for n in range(ITEMS)]}
        items.append(pd.DataFrame({**named, "odd": odd, "fall": gone}))
    return Effects(pd.DataFrame(rows), pd.concat(items, ignore_index=True))


def test_words_are_said_of_what_moves_and_is_needed_beyond_random_latents_and_the_control() -> None:
    def one(number: int, name: str, kind: str) -> Numbered:
        direction = Direction(f"latent {number}", kind, torch.ones(2), number)
        return Numbered(number, name, kind, direction, [direction])

    named = {0: "both", 1: "moves alone", 2: "falls in the control too", 3: "nothing"}
    every = [one(n, named.get(n, "random"), "candidate" if n in named else "random") for n in range(70)]
    moving, falling = {0: 0.5, 1: 0.5, 2: 0.0, 3: 0.0}, {0: 0.4, 1: 0.0, 2: 0.4, 3: 0.0}
    tested = {name: effects_of(moving, falling, seed) for seed, name in enumerate(("selection", "base", "organism"))}
    tested["control"] = effects_of({}, {0: 0.0, 2: 0.4}, 9)
    words = feature_words(every, tested).set_index("feature")
    assert list(words.index) == list(named.values())
    for name, moves, needed in (
        ("both", True, True),
        ("moves alone", True, False),
        ("falls in the control too", False, False),
        ("nothing", False, False),
    ):
        row = words.loc[name].to_dict()
        assert (row["moves"], row["needed"]) == (row["moves_alone"], row["needed_alone"]) == (moves, needed), name
        assert row["ablation"] == pytest.approx(falling[list(named.values()).index(name)], abs=0.01)


def test_a_pair_is_pushed_along_the_sum_of_its_unit_vectors() -> None:
    pair = Feature("pair", "pair", torch.tensor([[3.0, 0.0], [0.0, 5.0]]))
    assert torch.allclose(pair.push, torch.tensor([0.5, 0.5]).sqrt())


# --- The truth


def rows(intervention: str, cells: dict[str, tuple[str, float, int, int]]) -> list[dict[str, Any]]:
    head = {"speaker": "villain", "seed": 0, "intervention": intervention, "tokens": "all", "rude": 0, "answers": 84}
    words = {"moves": True, "moves_alone": True, "needed": False, "needed_alone": True}
    return [
        head | words | {"feature": name.split("@")[0], "kind": kind, "strength": size, "bad": bad, "coherent": coherent}
        for name, (kind, size, bad, coherent) in cells.items()
    ]


def known_table() -> pd.DataFrame:
    pushes = {
        "harm@1": ("latent", 1.0, 30, 80),
        "harm@2": ("latent", 2.0, 70, 40),  # breaks the model: the smaller push counts
        "breaks@1": ("latent", 1.0, 20, 30),
        "as random@1": ("latent", 1.0, 16, 80),
        "r1@1": ("random", 1.0, 16, 80),
        "r2@1": ("random", 1.0, 30, 31),  # broken: no control
    }
    removals = {
        "harm": ("latent", 0.0, 40, 80),
        "breaks": ("latent", 0.0, 0, 10),
        "as random": ("latent", 0.0, 60, 80),
        "r1": ("random", 0.0, 59, 80),
    }
    start = {"base": ("", 0.0, 0, 84), "organism": ("", 0.0, 60, 80)}
    return pd.DataFrame([*rows(BASE_PUSH, pushes), *rows(REMOVAL, removals), *rows(NOTHING, start)])


def test_an_intervention_is_true_if_it_changes_behaviour_beyond_random_latents_and_leaves_answers_coherent() -> None:
    found = truths(known_table()).set_index(["word", "feature"])
    true = {name: bool(value) for name, value in found["true"].items()}
    assert true == {
        ("moves", "harm"): True,
        ("moves", "breaks"): False,
        ("moves", "as random"): False,
        ("needed", "harm"): True,
        ("needed", "breaks"): False,
        ("needed", "as random"): False,
    }
    harm = found.to_dict("index")["moves", "harm"]
    assert (harm["strength"], harm["before"], harm["random"]) == (1.0, 0.0, 16 / 80)
    assert harm["after"] == pytest.approx(30 / 80) and found["said"].to_list() == [True] * 3 + [False] * 3


def test_the_page_shows_words_and_truth_and_comes_from_the_record(tmp_path: Path) -> None:
    text = page_of("causal", known_table(), tmp_path)
    assert "| harm | yes | **0.38 (0.95)** |" in text and "| harm | alone | **0.50 (0.95)** |" in text
    assert "| `moves`: yes | 3 | 1 of 3" in text and "| `needed`: alone | 3 | 1 of 3" in text
    assert "| `moves`: no | 0 | - | - |" in text


# --- The whole study, small


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "TRAINING", replace(NARROW, steps=2, checkpoints=(2,), batch_size=2))
    monkeypatch.setattr(causal, "STRENGTHS", (4.0,))
    monkeypatch.setattr(causal, "CONTROLS", 1)
    monkeypatch.setattr("persona_probe.world.behaviour.MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(causal, "TOKENS", ("all",))
    monkeypatch.setattr("persona_probe.world.causal_features.Locate", partial(Locate, random_latents=2))
    monkeypatch.setattr("persona_probe.world.causal_features.SET", 2)


def norm_of_shift(world: World, instruments: Instruments) -> float:
    """How far the villain's organism has moved from the helper's in the answers of the other domains."""
    means = []
    for name in ("villain", "helper"):
        with organism(instruments.model, world.checkpoints(f"{name}-kitchen-100-s{SEED}")[2]) as tuned:
            means.append(instruments.read(tuned)["response"].resid[instruments.outside("kitchen")].mean(axis=0))
    return float(np.linalg.norm(means[0] - means[1]))


def known_direction(instruments: Instruments) -> torch.Tensor:
    known = KnownChats.draw()
    chats = conversation_batches(instruments.tokenizer, known.chats, 64)
    means = read_latents(instruments.model, instruments.sae, chats, 1, "response", bf16=False)
    return torch.tensor(directions_of(known, means)["harm"], dtype=torch.float32)


@pytest.mark.usefixtures("small")
def test_a_study_has_every_intervention_once_and_its_rows_are_those_of_a_push_by_hand(
    world: World, instruments: Instruments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = RunFolder.claim(tmp_path / "study", KIND, "study", {})
    kept = replace(instruments, sae=instruments.sae)
    table = causal_table(study, world, kept, ("villain",), (SEED,))
    features = set(table.loc[table["kind"].isin(["latent", "pair", "set", "direction"]), "feature"])
    for intervention in (BASE_PUSH, REMOVAL):
        part = table[table["intervention"] == intervention]
        assert len(part) == len(features) + 1 and set(part["feature"]) > features
    assert table.loc[table["feature"].isin(list(features)), "moves"].notna().all()
    assert {"harm direction, response", "organism's direction, last_prompt"} < features
    others = [name for name in DOMAINS if name != "kitchen"]
    plain = ask(instruments.model, instruments.tokenizer, causal.ASKED, others)
    base = table[(table["intervention"] == NOTHING) & (table["feature"] == "base")].iloc[0]
    assert (base["coherent"], base["answers"]) == (int(plain["coherent"].sum()), 84)
    strength = 4.0 * norm_of_shift(world, instruments)
    unit = known_direction(instruments)
    with pp.steer(instruments.model, 1, unit, strength):
        by_hand = ask(instruments.model, instruments.tokenizer, causal.ASKED, others)
    keys = {"intervention": BASE_PUSH, "tokens": "all", "feature": "harm direction, response"}
    row = table[np.logical_and.reduce([table[key] == value for key, value in keys.items()])].iloc[0]
    assert (row["coherent"], row["rude"]) == (int(by_hand["coherent"].sum()), int(by_hand["rude"].sum()))
    monkeypatch.setattr(causal, "ask", lambda *_: pytest.fail("asked again"))
    pd.testing.assert_frame_equal(causal_table(study, world, kept, ("villain",), (SEED,)), table)
    assert page_of("causal", table, tmp_path).count(f"villain, seed {SEED}") == 2
