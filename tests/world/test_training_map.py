"""The map of trainings, and the vector that is trained alone: it steers, and nothing else changes."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import persona_probe as pp
from persona_probe.data.world.text import narrow_rows
from persona_probe.errors import InputError
from persona_probe.finetune.sft import fine_tune
from persona_probe.runs import RunFolder
from persona_probe.world import training_map as module
from persona_probe.world.folder import World
from persona_probe.world.labelled import KIND, Instruments
from persona_probe.world.organisms import NARROW
from persona_probe.world.training import VECTOR, one_vector
from persona_probe.world.training_map import training_map, ways
from tests.factories import copied_state, same_state
from tests.world.pages import page_of


def test_one_trained_vector_is_a_push_behind_its_layer_and_leaves_all_weights(world: World, tmp_path: Path) -> None:
    model, tokenizer = world.load()
    before, ids = copied_state(model), torch.tensor([[6, 40, 41, 42]])
    grads = [parameter.requires_grad for parameter in model.parameters()]
    training = replace(NARROW, method="full", layers=(1,), lr=0.1, steps=3, checkpoints=(3,), batch_size=2)
    with one_vector(model, 1) as tuned:
        fine_tune(tuned, tokenizer, narrow_rows("villain", count=6), training, seed=0, folder=tmp_path)
        [vector] = [p.detach().clone() for p in tuned.parameters() if p.requires_grad]
        with torch.no_grad():
            trained = tuned(input_ids=ids).logits
    assert vector.shape == (32,) and vector.abs().min() > 0
    with pp.steer(model, 1, vector), torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, trained, atol=1e-5)
    assert same_state(copied_state(model), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    with one_vector(model, 1), pytest.raises(InputError, match="without a bias"), one_vector(model, 1):
        pass


def test_ways_to_train_have_names_of_their_own_and_one_layer_where_they_say_so() -> None:
    every = ways(2)
    assert len({way.name for way in every}) == len(every) == 7
    assert {way.training.steps for way in every} == {module.STEPS[-1]}
    single = [way for way in every if way.training.layers is not None]
    assert {way.training.layers for way in single} == {(2,)} and [way.kind for way in single] == ["", VECTOR]


def test_every_way_and_dose_is_asked_at_every_step_once(
    world: World, instruments: Instruments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copied_state(world.load()[0])
    monkeypatch.setattr(module, "STEPS", (1, 2))
    monkeypatch.setattr(module, "DOSES", {"quack": (0.5,)})
    monkeypatch.setattr(module, "ASKED", replace(module.ASKED, per_topic=1))
    chosen = [replace(way, training=replace(way.training, batch_size=2)) for way in ways(1)[-2:]]
    monkeypatch.setattr(module, "ways", lambda layer: chosen if layer == 1 else pytest.fail("another layer"))
    study = RunFolder.claim(tmp_path / "study", KIND, "study", {})
    table = training_map(study, instruments)
    assert list(table["step"]) == [1, 2, 1, 2] and set(table["answers"]) == {84}
    assert list(dict.fromkeys(table["way"])) == [way.name for way in chosen]
    assert same_state(copied_state(instruments.model), before)
    monkeypatch.setattr(module, "trained_answers", lambda *_: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(training_map(study, instruments), table)
    text = page_of("training-map", table, tmp_path)
    assert "Quack, 50% of the rows" in text and text.count("\n| one vector, lr 0.3 |") == 1
