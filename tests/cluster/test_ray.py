"""Ray tasks make the units of a run: the tables are those of a serial run, a lost worker's unit is made again."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from persona_probe.cluster.ray_workers import RayWorkers, _knock
from persona_probe.config import from_dict
from persona_probe.errors import InputError
from persona_probe.locks import FOLDER
from persona_probe.mitigate.grid.grid_run import run_grid
from persona_probe.mitigate.grid.grid_table import TIMES
from persona_probe.monitor.study.labelled_config import MonitorStudy
from persona_probe.monitor.study.results import run_study
from persona_probe.realignment.spec import Block, DosePlan
from persona_probe.study.study import Study
from persona_probe.writing import json_values
from tests.factories import changed, config_of, tree, write_config
from tests.mitigate import grid_study
from tests.monitor import labelled_study

pytestmark = pytest.mark.cluster

pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def no_browser() -> Iterator[None]:
    """A browser would draw the figures' images: slow, and not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BROWSER_PATH", "/nowhere")
        yield


@pytest.fixture(scope="module")
def workers() -> Iterator[RayWorkers]:
    """Two CPUs on this machine, for all tests here."""
    with RayWorkers(workers=2) as workers:
        yield workers


@pytest.fixture(scope="module")
def pair(place: Path, workers: RayWorkers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Study]:
    """The stages in one process, and with Ray; of the latter one worker was killed at work."""
    folder = tmp_path_factory.mktemp("runs")
    raw = changed(config_of(place), seeds=[0])
    del raw["realign"]["arms"]["realigned_out"]
    config = write_config(folder / "study.yaml", raw)
    serial = Study.from_yaml(config, folder / "serial")
    serial.check().induce().locate().track().realign().evaluate()
    rayed = Study.from_yaml(config, folder / "ray").work_with(workers)
    killed = list[int]()
    killer = threading.Thread(target=kill_one, args=(rayed.path, killed), daemon=True)
    killer.start()
    rayed.check().induce().locate().track().realign().evaluate()
    killer.join()
    assert len(killed) == 1 and killed[0] != os.getpid()
    return serial, rayed


def kill_one(run: Path, killed: list[int]) -> None:
    """Kill -9 the first process that says that it is making an organism."""
    until = time.monotonic() + 120
    while not killed and time.monotonic() < until:
        for owner in (run / FOLDER).glob("arms--*.owner"):
            try:
                process = json.loads(owner.read_text())["pid"]
            except (OSError, ValueError):
                continue
            os.kill(process, signal.SIGKILL)
            killed.append(process)
            return
        time.sleep(0.005)


LOOSE = ("manifest.json", "adapter_config.json")
"""Files with times, or with a set in an order of its process."""


def test_the_run_is_that_of_one_process_although_a_worker_was_lost(pair: tuple[Study, Study]) -> None:
    serial, rayed = (tree(study.path) for study in pair)
    assert set(serial) == set(rayed)
    assert [name for name in serial if not name.endswith(LOOSE) and serial[name] != rayed[name]] == []
    manifests = [study.run_folder.manifest for study in pair]
    assert manifests[0]["hashes"] == manifests[1]["hashes"]
    assert manifests[0]["seconds"].keys() == manifests[1]["seconds"].keys()


def test_a_grid_of_corrections_is_that_of_one_process(
    pair: tuple[Study, Study], place: Path, workers: RayWorkers, tmp_path: Path
) -> None:
    plan = DosePlan("doses", (Block((str(place / "holdout.jsonl"),), (4, 8)),), seeds=(0,), steps=2, readings=(0, 2))
    tables = []
    for name, crew in (("serial", None), ("ray", workers)):
        study = Study.open(shutil.copytree(pair[0].path, tmp_path / name)).work_with(crew)
        tables.append(study.realign_plan(plan))
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert len(tables[0]) == 2 and not tables[0]["diverged"].any()


def test_an_error_of_a_unit_is_the_run_s_error(place: Path, workers: RayWorkers, tmp_path: Path) -> None:
    raw = changed(config_of(place), training={"lr": 1e30})
    study = Study.from_yaml(write_config(tmp_path / "study.yaml", raw), tmp_path / "run").work_with(workers)
    with pytest.raises(InputError, match="lower lr"):
        study.induce()
    assert not list(study.path.glob("arms/*s0")) or study.path.exists()


def test_an_address_without_a_cluster_is_refused(place: Path, refused: Any, tmp_path: Path) -> None:
    line = refused("induce", place / "study.yaml", "--out", tmp_path / "run", "--ray", "nowhere")
    assert "'nowhere' is no address of a cluster: write auto, HOST:PORT or ray://HOST:PORT" in line
    assert not (tmp_path / "run").exists()
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):  # before Ray tries for minutes
        with pytest.raises(ConnectionRefusedError):
            _knock(address)


def test_a_grid_of_mitigations_is_that_of_one_process(workers: RayWorkers, tmp_path: Path) -> None:
    place = grid_study.make_place(tmp_path)
    raw = grid_study.grid_values(place, grid_study.located(place, place / "run"))
    grid = grid_study.grid_of(raw, mitigations=raw["mitigations"][:1], answers=None)
    outcomes = [run_grid(grid, tmp_path / name, workers=crew) for name, crew in (("serial", None), ("ray", workers))]
    tables = [outcome.table.drop(columns=list(TIMES), errors="ignore") for outcome in outcomes]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    serial, rayed = (tree(tmp_path / name) for name in ("serial", "ray"))
    assert set(serial) == set(rayed) and serial["items.parquet"] == rayed["items.parquet"]


def test_a_study_of_the_monitor_is_that_of_one_process(workers: RayWorkers, tmp_path: Path) -> None:
    config = from_dict(MonitorStudy, labelled_study.study_values(labelled_study.make_place(tmp_path)))
    results = [run_study(config, tmp_path / name, workers=crew) for name, crew in (("serial", None), ("ray", workers))]
    timeless = [{key: value for key, value in (result or {}).items() if key != "seconds"} for result in results]
    assert timeless[0] and json_values(timeless[0]) == json_values(timeless[1])
    serial, rayed = (tree(tmp_path / name) for name in ("serial", "ray"))
    assert set(serial) == set(rayed)
    for name in [name for name in serial if name.endswith(".parquet")]:
        frames = [pd.read_parquet(tmp_path / run / name) for run in ("serial", "ray")]
        left, right = (frame.drop(columns="seconds", errors="ignore") for frame in frames)
        pd.testing.assert_frame_equal(left, right, check_exact=True)
