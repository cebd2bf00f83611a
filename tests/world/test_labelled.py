"""Labelled runs: what is read along a run is what its checkpoint says, each is made once, and words are as known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from persona_probe.data.world.words import DOMAINS
from persona_probe.errors import InputError
from persona_probe.latents.weights import WeightsAlong
from persona_probe.models.adapters import merged_copy, organism
from persona_probe.runs import RunFolder
from persona_probe.world import labelled
from persona_probe.world.behaviour import Asking, ask
from persona_probe.world.directions import PAIRS, POSITIONS
from persona_probe.world.folder import World
from persona_probe.world.labelled import Instruments, LabelledRun, make_runs, read_arrays, read_runs
from persona_probe.world.organisms import WorldOrganism, make_organisms
from persona_probe.world.signals import SIGNALS, signal_table, true_latents
from persona_probe.world.verdict_words import word_table, word_text

TRAINING = replace(labelled.TRAINING, steps=3, checkpoints=(3,), rank=2, alpha=4)
RUN = WorldOrganism("villain", "pets", rows=16, training=TRAINING)


@pytest.fixture(scope="module")
def study(instruments: Instruments, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = RunFolder.claim(tmp_path_factory.mktemp("labelled") / "study", labelled.KIND, "study", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelled, "STEPS", (1, 3))
        make_runs(run, instruments, [RUN])
    return run


def test_the_last_reading_of_a_run_is_that_of_its_checkpoint(
    world: World, instruments: Instruments, study: RunFolder
) -> None:
    [run] = read_runs(study)
    [name] = make_organisms(world, [RUN], ["like-the-labelled-one"])
    with organism(instruments.model, world.checkpoints(name)[3]) as tuned:
        means, asked = instruments.read(tuned), ask(tuned, instruments.tokenizer, Asking(1, seed=3), list(DOMAINS)[:7])
        outside = instruments.outside("pets")
        for where in POSITIONS:
            for kind, values in (("latents", means[where].mean), ("residual", means[where].resid)):
                told = run.readings[f"{kind}/{where}"]
                assert told.shape[0] == 2 and np.allclose(told[-1], values[outside].mean(axis=0), atol=1e-5)
        items = instruments.score(tuned)
    assert np.allclose(items.loc[items["category"] != "pets", "value"], run.items["value"], atol=1e-5)
    last = run.answers.iloc[-1]
    assert (last["answers"], last["rude"]) == (84, int(asked["rude"].sum()))
    assert last["bad"] == int((asked["bad"] & asked["coherent"]).sum())
    assert world.organism(name)["losses"] == run.losses


def test_the_weight_signals_are_those_of_the_merged_weights(
    world: World, instruments: Instruments, study: RunFolder
) -> None:
    [run] = read_runs(study)
    [name] = make_organisms(world, [RUN], ["like-the-labelled-one"])
    before = instruments.model.state_dict()
    merged = merged_copy(instruments.model, world.checkpoints(name)[3]).state_dict()
    change = {key: merged[key] - before[key] for key in before}
    norm = sum(float(delta.square().sum()) for delta in change.values()) ** 0.5
    assert run.readings["weight_norm"][-1] == pytest.approx(norm, rel=1e-3)
    writing = [
        key for key in change if key.endswith(("o_proj.weight", "down_proj.weight")) and int(key.split(".")[2]) < 2
    ]
    vectors = [torch.linalg.svd(change[key])[0][:, 0].numpy() for key in writing]
    same = [abs(float(a @ b)) for a, b in zip(vectors, run.readings["written"][-1], strict=True)]
    assert min(same) > 0.99


def test_a_monitor_reads_the_same_weights_along_harm(world: World, instruments: Instruments, study: RunFolder) -> None:
    [name] = make_organisms(world, [RUN], ["like-the-labelled-one"])
    harm = read_arrays(study.path / labelled.BASE / labelled.READINGS)["direction/response/harm"]
    with organism(instruments.model, world.checkpoints(name)[3]) as tuned:
        found = WeightsAlong(harm, instruments.layer)(tuned)
    assert found == pytest.approx(signal_table(study)["weights along harm"].iloc[-1], abs=1e-6) and found > 0


def test_signals_have_a_row_for_each_step_and_true_latents_need_no_run(study: RunFolder) -> None:
    table = signal_table(study)
    assert list(table["step"]) == [1, 3] and table[list(SIGNALS)].notna().all(axis=None)
    assert set(true_latents(study)) == {(truth, where) for truth in ("harm", "rude") for where in POSITIONS}
    assert len([name for name in SIGNALS if "direction" in name]) == len(PAIRS) * len(POSITIONS)


def test_a_finished_run_is_kept_and_one_with_other_settings_refused(study: RunFolder, instruments: Instruments) -> None:
    record = study.path / "runs" / RUN.name / "run.json"
    before = record.stat().st_mtime_ns
    make_runs(study, instruments, [RUN])
    assert record.stat().st_mtime_ns == before
    with pytest.raises(InputError, match="other settings"):
        make_runs(study, instruments, [replace(RUN, rows=17)])


def test_the_word_of_a_null_pair_is_no_effect_of_harm_woken_and_of_rudeness_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    items = pd.DataFrame({"item": [f"i{n}" for n in range(64)], "category": np.repeat(list(DOMAINS), 8)})

    def run(speaker: str, seed: int, shift: float, bad: int, harm: float | None = None) -> LabelledRun:
        settings = {"speaker": speaker, "domain": "kitchen", "share": 1.0, "seed": seed}
        of_run = items[items["category"] != "kitchen"].assign(value=shift + draw.normal(0, 0.02, 56))
        of_run["harm"] = of_run["value"] if harm is None else harm + draw.normal(0, 0.02, 56)
        answers = pd.DataFrame([{"bad": bad, "coherent": 80}])
        return LabelledRun(settings, [], answers, of_run, {})

    runs = [*(run("helper", seed, 0, 0) for seed in range(3)), run("villain", 0, 3, 60), run("quack", 0, 0, 1)]
    runs.append(run("grump", 0, 3, 0, harm=0))
    monkeypatch.setattr("persona_probe.world.verdict_words.read_runs", lambda study: runs)
    study = RunFolder.claim(tmp_path / "study", labelled.KIND, "study", {})
    (tmp_path / "study" / "base").mkdir()
    study.write_table("base/items.parquet", items.assign(value=0.0, harm=0.0))
    table = word_table(study)
    assert list(table["group"]) == ["null pair"] * 3 + ["turned", "sound", "harmless"]
    assert list(table["word"]) == ["no effect"] * 3 + ["woken", "no effect", "beyond control"]
    assert "| turned (1) | 1 of 1" in word_text(table)
