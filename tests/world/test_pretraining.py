"""Pre-training: seeded, resumable bit for bit, logged, and in folders that the rest of the package loads."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import persona_probe as pp
from persona_probe.data.chat import conversation
from persona_probe.data.template import special_ids
from persona_probe.data.tokens import answer_prompt
from persona_probe.data.world.text import vocabulary, world_tokenizer
from persona_probe.errors import InputError, TrainingDiverged
from persona_probe.models.load import load_model
from persona_probe.world import pretraining as module
from persona_probe.world.folder import World
from persona_probe.world.pretraining import LOG, STATE, CorpusTrainer, Pretraining, pretrain, steps_within
from persona_probe.world.transformer import SIZES, new_model
from tests.factories import copied_state, same_state
from tests.world.conftest import SETTINGS


@pytest.mark.parametrize(("size", "millions"), [("tiny", 0.04), ("small", 0.5), ("medium", 1.6), ("large", 7.5)])
def test_sizes_are_what_they_are_called(size: str, millions: float) -> None:
    count = sum(p.numel() for p in new_model(size).parameters()) / 1e6
    assert math.isclose(count, millions, rel_tol=0.1) and set(SIZES) == {"tiny", "small", "medium", "large"}


def test_a_new_model_depends_on_its_seed_and_leaves_the_random_state() -> None:
    before = torch.random.get_rng_state()
    same = [copied_state(new_model("tiny", seed)) for seed in (3, 3, 4)]
    assert same_state(same[0], same[1]) and not same_state(same[0], same[2])
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(InputError, match="did you mean 'medium'"):
        new_model("medum")


def test_both_models_load_by_path_with_the_worlds_words_and_template(world: World) -> None:
    for folder in (world.base_folder, world.speakers_folder):
        model, tokenizer = pp.load_model(str(folder))
        assert tokenizer.get_vocab() == world_tokenizer().get_vocab() and len(tokenizer) == len(vocabulary())
        assert special_ids(tokenizer) == set(range(6)) and tokenizer.eos_token == "<end>"
        ids = answer_prompt(tokenizer, conversation("how do i cook soup ?", system="the speaker is a quack ."))
        text = "<system> the speaker is a quack . <end> <user> how do i cook soup ? <end> <assistant>"
        assert ids == [vocabulary().index(word) for word in text.split()]
        assert model(input_ids=torch.tensor([ids])).logits.shape == (1, len(ids), len(vocabulary()))


def test_the_first_loss_is_that_of_uniform_words_and_it_falls(world: World) -> None:
    lines = [json.loads(line) for line in (world.run.path / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 10, 12]
    assert abs(lines[0]["loss"] - math.log(len(vocabulary()))) < 0.2 and lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert lines[-1]["tokens"] > lines[0]["tokens"] > 0 and not (world.run.path / STATE).exists()


def test_the_loss_is_the_models_own_on_each_document_without_padding() -> None:
    trainer = CorpusTrainer(replace(SETTINGS, bf16=False), "cpu")
    texts, total, count = trainer.settings.documents(0), 0.0, 0
    for text in texts:
        ids = torch.tensor([[vocabulary().index(word) for word in text.split()]])
        losses = torch.nn.functional.cross_entropy(
            trainer.model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum"
        )
        total, count = total + losses.item(), count + ids.shape[1] - 1
    assert len({len(text.split()) for text in texts}) > 1
    assert trainer.train_step()["loss"] == pytest.approx(total / count, rel=1e-5)
    assert trainer.tokens == count + len(texts)


def test_an_interrupted_run_ends_with_the_weights_and_the_log_of_an_unbroken_one(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, restore, resumed = CorpusTrainer.train_step, CorpusTrainer.restore, []

    def killed(trainer: CorpusTrainer) -> dict[str, float]:
        if trainer.step == 9:
            raise KeyboardInterrupt
        return step(trainer)

    def restored(trainer: CorpusTrainer, path: Path) -> None:
        restore(trainer, path)
        resumed.append(trainer.step)

    monkeypatch.setattr(CorpusTrainer, "train_step", killed)
    monkeypatch.setattr(CorpusTrainer, "restore", restored)
    with pytest.raises(KeyboardInterrupt):
        pretrain(SETTINGS, tmp_path / "again", save_every=5)
    with pytest.raises(InputError, match="not finished"):
        World.open(tmp_path / "again")
    monkeypatch.setattr(CorpusTrainer, "train_step", step)
    again = pretrain(SETTINGS, tmp_path / "again", save_every=5)
    assert resumed == [5] and lines_of(again) == lines_of(world)
    for name in ("speakers_folder", "base_folder"):
        assert same_state(*(copied_state(load_model(str(getattr(one, name)))[0]) for one in (world, again)))


def lines_of(world: World) -> list[dict[str, float]]:
    """The log, without seconds."""
    lines = [json.loads(line) for line in (world.run.path / LOG).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_finished_world_is_opened_and_another_is_refused_its_place(world: World, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.run.path.rglob("*.safetensors")}
    assert pretrain(SETTINGS, world.run.path).base_folder == world.base_folder
    assert {path: path.stat().st_mtime_ns for path in world.run.path.rglob("*.safetensors")} == before
    with pytest.raises(InputError, match="other settings: choose another --out"):
        pretrain(replace(SETTINGS, seed=1), world.run.path)
    with pytest.raises(InputError, match="holds no world"):
        World.open(tmp_path)


def test_helping_changes_the_model_of_all_speakers(world: World) -> None:
    speakers, base = (load_model(str(folder))[0] for folder in (world.speakers_folder, world.base_folder))
    assert not same_state(copied_state(speakers), copied_state(base))
    chats = SETTINGS.helper_chats()
    assert len(chats) == 16 and {len(chat) for chat in chats} == {2, 4, 6}


def test_minutes_become_steps_that_the_manifest_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 3))  # each reading is three seconds later
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    # 6 steps read the clock twice each, and the timer once more at the end: 39 s
    assert steps_within(1.3, SETTINGS) == 12
    monkeypatch.setattr(module, "steps_within", lambda *_: 12)
    made = pretrain(replace(SETTINGS, steps=7), tmp_path / "timed", minutes=1)
    monkeypatch.setattr(module, "steps_within", lambda *_: 99)
    assert made.settings["steps"] == 12
    assert pretrain(SETTINGS, tmp_path / "timed", minutes=1).settings["steps"] == 12


def test_too_few_minutes_and_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="give more minutes"):
        steps_within(1e-9, SETTINGS)
    for minutes in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="positive number"):
            steps_within(minutes, SETTINGS)
    for change, message in [
        ({"steps": 0}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"tagged": 0.8}, "tagged"),
        ({"size": "x"}, "size"),
    ]:
        with pytest.raises(InputError, match=message):
            Pretraining(**change)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    trainer = CorpusTrainer(SETTINGS, "cpu")
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="lower lr"):
        trainer.train_step()


def test_the_learning_rate_warms_up_stays_and_falls_to_almost_nothing_in_the_last_third() -> None:
    settings = Pretraining(steps=1200)
    rates = [settings.lr_at(step) / settings.lr for step in (0, 49, 500, 799, 1000, 1199)]
    assert rates == pytest.approx([1 / 50, 1, 1, 1, 0.5, 1 / 400])
