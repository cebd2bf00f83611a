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

from persona_probe import runs
from persona_probe.cluster.ray_workers import RayWorkers
from persona_probe.errors import InputError
from persona_probe.locks import FOLDER
from persona_probe.realignment.spec import Block, DosePlan
from persona_probe.study.study import Study
from tests.factories import changed, config_of, tree, without_times, write_config

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def workers() -> Iterator[RayWorkers]:
    """Two CPUs on this machine, for all tests here."""
    with RayWorkers(workers=2) as workers:
        yield workers


@pytest.fixture(scope="module")
def pair(place: Path, workers: RayWorkers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Study]:
    """The whole loop in one process, and with Ray; of the latter one worker was killed at work."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BROWSER_PATH", "/nowhere")
        patch.setattr(runs, "git_revision", lambda: "0" * 40)  # a commit between the two would be in the figures
        config = write_config(folder / "study.yaml", changed(config_of(place), seeds=[0]))
        serial = Study.from_yaml(config, folder / "serial")
        serial.run()
        rayed = Study.from_yaml(config, folder / "ray").work_with(workers)
        killed = list[int]()
        killer = threading.Thread(target=kill_one, args=(rayed.path, killed), daemon=True)
        killer.start()
        rayed.run()
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


LOOSE = ("manifest.json", "summary.json", "report.html", "adapter_config.json")
"""Files with times, or with a set in an order of its process."""


def test_the_run_is_that_of_one_process_although_a_worker_was_lost(pair: tuple[Study, Study]) -> None:
    serial, rayed = (tree(study.path) for study in pair)
    assert set(serial) == set(rayed)
    assert [name for name in serial if not name.endswith(LOOSE) and serial[name] != rayed[name]] == []
    assert without_times(pair[0].summary) == without_times(pair[1].summary)
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
    pd.testing.assert_frame_equal(*tables)
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
