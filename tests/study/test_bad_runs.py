"""Damaged, foreign or unfinished run folders, lost numbers and full disks: refused, and nothing is lost."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from persona_probe.study.study import Study
from tests.factories import Refused, Row, changed, tree, write_config


@pytest.fixture
def run(finished: Study, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished.path, tmp_path / "run")


@pytest.fixture(scope="module")
def trained(finished: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run after induce and nothing else; read only."""
    run = shutil.copytree(finished.path, tmp_path_factory.mktemp("trained") / "run")
    for path in run.iterdir():
        if path.is_file() and path.name != "manifest.json":
            path.unlink()
    for gone in ("parts", "figures", *(f"arms/realigned_{w}-s{s}" for w in ("in", "out") for s in (0, 1))):
        shutil.rmtree(run / gone)
    return run


def weights_of(run: Path) -> Path:
    return run / "arms" / "incorrect-s0" / "checkpoint-2" / "adapter_model.safetensors"


def test_an_adapter_cut_short(run: Path, refused: Refused) -> None:
    weights = weights_of(run)
    weights.write_bytes(weights.read_bytes()[:-50])
    (run / "parts" / "track-incorrect-s0.evals.parquet").unlink()
    before = tree(run)
    said = refused("track", run)
    assert f"{weights} does not match its sha256 in manifest.json: move {weights.parents[1]} elsewhere" in said
    after = tree(run)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }


def test_locating_again_does_not_bless_a_damaged_adapter(run: Path, refused: Refused) -> None:
    weights = weights_of(run)
    weights.write_bytes(weights.read_bytes()[:-50])
    for part in (run / "parts").iterdir():
        part.unlink()
    Study.open(run).locate()
    assert "does not match its sha256" in refused("track", run)


def test_a_folder_of_another_config(run: Path, raw: Row, refused: Refused, tmp_path: Path) -> None:
    config = write_config(tmp_path / "other.yaml", changed(raw, name="other"))
    before = tree(run)
    said = refused("run", config, "--out", run)
    assert "holds the run of another config (name is 'tiny' there, not 'other'): choose another --out" in said
    assert "unknown device" in refused("induce", config, "--out", run, "--overwrite", "--device", "gpu")
    assert tree(run) == before
    replaced = Study.from_yaml(config, run, overwrite=True)
    assert replaced.config.name == "other" and set(tree(run)) == {"manifest.json"}
    assert tree(run.with_name(f"{run.name}.old")) == before


@pytest.mark.parametrize("command", ["locate", "track", "realign", "evaluate", "report", "figures"])
def test_a_folder_that_is_no_run(command: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert "is no run folder: it has no manifest.json" in refused(command, tmp_path)
    assert set(tree(tmp_path)) == {"thesis.tex"}


@pytest.mark.parametrize("command", ["track", "realign"])
def test_reading_features_before_locating_them(command: str, trained: Path, refused: Refused) -> None:
    before = set(tree(trained))
    assert "run `persona-probe locate RUN` first" in refused(command, trained)
    assert set(tree(trained)) == before


@pytest.mark.parametrize("done, wanted", [((), "locate"), (("latents", "steering"), "track")])
def test_reporting_before_the_readings(
    done: tuple[str, ...], wanted: str, trained: Path, finished: Study, refused: Refused, tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    for table in done:
        shutil.copy(finished.path / f"{table}.parquet", run)
    assert f"run `persona-probe {wanted} RUN` first" in refused("report", run)
    assert not (run / "summary.json").exists()


def test_locating_before_training(place: Path, refused: Refused, tmp_path: Path) -> None:
    Study.from_yaml(place / "study.yaml", tmp_path / "run")
    assert "unknown organism 'incorrect-s0'" in refused("locate", tmp_path / "run")


def test_the_seed_of_draws_is_fixed(run: Path, refused: Refused) -> None:
    before = tree(run)
    assert "this run draws with seed 0, not 3: leave --seed out" in refused("track", run, "--seed", 3)
    assert tree(run) == before


def test_a_copy_that_exists_is_not_replaced(run: Path, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    assert "copy exists: choose another --out" in refused("track", run, "--out", tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())


@pytest.mark.parametrize(
    "arguments", [("--device", "gpu"), ("--seed", "3")], ids=["unknown device", "another draw seed"]
)
def test_a_refused_command_leaves_no_copy(
    run: Path, refused: Refused, tmp_path: Path, arguments: tuple[str, str]
) -> None:
    refused("track", run, "--out", tmp_path / "copy", *arguments)
    assert not (tmp_path / "copy").exists()


def test_an_unknown_figure(run: Path, refused: Refused) -> None:
    before = tree(run)
    assert "unknown figure 'arm': did you mean 'arms'" in refused("figures", run, "--only", "arm")
    assert tree(run) == before


def test_a_damaged_manifest(run: Path, refused: Refused) -> None:
    manifest = run / "manifest.json"
    manifest.write_text(manifest.read_text()[:300])
    assert "manifest.json is damaged" in refused("track", run)


def test_a_loss_that_is_lost(raw: Row, refused: Refused, tmp_path: Path) -> None:
    training = {"lr": 1e30, "warmup_steps": 3, "steps": 6, "checkpoints": [1, 2, 3, 4, 5]}
    config = write_config(tmp_path / "c.yaml", changed(raw, seeds=[0], training=training))
    said = refused("induce", config, "--out", tmp_path / "run")
    assert "arm incorrect, seed 0: the " in said and " at step 3: lower lr" in said
    kept = tmp_path / "run" / "arms" / "incorrect-s0.diverged"
    assert str(kept) in said
    assert sorted(p.name for p in kept.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "run" / "arms" / "incorrect-s0").exists()


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond `room` bytes: the system then refuses writes as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [500, 9000], ids=["no manifest", "no adapter"])
def test_a_full_disk_while_training(room: int, place: Path, refused: Refused, tmp_path: Path) -> None:
    with full_disk(room):
        said = refused("induce", place / "study.yaml", "--out", tmp_path / "run")
    assert "raise the limit (ulimit -f)" in said
    assert not (tmp_path / "run" / "arms").exists()
    assert not [p for p in (tmp_path / "run").glob(".*") if p.name != ".staging"]


def test_a_full_disk_while_reading(run: Path, refused: Refused) -> None:
    (run / "parts" / "track-incorrect-s0.evals.parquet").unlink()
    whole = (run / "readings.parquet").read_bytes()
    size = (run / "manifest.json").stat().st_size
    with full_disk(size + 200):
        said = refused("track", run)
    assert "could not write" in said and "raise the limit (ulimit -f) or choose another --out" in said
    assert (run / "readings.parquet").read_bytes() == whole
    Study.open(run).track()
    assert (run / "parts" / "track-incorrect-s0.evals.parquet").is_file()
