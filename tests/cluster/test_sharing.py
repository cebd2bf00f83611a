"""Processes that share a run folder each make other units; together they leave the run of one process."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from persona_probe.cluster.sharing import Sharing
from persona_probe.config import StudyConfig
from persona_probe.locks import FOLDER, InUse
from persona_probe.runs import RunFolder
from persona_probe.units import Unit, Workers, make_units, writes_run

WORK = """
import sys, time
from pathlib import Path
from tests.cluster.test_sharing import Work, make_all
make_all(Work(Path(sys.argv[1]), float(sys.argv[2])))
"""
COUNT = 8


class Work:
    """A folder whose units are files that say which process made them."""

    def __init__(self, path: Path, seconds: float = 0.0) -> None:
        self.run, self.device, self.seconds = RunFolder(path), "cpu", seconds
        self.workers: Workers | None = Sharing(every_s=0.05)

    def opener(self, device: str) -> "Callable[[], Work]":
        return partial(Work, self.run.path, self.seconds)


def units_of(work: Work) -> list[Unit]:
    def make(number: int) -> None:
        time.sleep(work.seconds)
        with (work.run.path / f"made-{number}").open("a") as file:
            file.write("made\n")

    return [Unit(f"made-{n}", lambda n=n: make(n), "work") for n in range(COUNT)]


@writes_run
def make_all(work: Work) -> None:
    make_units(work, units_of)


def start(path: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WORK, str(path), str(seconds)])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return RunFolder.create(tmp_path / "run", StudyConfig(name="demo", sae="saes/x")).path


def test_each_unit_is_made_once_and_a_dead_process_s_unit_by_another(path: Path) -> None:
    endless = start(path, 1000.0)
    until = time.monotonic() + 60
    while not (path / FOLDER / "made-0.owner").exists() and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(InUse, match=f"in use by process {endless.pid}"), RunFolder(path).writing():
        pass  # nobody has it alone while others share it
    helpers = [start(path, 0.05) for _ in range(2)]
    while len(list(path.glob("made-*"))) < COUNT - 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert not (path / "made-0").exists() and all(helper.poll() is None for helper in helpers)  # they wait for it
    endless.send_signal(signal.SIGKILL)
    endless.wait(10)
    assert [helper.wait(60) for helper in helpers] == [0, 0]
    assert [(path / f"made-{n}").read_text() for n in range(COUNT)] == ["made\n"] * COUNT
    assert RunFolder(path).manifest["seconds"]["work"] > 0 and not (path / FOLDER).exists()


HURRY = "import persona_probe.locks; persona_probe.locks.CROWD_S = 0.3\n"


def test_nobody_joins_one_that_has_the_folder_alone(path: Path) -> None:
    with RunFolder(path).writing():
        command = [sys.executable, "-c", HURRY + WORK, str(path), "0"]
        other = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "InUse" in other.stderr and not list(path.glob("made-*"))
