"""Two processes on one run folder: one works, the other is told; a killed one leaves the run to the next."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from persona_probe.locks import FOLDER
from persona_probe.runs import RunFolder
from persona_probe.study.study import Study
from tests.factories import Refused
from tests.processes import Process, command

LIMIT_S = 120


@pytest.fixture
def working(place: Path, tmp_path: Path) -> Iterator[Process]:
    """A process that induces, stopped while it has the run."""
    process = command("induce", place / "study.yaml", "--out", tmp_path / "run", log=tmp_path / "log")
    until = time.monotonic() + LIMIT_S
    while not (tmp_path / "run" / FOLDER / "arms--incorrect-s0.owner").exists() and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    assert process.poll() is None, (tmp_path / "log").read_text()
    yield process
    process.kill()
    process.wait(10)


def checkpoints(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run / "arms")) for p in run.glob("arms/*/checkpoint-*"))


ALL = sorted(f"{arm}-s{seed}/checkpoint-{n}" for arm in ("correct", "incorrect") for seed in (0, 1) for n in (1, 2, 4))


def test_the_second_is_told_and_the_first_finishes(
    working: Process, place: Path, tmp_path: Path, refused: Refused
) -> None:
    run, config = tmp_path / "run", str(place / "study.yaml")
    for second in ("induce", "run"):
        line = refused(second, config, "--out", run)
        assert f"{run} is in use by process {working.pid} on " in line
    assert "to do" in repr(Study.open(run))  # readers go on
    working.send_signal(signal.SIGCONT)
    assert working.wait(LIMIT_S) == 0
    assert checkpoints(run) == ALL
    weights = {str(p.relative_to(run)) for p in run.glob("arms/*/checkpoint-*/*.safetensors")}
    assert set(RunFolder(run).manifest["hashes"]) == weights


def test_a_killed_owner_leaves_the_run_to_the_next(working: Process, place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    working.kill()
    working.wait(10)
    assert (run / FOLDER / "run.lock").exists()  # its file is left, but nobody holds it
    Study.from_yaml(place / "study.yaml", run).induce()
    assert not (run / FOLDER).exists() and checkpoints(run) == ALL
