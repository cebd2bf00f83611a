"""`accelerate launch` of the whole loop in two processes: DDP, and FSDP2 with gloo, against one process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from persona_probe.cli import main
from persona_probe.errors import InputError
from persona_probe.finetune.sft import _rows_each
from persona_probe.locks import FOLDER
from persona_probe.models.ranks import Ranks
from persona_probe.monitor.track import make_reader
from persona_probe.study.study import Study
from tests.factories import Refused, Row, changed, config_of, write_config

pytestmark = pytest.mark.cluster

LIMIT_S = 240
KINDS = ("ddp", "fsdp")
ARMS = ("incorrect-s0", "correct-s0", "realigned_in-s0")
START = {
    "ddp": ["--multi_gpu"],
    "fsdp": ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"],
}
PROGRAM = {"ddp": ["-m", "persona_probe.cli"], "fsdp": [str(Path(__file__).with_name("fsdp_process.py"))]}


def settings(place: Path) -> Row:
    raw = changed(config_of(place), seeds=[0])
    raw["realign"]["arms"] = {"realigned_in": raw["realign"]["arms"]["realigned_in"]}
    return raw


def launch(folder: Path, kind: str, *command: object) -> subprocess.CompletedProcess[str]:
    """Have accelerate start a command in two processes on this machine."""
    start = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", *START[kind]]
    start += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", *PROGRAM[kind]]
    environment = {**os.environ, "BROWSER_PATH": "/nowhere", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HOME": str(folder)}  # no config of accelerate's of whoever runs the tests
    return subprocess.run(
        [sys.executable, *start, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def config(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("launched") / "study.yaml", settings(place))


@pytest.fixture(scope="module")
def single(config: Path) -> Study:
    """The run of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BROWSER_PATH", "/nowhere")
        study = Study.from_yaml(config, config.with_name("single"))
        study.run()
    return study


@pytest.fixture(scope="module", params=KINDS)
def launched(request: pytest.FixtureRequest, config: Path) -> Study:
    """The run of two processes."""
    run = config.with_name(request.param)
    done = launch(config.parent, request.param, "run", config, "--out", run)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes train together (gloo)" in done.stderr
    assert (done.stderr.count("sharded by fully_shard") > 0) == (request.param == "fsdp")
    return Study.open(run)


def test_the_run_is_whole_and_nothing_else_is_left(launched: Study, single: Study) -> None:
    left, wanted = ({str(p.relative_to(s.path)) for p in s.path.rglob("*")} for s in (launched, single))
    assert left == wanted and FOLDER not in left
    assert launched.run_folder.manifest["hashes"].keys() == single.run_folder.manifest["hashes"].keys()


@pytest.mark.parametrize("arm", ARMS)
def test_checkpoints_are_those_of_one_process(launched: Study, single: Study, arm: str) -> None:
    for folder in sorted((single.path / "arms" / arm).glob("checkpoint-*")):
        place = f"{arm} {folder.name}"
        ours = load_file(launched.path / "arms" / arm / folder.name / "adapter_model.safetensors")
        theirs = load_file(folder / "adapter_model.safetensors")
        assert {n: w.shape for n, w in ours.items()} == {n: w.shape for n, w in theirs.items()}
        for name, weights in theirs.items():
            np.testing.assert_allclose(
                ours[name].numpy(), weights.numpy(), err_msg=f"{place} {name}", rtol=1e-3, atol=2e-4
            )


@pytest.mark.parametrize("arm", ARMS)
def test_losses_are_those_of_one_process(launched: Study, single: Study, arm: str) -> None:
    records = [study.run_folder.read_json(f"arms/{arm}/training.json") for study in (launched, single)]
    np.testing.assert_allclose(records[0]["losses"], records[1]["losses"], rtol=1e-4)
    assert records[0]["rows"] == records[1]["rows"]


def test_the_monitor_reads_in_training_what_one_process_reads_from_the_checkpoint(launched: Study) -> None:
    """Also in a model that is sharded: the last reading of a correction against its saved weights."""
    table = launched.run_folder.read_table("parts/realign-realigned_in-s0.readings.parquet")
    last = table[table["step"] == table["step"].max()].set_index("feature")["mean"]
    ctx = launched.context
    with ctx.organism("realigned_in", 0) as model:
        reading = make_reader(ctx).read(model)
    for name, value in zip(reading.names, reading.values.mean(axis=0), strict=True):
        assert last[name] == pytest.approx(float(value), rel=1e-3, abs=1e-4), name
    assert sorted(table["step"].unique()) == [0, 1, 2]


@pytest.mark.parametrize("name", ["readings.parquet", "evals.parquet"])
def test_tables_are_those_of_one_process(launched: Study, single: Study, name: str) -> None:
    ours, theirs = (study.run_folder.read_table(name) for study in (launched, single))
    pd.testing.assert_frame_equal(ours, theirs, rtol=5e-3, atol=2e-3)


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "__init__", lambda self: setattr(self, "count", 2))
    with pytest.raises(InputError, match="batch_size 3 cannot be shared out to 2 processes: make it a multiple"):
        _rows_each(3)
    assert _rows_each(4) == 2


@pytest.mark.parametrize("command", ["track", "mitigate", "report"])
def test_other_commands_say_so_once(command: str, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "only run, induce and realign can work under accelerate launch" in refused(command, "anything")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        main([command, "anything"])
    assert stopped.value.code == 2
