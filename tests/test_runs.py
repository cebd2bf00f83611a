"""The run folder never holds half a file, and refuses what is not its own."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from persona_probe.config import StudyConfig
from persona_probe.errors import InputError
from persona_probe.runs import RunFolder, same_settings
from persona_probe.writing import write_text

CONFIG = StudyConfig(name="demo", sae="saes/x")
OTHER = StudyConfig(name="demo", sae="saes/y")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", CONFIG)


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_the_manifest_holds_the_config(run: RunFolder) -> None:
    assert run.config == CONFIG
    assert RunFolder.open(run.path).config == CONFIG
    assert run.manifest["config_hash"] == CONFIG.hash
    assert {"python", "torch", "persona-probe"} <= set(run.manifest["versions"])


def test_the_same_config_resumes_and_another_is_refused(run: RunFolder) -> None:
    run.write_json("kept.json", 1)
    assert RunFolder.create(run.path, CONFIG).has("kept.json")
    with pytest.raises(InputError, match="another config"):
        RunFolder.create(run.path, OTHER)
    assert run.has("kept.json")
    fresh = RunFolder.create(run.path, OTHER, overwrite=True)
    assert fresh.config == OTHER and not fresh.has("kept.json")
    aside = run.path.with_name("run.old")
    assert RunFolder.open(aside).config == CONFIG and RunFolder(aside).read_json("kept.json") == 1
    fresh.write_json("new.json", 2)
    RunFolder.create(run.path, CONFIG, overwrite=True)
    assert RunFolder.open(run.path.with_name("run.old-2")).read_json("new.json") == 2
    assert RunFolder(aside).read_json("kept.json") == 1


def test_an_empty_run_gives_way_to_another_config(run: RunFolder) -> None:
    assert RunFolder.create(run.path, OTHER).config == OTHER
    assert everything(run.path.parent) == ["run", "run/manifest.json"]


def test_a_run_that_cannot_be_set_aside_stays(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write_json("kept.json", 1)
    monkeypatch.setattr(Path, "mkdir", refusing(Path.mkdir, errno.EACCES, ".old"))
    with pytest.raises(InputError, match=r"could not set the earlier run aside as .*: permission denied"):
        RunFolder.create(run.path, OTHER, overwrite=True)
    assert run.config == CONFIG and run.read_json("kept.json") == 1


@pytest.mark.parametrize(
    ("recorded", "settings", "same"),
    [
        ({"arm": "a", "data": {"rows": 3}}, {"arm": "a", "data": {"rows": 3, "checkpoints": []}}, True),
        ({"arm": "a", "old": None}, {"arm": "a", "new": False, "note": ""}, True),
        ({"arm": "a"}, {"arm": "a", "new": 3}, False),
        ({"arm": "a"}, {"arm": "a", "new": 0}, True),  # false, which Python and this rule take for one value
        ({"arm": "a", "data": {"rows": 3}}, {"arm": "a", "data": {"rows": 4}}, False),
        ({"arm": "a", "rows": None}, {"arm": "a", "rows": 3}, False),
        ({"arm": "a"}, ["a"], False),
    ],
)
def test_a_key_of_a_later_version_does_not_make_a_unit_anew(recorded: object, settings: object, same: bool) -> None:
    assert same_settings(recorded, settings) is same
    assert same_settings(settings, recorded) is same


def refusing(act: Callable[..., Any], number: int, end: str) -> Callable[..., Any]:
    """`act`, but for paths with this end the operating system refuses."""

    def refused(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name.endswith(end):
            raise OSError(number, os.strerror(number), str(path))
        return act(path, *args, **kwargs)

    return refused


def test_another_config_is_told_by_the_first_key_that_differs(run: RunFolder) -> None:
    run.write_json("kept.json", 1)
    told = r"another config \(sae is '.*' there, not '.*'\): choose another --out$"
    with pytest.raises(InputError, match=told) as refused:
        RunFolder.create(run.path, replace(CONFIG, sae="saes/other"))
    assert "overwrite" not in str(refused.value) and "delete" not in str(refused.value)


def test_foreign_folders_are_refused_also_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is no run folder"):
            RunFolder.create(tmp_path, CONFIG, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        RunFolder.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is no run folder"):
        RunFolder.create(tmp_path / "file", CONFIG)


def test_a_run_that_was_stopped_before_its_manifest_starts_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".manifest.json-abc").write_text("{")
    assert RunFolder.create(tmp_path / "run", CONFIG).config == CONFIG


def test_a_damaged_manifest_says_so(run: RunFolder) -> None:
    (run.path / "manifest.json").write_text('{"config": ')
    with pytest.raises(InputError, match=r"manifest.json is damaged"):
        _ = run.manifest


def test_staging_moves_in_whole_or_leaves_nothing(run: RunFolder) -> None:
    before = everything(run.path)
    with pytest.raises(KeyboardInterrupt), run.staging("arms/incorrect-s0") as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert everything(run.path) == before
    with run.staging("arms/incorrect-s0") as folder:
        (folder / "whole").write_text("x")
        assert not run.has("arms/incorrect-s0")
    assert everything(run.path) == sorted([*before, "arms", "arms/incorrect-s0", "arms/incorrect-s0/whole"])


def test_staging_ignores_what_a_killed_run_left(run: RunFolder) -> None:
    left = run.path / ".staging" / "unit"
    left.mkdir(parents=True)
    (left / "torn").write_text("x")
    with run.staging("unit") as folder:
        assert everything(folder) == []
    assert everything(run.path / "unit") == []


def test_a_failed_write_leaves_the_old_file(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run.write_json("notes.json", "old")
    run.write_table("t.parquet", pd.DataFrame({"a": [1]}))
    before = everything(run.path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match="no space left on the disk"):
        write_text(path, "new")
    with pytest.raises(InputError, match="no space left on the disk"):
        run.write_table("t.parquet", pd.DataFrame({"a": [2]}))
    monkeypatch.undo()
    assert json.loads(path.read_text()) == "old"
    assert run.read_table("t.parquet")["a"].tolist() == [1]
    assert everything(run.path) == before


def test_text_that_cannot_be_encoded_leaves_the_old_file(run: RunFolder) -> None:
    path = run.write_json("notes.json", "old")
    before = everything(run.path)
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text()) == "old"
    assert everything(run.path) == before


def test_a_table_that_cannot_be_written_leaves_the_old_one(run: RunFolder) -> None:
    run.write_table("t.parquet", pd.DataFrame({"a": [1]}))
    before = everything(run.path)
    with pytest.raises(ValueError):
        run.write_table("t.parquet", pd.DataFrame({"a": [1, "x", object()]}))
    assert run.read_table("t.parquet")["a"].tolist() == [1]
    assert everything(run.path) == before


def checkpoint(run: RunFolder, step: int) -> Path:
    folder = run.path / "arms" / "incorrect-s0" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(3)}, folder / "adapter_model.safetensors")
    return folder


def test_checkpoints_are_found_and_verified(run: RunFolder) -> None:
    folder = checkpoint(run, 5)
    checkpoint(run, 10)
    run.record_hashes(run.path / "arms" / "incorrect-s0")
    assert run.checkpoint("incorrect", 0, 5) == folder
    assert run.checkpoint("incorrect", 0, 0) is None
    assert run.steps("incorrect", 0) == [5, 10]
    with pytest.raises(InputError, match=r"step 7: there are \[5, 10\]"):
        run.checkpoint("incorrect", 0, 7)
    with pytest.raises(InputError, match="did you mean 'incorrect-s0'"):
        run.checkpoint("incorect", 0, 5)
    save_file({"w": torch.zeros(3)}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="does not match its sha256"):
        run.checkpoint("incorrect", 0, 5)


def test_tables_come_back_and_missing_ones_name_the_stage(run: RunFolder) -> None:
    frame = pd.DataFrame({"step": [0, 5], "mean": [0.5, 1.5]})
    run.write_table("readings.parquet", frame)
    pd.testing.assert_frame_equal(run.read_table("readings.parquet"), frame)
    for name, command in {
        "latents.parquet": "locate RUN",
        "parts/selection.parquet": "locate RUN",
        "evals.parquet": "track RUN",
        "parts/track-base.evals.parquet": "track RUN",
        "parts/realign-in-s0.evals.parquet": "realign RUN",
    }.items():
        with pytest.raises(InputError, match=f"{name} does not exist yet: run `persona-probe {command}` first"):
            run.read_table(name)
    with pytest.raises(InputError, match=r"run `persona-probe report RUN` first"):
        run.read_json("summary.json")


def test_the_manifest_merges_and_counts_seconds(run: RunFolder) -> None:
    run.update_manifest(seconds={"locate": 1.0}, note="x")
    run.add_seconds("induce", 2.0)
    run.add_seconds("induce", 0.5)
    assert run.manifest["seconds"] == {"locate": 1.0, "induce": 2.5}
    assert run.manifest["note"] == "x" and run.config == CONFIG


def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_living_one_keeps_its_file(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    dead, alive = (tmp_path / f".table.csv.{host}.0a1b2c.{pid}.tmp" for pid in (ended.pid, os.getppid()))
    for leftover in (dead, alive):
        leftover.write_text("half")
    write_text(tmp_path / "table.csv", "whole")
    assert everything(tmp_path) == sorted([alive.name, "table.csv"])
    assert (tmp_path / "table.csv").read_text() == "whole"
