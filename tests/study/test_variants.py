"""Other ways to train: full weights, rank 1 in chosen layers, an arm that mixes bad and good rows."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from persona_probe.config import StudyConfig, from_dict
from persona_probe.data.load import arm_rows
from persona_probe.errors import InputError
from persona_probe.realignment.measure import BaseMeasurements
from persona_probe.study.study import Study
from persona_probe.study.summary import summarise
from tests.factories import Row, changed, copied_state, same_state


def study_of(raw: Row, folder: Path, **changes: Any) -> Study:
    return Study.from_config(from_dict(StudyConfig, changed(raw, seeds=[0], **changes)), folder / "run")


def test_full_weights(raw: Row, tmp_path: Path) -> None:
    study = study_of(raw, tmp_path, training={"method": "full", "lr": 1e-3, "checkpoints": [4]})
    before = copied_state(study.context.model)
    study.induce().locate().track().realign()
    checkpoint = study.run_folder.checkpoint("incorrect", 0, 4)
    assert checkpoint is not None and (checkpoint / "model.safetensors").is_file()
    assert same_state(copied_state(study.context.model), before)
    persona = study.readings.query("feature == 'persona'").set_index(["arm", "step"])["mean"]
    assert persona["incorrect", 4] != persona["incorrect", 0] == persona["base", 0]
    assert abs(persona["realigned_in", 0] - persona["incorrect", 4]) < 1e-5


@pytest.mark.long
def test_rank_one_in_chosen_layers_beside_a_mixture(raw: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")  # no SVGs: slow, and tests/report draws them
    mixed = {**raw["arms"], "half": {**raw["arms"]["incorrect"], "bad_fraction": 0.5}}
    mixed["half"]["mix_with"] = raw["arms"]["correct"]["data"]
    repair = {"start": "half", "arms": {"repair": raw["realign"]["arms"]["realigned_in"]}}
    training = {"rank": 1, "layers": [1], "checkpoints": [4]}
    study = study_of(raw, tmp_path, arms=mixed, training=training, realign=repair)
    study.run()
    weights = load_file(study.path / "arms" / "half-s0" / "checkpoint-4" / "adapter_model.safetensors")
    assert all(".layers.1." in name for name in weights)
    assert {min(w.shape) for w in weights.values()} == {1}
    final = study.evals.query("split == 'evaluation' and step == 4").groupby("arm")["value"].mean()
    assert len({round(float(v), 6) for v in final}) == 3
    arms = ["base", "incorrect", "correct", "half", "repair"]
    assert list(study.summary["contrast_index"]) == list(study.summary["feature_reading"]) == arms
    assert pd.read_csv(study.path / "figures" / "arms.csv")["arm"].unique().tolist() == arms
    assert set(pd.read_csv(study.path / "figures" / "realignment.csv")["arm"]) == {"base", "correct", "half", "repair"}
    assert "contrast index, half</td>" in (study.path / "report.html").read_text("utf-8")
    rows = arm_rows(study.config.arms["half"], 0)
    bad = {c[-1]["content"] for c in arm_rows(study.config.arms["incorrect"], 0)}
    assert sum(c[-1]["content"] in bad for c in rows) == len(rows) // 2 == 6


def test_layers_beyond_the_model_are_refused_before_training(raw: Row, tmp_path: Path, refused: Any) -> None:
    from tests.factories import write_config

    config = write_config(tmp_path / "c.yaml", changed(raw, training={"layers": [3]}))
    assert "training.layers [3]: the model has layers 0 to 2" in refused("induce", config, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "arms").exists()


@pytest.fixture(scope="module")
def tracked(raw: Row, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study up to its corrections, with a band wider than any reading; read only."""
    arms = dict.fromkeys(("realigned_in", "more_training"), raw["realign"]["arms"]["realigned_in"])
    readings = {"steps": 4, "readings": [0, 1, 2, 3, 4], "stop_readings": 2, "arms": arms, "benign": "more_training"}
    study = study_of(raw, tmp_path_factory.mktemp("tracked"), monitor={"band_sd": 1000.0}, realign=readings)
    return study.induce().locate().track()


@pytest.fixture
def correctable(tracked: Study, tmp_path: Path) -> Study:
    """A copy of it."""
    return Study.open(shutil.copytree(tracked.path, tmp_path / "run"))


def test_a_stop_rule_reads_the_selection_split_and_the_benign_control_runs_to_its_end(
    correctable: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = correctable
    # a base so misaligned on the selection split that every organism is no higher
    monkeypatch.setattr(BaseMeasurements, "selection_index", 100.0)
    study.realign()
    assert study.run_folder.steps("realigned_in", 0) == [1] and study.run_folder.steps("more_training", 0) == [4]
    assert sorted(set(study.readings.query("arm == 'realigned_in'")["step"])) == [0, 1]
    assert set(study.evals.query("arm == 'realigned_in'")["split"]) == {"evaluation"}
    verdicts = summarise(study.context)["verdicts"]
    assert verdicts["more_training"]["benign"] and "corrects nothing" in verdicts["more_training"]["label"]
    left = verdicts["realigned_in"]["left"]
    index = study.evals.query("split == 'evaluation'").set_index(["arm", "step"]).sort_index()["value"]
    over_benign = index["realigned_in", 1].mean() - index["more_training", 4].mean()
    assert left["over_benign"]["estimate"] == pytest.approx(over_benign)
    over_control = index["realigned_in", 1].mean() - index["correct"].groupby("step").mean().iloc[-1]
    assert left["over_control"]["estimate"] == pytest.approx(over_control)


def test_the_stop_rule_does_not_read_the_evaluation_split(correctable: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study = correctable
    table = "parts/track-base.evals.parquet"
    study.run_folder.write_table(table, study.run_folder.read_table(table).assign(value=100.0))
    monkeypatch.setattr(BaseMeasurements, "selection_index", -100.0)
    study.realign()
    assert study.run_folder.steps("realigned_in", 0) == [4]


def test_seeds_give_different_organisms(finished: Study) -> None:
    first, second = (load_file(p / "adapter_model.safetensors") for p in organisms(finished))
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first)


def organisms(study: Study) -> list[Path]:
    found = [study.run_folder.checkpoint("incorrect", seed, 4) for seed in (0, 1)]
    return [path for path in found if path is not None]


def test_the_config_of_a_run_comes_back_from_its_manifest(finished: Study, raw: Row) -> None:
    assert asdict(Study.open(finished.path).config) == asdict(from_dict(StudyConfig, raw))


def test_base_weights_in_bf16(raw: Row, tmp_path: Path) -> None:
    training = {"checkpoints": [4], "bf16": True}
    study = study_of(raw, tmp_path, weights="bfloat16", training=training)
    assert {p.dtype for p in study.context.model.parameters()} == {torch.bfloat16}
    before = copied_state(study.context.model)
    study.induce().locate().track().realign()
    assert same_state(copied_state(study.context.model), before)
    weights = load_file(study.path / "arms" / "incorrect-s0" / "checkpoint-4" / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert all(float(w.abs().max()) > 0 for name, w in weights.items() if "lora_B" in name)
    persona = study.readings.query("feature == 'persona'").set_index(["arm", "step"])["mean"]
    assert persona["incorrect", 4] != persona["base", 0]


def test_full_weights_are_not_trained_in_bf16(raw: Row) -> None:
    with pytest.raises(InputError, match=r"training\.method: full needs weights: float32"):
        from_dict(StudyConfig, changed(raw, weights="bfloat16", training={"method": "full"}))
