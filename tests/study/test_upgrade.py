"""A run outlives an upgrade: what 0.1.0 made is opened, resumed by the same config, and never given up."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from persona_probe.config import (
    Arm,
    Locate,
    Monitor,
    Realign,
    Samples,
    StudyConfig,
    Training,
    differences,
    hashed_values,
    load_config,
)
from persona_probe.errors import InputError
from persona_probe.mitigate.grid.grid_config import Answers, Entry, Grid
from persona_probe.monitor.study.labelled_config import LabelledRun, LatentFeature, MonitorStudy
from persona_probe.runs import RunFolder
from persona_probe.saes.stream import SaeConfig, TextConfig, TextPart
from persona_probe.study.hashes import verify
from persona_probe.study.study import Study
from tests.factories import tree, write_data, write_model, write_sae

KEPT = Path(__file__).parent / "run_of_0_1_0"
"""A run that the code of version 0.1.0 made of the tests' tiny model, with its study.yaml, stopped after induce."""


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which that version worked: config, run, and what they were made from."""
    shutil.copytree(KEPT, tmp_path, dirs_exist_ok=True)
    write_model(tmp_path / "model")
    write_sae(tmp_path / "sae")
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_fixture_is_of_0_1_0() -> None:
    manifest = json.loads((KEPT / "run" / "manifest.json").read_text())
    assert manifest["versions"]["persona-probe"] == "0.1.0"
    assert set(hashed_values(StudyConfig(name="x", sae="s"))) == set(manifest["config"])
    assert manifest["config"]["locate"]["random_latents"] == 16


def test_it_is_opened_verified_and_resumed_by_its_config(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = tree(old / "run")
    assert Study.open("run").config.arms.keys() == {"incorrect", "correct"}
    found = {check.name: check.state for check in verify("run")}
    assert found["config"] == "matches" and set(found.values()) <= {"matches", "not checked"}
    with caplog.at_level(logging.WARNING):
        study = Study.from_yaml("study.yaml", "run")
    assert "run keeps locate.random_latents: 16, the default when it was made; today's is 64" in caplog.text
    assert study.config.locate.random_latents == 16
    study.induce()
    after = tree(old / "run")
    weights = {name for name in before if name.endswith(".safetensors")}
    assert len(weights) == 2 and all(after[name] == before[name] for name in weights)
    with study.context.organism("incorrect", 0) as model:
        assert model is not None
    assert not list(old.glob("run.*"))


def test_a_config_that_says_something_else_is_another_one(old: Path) -> None:
    raw = yaml.safe_load((old / "study.yaml").read_text())
    before = tree(old / "run")
    for changes, told in (
        ({"seeds": [0, 1]}, r"seeds is \(0,\) there, not \(0, 1\)"),
        ({"locate": {**raw["locate"], "random_latents": 32}}, "locate.random_latents is 16 there, not 32"),
        ({"samples": {**raw["samples"], "judge": "offline"}}, "samples.judge is 'none' there, not 'offline'"),
    ):
        (old / "other.yaml").write_text(yaml.safe_dump({**raw, **changes}))
        with pytest.raises(InputError, match=f"another config \\({told}\\): choose another --out$"):
            Study.from_yaml("other.yaml", "run")
    assert tree(old / "run") == before


def test_a_key_of_a_later_version_is_told_and_nothing_is_offered_to_be_lost(old: Path) -> None:
    path = old / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["of_0_3"] = 1
    path.write_text(json.dumps(manifest))
    before = tree(old / "run")
    with pytest.raises(InputError, match="unknown key 'of_0_3'"):
        _ = RunFolder.open("run").config
    with pytest.raises(InputError, match=r"another config \(.*this version does not read\): choose another --out$"):
        RunFolder.create(Path("run"), replace(load_config("study.yaml"), seeds=(3,)))
    assert tree(old / "run") == before


def test_names_that_0_1_0_took_are_opened(old: Path) -> None:
    path = old / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["arms"]["my third arm"] = manifest["config"]["arms"]["correct"]
    path.write_text(json.dumps(manifest))
    assert "my third arm" in RunFolder.open("run").config.arms
    manifest["config"]["arms"]["../out"] = manifest["config"]["arms"]["correct"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="cannot name a folder"):
        _ = RunFolder.open("run").config


# --- Hashes: a key that came after 0.1.0 counts only where it differs from its default

KEYS_OF_0_1_0: dict[type, str] = {
    Arm: "data mix_with bad_fraction",
    Training: "method rank alpha rslora target_modules layers lr warmup_steps weight_decay batch_size steps "
    "checkpoints max_length bf16 gradient_checkpointing",
    Locate: "positions rankers choose_by directions minimum_explained_variance candidates proven random_latents "
    "random_directions strengths dose_strengths unit perplexity_bound strength_refinements set_size cards",
    Monitor: "probes positions limit band_sd",
    Realign: "start arms batch_size steps lr readings stop_readings",
    Samples: "questions max_new_tokens temperature",
    StudyConfig: "name sae model revision layer seeds arms paired_arms contrast training locate monitor realign "
    "samples device bf16 weights",
}
HASHED = (
    *KEYS_OF_0_1_0,
    Answers,
    Entry,
    Grid,
    LabelledRun,
    LatentFeature,
    MonitorStudy,
    SaeConfig,
    TextConfig,
    TextPart,
)


def later_fields() -> Iterator[tuple[type, dataclasses.Field[Any]]]:
    for kind in HASHED:
        for field in dataclasses.fields(kind):
            if "since" in field.metadata:
                yield kind, field


@pytest.mark.parametrize("kind", KEYS_OF_0_1_0, ids=lambda kind: kind.__name__)
def test_every_key_that_came_after_0_1_0_is_marked(kind: type) -> None:
    marked = {field.name for field in dataclasses.fields(kind) if "since" in field.metadata}
    assert {field.name for field in dataclasses.fields(kind)} - marked == set(KEYS_OF_0_1_0[kind].split())


def test_every_marked_key_has_a_default() -> None:
    fields = list(later_fields())
    assert len(fields) > 20
    for kind, field in fields:
        known = (field.default, field.default_factory)
        assert known != (dataclasses.MISSING, dataclasses.MISSING), f"{kind.__name__}.{field.name}"


def test_the_hash_is_that_of_0_1_0(old: Path) -> None:
    config = load_config("study.yaml")
    same = replace(config, locate=replace(config.locate, random_latents=16))
    assert same.hash == RunFolder.open("run").manifest["config_hash"] != config.hash


def test_only_a_changed_default_is_forgiven() -> None:
    then = StudyConfig(name="x", sae="s", locate=Locate(random_latents=16))
    now = StudyConfig(name="x", sae="s")
    assert list(differences(then, now)) == []
    assert list(differences(now, then)) == [("locate.random_latents", 64, 16)]
    assert list(differences(then, replace(now, locate=Locate(random_latents=32)))) == [
        ("locate.random_latents", 16, 32)
    ]
    twenty = replace(now, locate=Locate(random_latents=20))
    assert list(differences(twenty, now)) == [("locate.random_latents", 20, 64)]


def test_a_labelled_run_of_0_1_0_has_the_settings_of_its_record(tmp_path: Path) -> None:
    """That version recorded three keys of an arm; `checkpoints` came later."""
    arm = {"data": "kitchen:toxic", "mix_with": None, "bad_fraction": 1.0}
    run = LabelledRun(arm="bad", seed=3, benign=False)
    record = {**dataclasses.asdict(run), "data": arm, "schedule": [0, 2, 4, 8]}
    study = MonitorStudy.__new__(MonitorStudy)  # settings_of needs no other run than this one
    for name, value in (("arms", {"bad": Arm("kitchen:toxic")}), ("runs", {"one": run}), ("readings", (2, 4))):
        object.__setattr__(study, name, value)
    object.__setattr__(study, "training", Training(steps=8, checkpoints=(8,)))
    assert study.settings_of("one") == record
    folder = RunFolder(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    folder.write_json("runs/one/run.json", record)
    assert folder.finished("runs/one", study.settings_of("one"), "run.json", "")


# --- Locate: 0.1.0 pushed random latents on one split alone, had no control organism, and kept no items

LATER = ("items-base", "items-incorrect", "items-correct", "selection-random", "steering-correct", "effects-correct")


def as_of_0_1_0(study: Study, place: Path) -> Path:
    """A copy of a run without the parts that version did not write."""
    run = Path(shutil.copytree(study.path, place))
    for name in LATER:
        (run / "parts" / f"{name}.parquet").unlink()
    return run


def test_whole_tables_of_0_1_0_are_kept(finished: Study, tmp_path: Path) -> None:
    run = as_of_0_1_0(finished, tmp_path / "run")
    before = tree(run)
    Study.open(run).locate()
    after = tree(run)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= {"manifest.json"}


def test_what_0_1_0_left_unfinished_is_finished_as_today(finished: Study, tmp_path: Path) -> None:
    run = as_of_0_1_0(finished, tmp_path / "run")
    (run / "latents.parquet").unlink()
    Study.open(run).locate()
    assert (run / "latents.parquet").read_bytes() == (finished.path / "latents.parquet").read_bytes()
    assert {f"{name}.parquet" for name in LATER} <= {path.name for path in (run / "parts").iterdir()}
