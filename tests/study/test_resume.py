"""A study killed in the middle of a stage goes on where it was, and ends as if it had never been stopped."""

import json
import signal
import time
from pathlib import Path

import pytest

from persona_probe.report.export import SHORT
from persona_probe.study.study import Study
from tests.factories import tree, without_times
from tests.processes import Process, command

MOMENTS = ("arms/incorrect-s0", "parts/effects-base.parquet", "parts/realign-realigned_in-s0.readings.parquet")
"""What has just appeared when the process is killed: in induce, in locate, in realign with one of its two tables."""
LIMIT_S = 120


def start(place: Path, run: Path, log: Path) -> Process:
    return command("run", place / "study.yaml", "--out", run, log=log, environment={"BROWSER_PATH": "/nowhere"})


def kill_when(process: Process, appeared: Path) -> None:
    """Kill -9 as soon as a path is there; the process must still have been at work."""
    until = time.monotonic() + LIMIT_S
    while not appeared.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(LIMIT_S) == -signal.SIGKILL


@pytest.mark.long
def test_a_killed_study_ends_as_an_unbroken_one(place: Path, finished: Study, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    for moment in MOMENTS:
        kill_when(start(place, run, log), run / moment)
        assert not (run / "report.html").exists()
    assert start(place, run, log).wait(LIMIT_S) == 0, log.read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert without_times(summary) == without_times(finished.summary)
    broken, unbroken = tree(run), tree(finished.path)
    assert set(broken) == set(unbroken)
    # PEFT writes target_modules as a set, whose order differs between processes
    loose = ("manifest.json", "summary.json", "report.html", "adapter_config.json")
    manifests = [json.loads(files["manifest.json"]) for files in (broken, unbroken)]
    ours, theirs = (
        {name: without_revision(content, str(manifest["git_revision"])) for name, content in files.items()}
        for files, manifest in zip((broken, unbroken), manifests, strict=True)
    )
    assert [name for name in theirs if not name.endswith(loose) and ours[name] != theirs[name]] == []
    assert manifests[0]["hashes"] == manifests[1]["hashes"]


def without_revision(content: bytes, revision: str) -> bytes:
    """A page names the code's revision, whole and short, and somebody may commit while this test runs."""
    return content.replace(revision.encode(), b"").replace(revision[:SHORT].encode(), b"")
