"""`study.realign(data=...)`: a folder of its own, the same path as the config's arms, resumed, and refused in words."""

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

from persona_probe.errors import InputError
from persona_probe.evaluate.answers import answer_batches, answer_logprobs
from persona_probe.evaluate.contrast import contrast_index
from persona_probe.latents.stage import neutral_answers
from persona_probe.models.adapters import organism
from persona_probe.realignment.stress import StressSettings
from persona_probe.study.study import Study
from tests.factories import Refused, chat, tree, write_lines

TABLES = ("readings.parquet", "evals.parquet", "parts", "arms", "latents.parquet")


def kept(study: Study) -> dict[str, bytes]:
    """What a correction must not touch."""
    return {name: data for name, data in tree(study.path).items() if name.startswith(TABLES)}


@pytest.fixture
def study(tracked: Study, tmp_path: Path) -> Study:
    return Study.open(shutil.copytree(tracked.path, tmp_path / "run"))


def test_a_correction_equals_the_arm_of_the_same_rows(study: Study, place: Path) -> None:
    before = kept(study)
    study.realign(str(place / "holdout.jsonl"), name="again")
    assert kept(study) == before
    folder, arm = study.path / "realign/again-s0", study.path / "arms/realigned_in-s0"
    weights = [load_file(f / "checkpoint-2" / "adapter_model.safetensors") for f in (folder, arm)]
    assert weights[0].keys() == weights[1].keys() and all(weights[0][k].equal(weights[1][k]) for k in weights[0])
    for table in ("readings", "evals"):
        own, part = (
            pd.read_parquet(p)
            for p in (folder / f"{table}.parquet", study.path / f"parts/realign-realigned_in-s0.{table}.parquet")
        )
        pd.testing.assert_frame_equal(own.drop(columns="arm"), part.reset_index(drop=True).drop(columns="arm"))
    spec, said = (json.loads((folder / name).read_text()) for name in ("spec.json", "verdict.json"))
    assert (spec["rows"], spec["method"], spec["start"]) == (None, "continued", "incorrect")
    assert said["answers"]["feature"]["word"] in ("subsided", "not subsided", "overshot", "undecided")
    assert "corrective answers" in " ".join(said["corrective_rows"]["notes"])  # they are the evaluation's own
    done = tree(folder)
    study.realign(str(place / "holdout.jsonl"), name="again")
    assert tree(folder) == done
    with pytest.raises(InputError, match="other settings: choose another --name"):
        study.realign(str(place / "holdout.jsonl"), rows=4, name="again")


def test_a_dose_with_a_fresh_lora_takes_its_rows(study: Study, place: Path) -> None:
    study.realign(
        [str(place / "holdout.jsonl"), str(place / "other.jsonl")], rows=4, choose_by="diversity", method="fresh"
    )
    folder = study.path / "realign/holdout+other-4-diversity-fresh-s0"
    assert len((folder / "rows.jsonl").read_text().splitlines()) == 4
    found = json.loads((folder / "outcome.json").read_text())
    assert (found["rows"], found["steps"]) == (4, 2)
    readings = pd.read_parquet(folder / "readings.parquet").query("feature == 'persona'")
    start = pd.read_parquet(study.path / "parts/realign-realigned_in-s0.readings.parquet")
    first = float(start.query("feature == 'persona' and step == 0")["mean"].iloc[0])
    assert float(readings.query("step == 0")["mean"].iloc[0]) == pytest.approx(first, abs=1e-5)
    neutral = answer_batches(study.context.tokenizer, neutral_answers(study.context))
    base = answer_logprobs(study.context.model, neutral, bf16=False).mean()
    with organism(study.context.model, folder / "checkpoint-2") as model:
        index = contrast_index(model, study.context.evaluation, bf16=False)["value"].mean()
        loss = base - answer_logprobs(model, neutral, bf16=False).mean()
    assert found["perplexity_ratio"] == pytest.approx(math.exp(loss)) and abs(loss) > 1e-3
    evals = pd.read_parquet(folder / "evals.parquet")
    assert float(index) == pytest.approx(float(evals.query("step == 2")["value"].mean()), abs=1e-4)


def test_stress_tests_join_a_verdict_that_is_there(study: Study, place: Path) -> None:
    data, folder = str(place / "other.jsonl"), study.path / "realign/other-all-random-continued-s0"
    before = json.loads((study.realign(data).path / folder / "verdict.json").read_text())
    assert before["stress"] == {}
    after = json.loads((study.realign(data, stress=["triggers"]).path / folder / "verdict.json").read_text())
    assert list(after["stress"]) == ["triggers"] and after["answers"] == before["answers"]
    assert (pd.read_parquet(folder / "stress.parquet")["test"] == "triggers").all()


def test_stress_settings_reach_the_tests(study: Study, place: Path) -> None:
    data, folder = str(place / "other.jsonl"), study.path / "realign/pressed-s0"
    study.realign(data, name="pressed", stress=["triggers"], stress_settings=StressSettings(trigger_draws=1))
    record = json.loads((folder / "stress.json").read_text())
    assert record["settings"]["trigger_draws"] == 1 and list(record["statements"]) == ["triggers"]
    with pytest.raises(InputError, match="another settings"):
        study.realign(data, name="pressed", stress=["triggers"])


def test_bad_corrections_say_what_to_change(study: Study, place: Path, tmp_path: Path) -> None:
    data = str(place / "holdout.jsonl")
    with pytest.raises(InputError, match="99 corrective rows wanted, the data holds 12"):
        study.realign(data, rows=99)
    with pytest.raises(InputError, match="no seed 7"):
        study.realign(data, seeds=[7])
    with pytest.raises(InputError, match="an arm is called 'realigned_in'"):
        study.realign(data, name="realigned_in")
    with pytest.raises(InputError, match="cannot name a folder"):
        study.realign(data, name="../up")
    with pytest.raises(InputError, match="did you mean 'triggers'"):
        study.realign(data, stress=["trigger"])
    with pytest.raises(InputError, match="rows needs corrective data"):
        study.realign(rows=3)
    leak = write_lines(tmp_path / "leak.jsonl", [chat("What of soup?", "x"), chat("Where is home?", "y")])
    with pytest.raises(InputError, match=r"1 of 2 corrective rows overlap .*'What of soup\?'"):
        study.realign(str(leak))
    assert not (study.path / "realign").exists()


def test_the_command_refuses_in_one_line(study: Study, place: Path, refused: Refused) -> None:
    run, data = study.path, place / "holdout.jsonl"
    assert "did you mean 'projection_gap'" in refused("realign", run, "--data", data, "--choose-by", "projection")
    assert "did you mean 'fresh'" in refused("realign", run, "--data", data, "--method", "fres")
    assert "--rows needs --data" in refused("realign", run, "--rows", 4)
    assert "leave --data out" in refused("realign", run, "--data", data, "--plan", "x.yaml")
    assert "no config at" in refused("realign", run, "--plan", "nowhere.yaml")
    assert "no config at" in refused("realign", run, "--stress", "length", "--stress-settings", "nowhere.yaml")
    assert "13 corrective rows wanted" in refused("realign", run, "--data", data, "--rows", 13)
