"""One writer at a time: the second process is told who the first is, and a killed owner's lock is free at once."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from persona_probe import locks, runs
from persona_probe.config import StudyConfig
from persona_probe.errors import InputError
from persona_probe.locks import FOLDER, held, owner
from persona_probe.runs import RunFolder
from persona_probe.units import Unit

HOLD = """
import sys, time
from pathlib import Path
from persona_probe.locks import held
with held(Path(sys.argv[1]), sys.argv[2], "it"):
    print("held", flush=True)
    time.sleep(60)
"""
COUNT = """
import sys
from pathlib import Path
from persona_probe.runs import RunFolder
run = RunFolder(Path(sys.argv[1]))
for number in range(25):
    run.add_seconds("shared", 1.0)
    run.update_manifest(hashes={f"{sys.argv[2]}-{number}": "x"})
    run.write_json("page.json", [sys.argv[2]] * 1000)
    with run.staging(f"units/{sys.argv[2]}-{number}") as folder:
        (folder / "whole").write_text("x")
"""


def process(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def holding(folder: Path, name: str) -> subprocess.Popen[str]:
    other = process(HOLD, folder, name)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    return other


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", StudyConfig(name="demo", sae="saes/x"))


def test_the_second_process_gets_the_owner_and_a_killed_owner_frees_the_lock(run: RunFolder) -> None:
    other = holding(run.path, "run")
    try:
        said = f"process {other.pid} on {socket.gethostname()}"
        assert owner(run.path, "run") == said
        with pytest.raises(InputError, match=f"is in use by {said}: wait until it ends, or choose another --out"):
            run.writing().__enter__()
        run.update_manifest(note="readers and the manifest go on")
        other.send_signal(signal.SIGKILL)
        other.wait(10)
        assert owner(run.path, "run") is None
        with run.writing(), run.writing():
            assert owner(run.path, "run") == f"process {os.getpid()} on {socket.gethostname()}"
    finally:
        other.kill()
    assert not (run.path / FOLDER).exists() and run.manifest["note"]


def test_units_have_locks_of_their_own(run: RunFolder) -> None:
    other, made = holding(run.path, "arms/a-s0"), list[str]()
    try:
        for name in ("a-s0", "a-s1"):
            unit = Unit(f"arms/{name}", lambda name=name: made.append(name), "induce")
            if name == "a-s0":
                with pytest.raises(InputError, match=rf"a-s0 is in use by process {other.pid}"):
                    unit.make_in(run)
                with pytest.raises(InputError, match="in use"), run.staging("arms/a-s0"):
                    pass
            else:
                unit.make_in(run)
    finally:
        other.kill()
        other.wait(10)
    assert made == ["a-s1"]


def test_processes_that_write_one_folder_lose_nothing(run: RunFolder) -> None:
    writers = [process(COUNT, run.path, name) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    manifest = run.manifest
    assert manifest["seconds"] == {"shared": 50.0}
    assert set(manifest["hashes"]) == {f"{name}-{number}" for name in "ab" for number in range(25)}
    assert len(set(json.loads((run.path / "page.json").read_text()))) == 1
    left = {path.name for path in run.path.iterdir()}
    assert left == {"manifest.json", "page.json", "units"} and len(list((run.path / "units").iterdir())) == 50


def test_threads_of_one_process_change_the_manifest_one_after_the_other(run: RunFolder) -> None:
    def count() -> None:
        for _ in range(10):
            run.add_seconds("shared", 1.0)

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert run.manifest["seconds"] == {"shared": 30.0}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder of locks should be")
    with pytest.raises(InputError, match="could not lock it") as error, held(tmp_path, "run", "it"):
        pass
    assert "it must be a writable folder" in str(error.value)


def test_a_run_that_another_process_writes_is_not_overwritten(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "CROWD_S", 0.2)
    monkeypatch.setattr(runs, "CROWD_S", 0.2)
    run.write_json("kept.json", 1)
    other = holding(run.path, "run")
    try:
        with pytest.raises(InputError, match=f"in use by process {other.pid}"):
            RunFolder.create(run.path, StudyConfig(name="demo", sae="saes/y"), overwrite=True)
        assert run.read_json("kept.json") == 1 and RunFolder.create(run.path, run.config).has("kept.json")
    finally:
        other.kill()
        other.wait(10)
