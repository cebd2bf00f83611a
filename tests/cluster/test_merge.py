"""Shards in folders of their own, merged, are the run of one process; what does not fit together is refused by name."""

import json
import shutil
from pathlib import Path

import pytest

from persona_probe.cluster.merge import merge, units
from persona_probe.cluster.sharing import Shard
from persona_probe.errors import InputError
from persona_probe.runs import RunFolder
from persona_probe.study.study import Study
from tests.factories import Refused, changed, config_of, run_command, tree, write_config

TABLES = ("latents.parquet", "steering.parquet", "agreement.parquet", "readings.parquet", "evals.parquet")


@pytest.fixture(scope="module")
def serial(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study.from_yaml(place / "study.yaml", tmp_path_factory.mktemp("serial") / "run")
    return study.induce().locate().track()


@pytest.fixture(scope="module")
def parts(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """The organisms of the study, made by two shards; read only."""
    folder = tmp_path_factory.mktemp("parts")
    for number in (0, 1):
        Study.from_yaml(place / "study.yaml", folder / f"part-{number}").work_with(Shard(number, 2)).induce()
    return folder / "part-0", folder / "part-1"


def copies(parts: tuple[Path, ...], folder: Path) -> tuple[Path, ...]:
    return tuple(shutil.copytree(part, folder / part.name) for part in parts)


def test_shards_share_the_organisms(parts: tuple[Path, ...]) -> None:
    made = [{p.name for p in (part / "arms").iterdir()} for part in parts]
    assert made == [{"incorrect-s0", "incorrect-s1"}, {"correct-s0", "correct-s1"}]


def test_merged_shards_are_the_run_of_one_process(
    serial: Study, parts: tuple[Path, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run_command("merge", run, *parts)
    assert "4 units copied, 0 were there already" in capsys.readouterr().out
    study = Study.open(run).locate()
    tracked = []
    for number in (0, 1):  # what an array job does on machines without a common disk: each takes a copy along
        folder = shutil.copytree(run, tmp_path / f"track-{number}")
        Study.open(folder).work_with(Shard(number, 2)).track()
        tracked.append(folder)
    merged = merge(run, tracked)
    assert set(merged.tables) == {*TABLES} - {"agreement.parquet"}
    assert {name for name in TABLES if study.path.joinpath(name).read_bytes() != tree(serial.path)[name]} == set()
    assert set(units(run)) == set(units(serial.path))
    hashes = RunFolder.open(run).manifest["hashes"]
    assert hashes == serial.run_folder.manifest["hashes"]
    study.track()  # nothing is left to do
    assert merge(run, tracked).copied == ()


def test_seconds_of_a_folder_count_once(parts: tuple[Path, ...], tmp_path: Path) -> None:
    merge(tmp_path / "run", parts)
    first = RunFolder.open(tmp_path / "run").manifest["seconds"]
    merge(tmp_path / "run", parts)
    assert RunFolder.open(tmp_path / "run").manifest["seconds"] == first
    assert first["induce"] == pytest.approx(sum(RunFolder.open(p).manifest["seconds"]["induce"] for p in parts))


def test_an_interrupted_merge_goes_on(parts: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, take = list[str](), RunFolder.take

    def once(self: RunFolder, place: str, source: Path) -> None:
        if taken:
            raise KeyboardInterrupt
        taken.append(place)
        take(self, place, source)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "take", once)
        merge(tmp_path / "run", parts)
    merged = merge(tmp_path / "run", parts)
    assert merged.kept == 1 and len(merged.copied) == 3
    assert not (tmp_path / "run" / ".staging").exists()


def test_units_that_differ_are_named_and_nothing_is_copied(
    parts: tuple[Path, ...], tmp_path: Path, refused: Refused
) -> None:
    first, second = copies(parts, tmp_path)
    shutil.copytree(first / "arms/incorrect-s0", second / "arms/incorrect-s0")
    record = second / "arms/incorrect-s0/training.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "rows": 3}))
    line = refused("merge", tmp_path / "run", first, second)
    assert f"{record} is not the same in {first} and in {second}" in line
    assert not (tmp_path / "run" / "arms").exists()


def test_damaged_weights_are_refused(parts: tuple[Path, ...], tmp_path: Path) -> None:
    first, _ = copies(parts, tmp_path)
    weights = next(first.glob("arms/*/*/adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=f"{weights.name} does not match its sha256"):
        merge(tmp_path / "run", [first])


def test_runs_that_do_not_belong_together_are_refused(
    parts: tuple[Path, ...], place: Path, tmp_path: Path, refused: Refused
) -> None:
    first, second = copies(parts, tmp_path)
    other = write_config(tmp_path / "study.yaml", changed(config_of(place), training={"lr": 1e-3}))
    Study.from_yaml(other, tmp_path / "other")
    assert "is a run of another config" in refused("merge", first, tmp_path / "other")
    assert "is the run itself" in refused("merge", first, first)
    assert "is no run folder" in refused("merge", first, tmp_path / "nothing")
    RunFolder.open(second).update_manifest(versions={"torch": "1.0"})
    assert "was made with torch 1.0: run it again, or pass --any-versions" in refused("merge", first, second)
    assert len(merge(first, [second], any_versions=True).copied) == 2
    RunFolder.open(second).update_manifest(versions=RunFolder.open(first).manifest["versions"])
    RunFolder.open(first).update_manifest(input_hashes={"probes": "a"})
    RunFolder.open(second).update_manifest(input_hashes={"probes": "b"})
    assert "was made from another probes" in refused("merge", first, second)


def test_a_shard_says_how_it_is_written(place: Path, refused: Refused, tmp_path: Path) -> None:
    for shard, line in (("3/2", "shard 3 of 2: count from 0 to 1"), ("one", "--shard one: write NUMBER/COUNT")):
        assert line in refused("induce", place / "study.yaml", "--out", tmp_path / "run", "--shard", shard)
    assert "do not go together" in refused("induce", place / "study.yaml", "--shard", "0/2", "--share")
    assert "add --ray" in refused("induce", place / "study.yaml", "--num-gpus", "1")
