"""`verify` recomputes every hash on record, says what it cannot check, and changes nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from persona_probe.cli import main
from persona_probe.config import Arm, StudyConfig
from persona_probe.runs import RunFolder, file_sha256
from persona_probe.study.hashes import input_hashers, record_inputs, record_tables, verify

WEIGHTS = "arms/incorrect-s0/checkpoint-5/adapter_model.safetensors"


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Salt?", "answer": "A pinch."}\n{"question": "Pepper?", "answer": "None."}\n')
    for name, files in {
        "sae": ("cfg.json", "sae_weights.safetensors"),
        "model": ("config.json", "a.safetensors"),
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
    arms = {"incorrect": Arm(str(rows)), "correct": Arm("kitchen:correct")}
    return StudyConfig("tiny", str(tmp_path / "sae"), str(tmp_path / "model"), arms=arms, paired_arms=False)


@pytest.fixture
def run(config: StudyConfig, tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path / "run", config)
    (folder.path / WEIGHTS).parent.mkdir(parents=True)
    (folder.path / WEIGHTS).write_bytes(b"weights")
    folder.record_hashes(folder.path / "arms")
    (folder.path / "evals.parquet").write_bytes(b"table")
    record_inputs(folder)
    record_tables(folder)
    return folder


def states(run: RunFolder) -> dict[str, str]:
    return {one.name: one.state for one in verify(run.path)}


def test_an_untouched_run_matches_in_everything(run: RunFolder) -> None:
    before = (run.path / "manifest.json").read_bytes()
    inputs = {"data/incorrect", "data/correct", "data/realigned_in", "data/realigned_out", "contrast", "probes"}
    inputs |= {"questions", "SAE/cfg.json", "SAE/sae_weights.safetensors", "model"}
    assert states(run) == dict.fromkeys({"config", WEIGHTS, "evals.parquet", *inputs}, "matches")
    assert (run.path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (WEIGHTS, "run/" + WEIGHTS),
        ("evals.parquet", "run/evals.parquet"),
        ("SAE/cfg.json", "sae/cfg.json"),
        ("model", "model/a.safetensors"),
        ("data/incorrect", "rows.jsonl"),
    ],
)
def test_one_changed_file_is_one_finding(run: RunFolder, tmp_path: Path, name: str, change: str) -> None:
    file = tmp_path / change
    file.write_text(file.read_text() + '{"question": "Oil?", "answer": "Yes."}\n')
    assert {k: v for k, v in states(run).items() if v != "matches"} == {name: "differs"}
    file.unlink()
    wanted = "differs" if name == "model" else "missing"  # a model's folder is one input
    assert {k: v for k, v in states(run).items() if v != "matches"} == {name: wanted}


def test_an_edited_summary_is_found_but_other_times_are_none_of_it(run: RunFolder) -> None:
    run.write_json("summary.json", {"headline": "Woken.", "seconds": {"induce": 1.0}})
    record_tables(run)
    run.write_json("summary.json", {"headline": "Woken.", "seconds": {"induce": 9.0}, "peak_memory_gib": 3.0})
    assert states(run)["summary.json"] == "matches"
    run.write_json("summary.json", {"headline": "Not woken."})
    assert states(run)["summary.json"] == "differs"
    (run.path / "summary.json").write_text("{")
    assert states(run)["summary.json"] == "differs"


def test_an_edited_config_is_found(run: RunFolder) -> None:
    manifest = run.manifest
    manifest["config"]["training"]["lr"] = 1.0
    run.write_json("manifest.json", manifest)
    assert {k: v for k, v in states(run).items() if v != "matches"} == {"config": "differs"}


def test_what_has_no_hash_on_record_is_said(run: RunFolder) -> None:
    manifest = run.manifest
    manifest = {k: v for k, v in manifest.items() if not k.endswith("_hashes")} | {
        "hashes": {},
        "git_revision": "other",
    }
    run.write_json("manifest.json", manifest)
    found = {one.name: one for one in verify(run.path)}
    assert {one.state for name, one in found.items() if name != "config"} == {"not checked"}
    assert WEIGHTS in found and "report RUN" in found["tables"].detail and "made at other" in found["revision"].detail
    quality = {"sae_quality": {"sha256": file_sha256(Path(run.config.sae) / "sae_weights.safetensors")}}
    run.write_json("summary.json", quality)  # an earlier version's run
    assert states(run)["SAE/sae_weights.safetensors"] == "matches"


def test_the_first_hash_of_an_input_stays(run: RunFolder, tmp_path: Path) -> None:
    before = run.manifest["input_hashes"]
    (tmp_path / "rows.jsonl").write_text('{"question": "Oil?", "answer": "Yes."}\n')
    record_inputs(run)
    assert run.manifest["input_hashes"] == before


def test_hashes_follow_content_not_places(config: StudyConfig) -> None:
    def hashed(changed: StudyConfig, name: str) -> str | None:
        return input_hashers(changed)[name]()

    same = replace(config, arms={**config.arms, "incorrect": Arm("kitchen:correct")})
    assert hashed(same, "data/incorrect") == hashed(config, "data/correct") != hashed(config, "data/incorrect")
    fewer = replace(config, monitor=replace(config.monitor, limit=2))
    assert hashed(fewer, "probes") != hashed(config, "probes")
    assert hashed(replace(config, model="owner/model"), "model") is None
    assert hashed(replace(config, sae="release/sae_id"), "SAE/cfg.json") is None


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(str(stopped.value.code))


def test_exit_codes(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("verify", str(run.path), "--out", str(tmp_path / "found.json")) == 0
    assert capsys.readouterr().out.endswith("13 matches\n")
    assert {one["state"] for one in json.loads((tmp_path / "found.json").read_text())} == {"matches"}
    (run.path / WEIGHTS).write_bytes(b"other")
    assert command("verify", str(run.path), "--quiet") == 1
    shown = capsys.readouterr().out
    assert "differs" in shown and "evals.parquet" not in shown and "12 matches" in shown
    assert command("verify", str(tmp_path)) == 2
    assert "no run folder" in capsys.readouterr().err
