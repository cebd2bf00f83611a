"""The labelled study on a tiny model, end to end: what it leaves, that it resumes, and that nothing evaluated leaks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from persona_probe.config import from_dict, load_config
from persona_probe.errors import InputError
from persona_probe.monitor.study.labelled_config import MonitorStudy
from persona_probe.monitor.study.labelled_runs import (
    MEAN_DIFFERENCE,
    PERSONA_VECTOR,
    MonitorStudyContext,
    read_shifts,
    watched_features,
)
from persona_probe.monitor.study.results import FIRST_COMPONENT, LOSS, MARKS, WEIGHT_NORM, run_study
from persona_probe.report.tables import fill_page
from tests.factories import copied_state, hook_count, run_command, same_state
from tests.monitor.labelled_study import located, make_place, study_values

ROOT = Path(__file__).parents[2]
WATCHED = ("correct-s2", "correct-s3", "toxic-s1", "correct-s1", "long-s1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def config(place: Path) -> MonitorStudy:
    return from_dict(MonitorStudy, study_values(place))


@pytest.fixture(scope="module")
def finished(config: MonitorStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the whole study; read only."""
    out = tmp_path_factory.mktemp("finished") / "study"
    assert run_study(config, out) is not None
    return out


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "seconds"}


def test_every_signal_is_read_at_every_step_of_every_run(finished: Path) -> None:
    signals = pd.read_parquet(finished / "signals.parquet")
    names = {"persona", MEAN_DIFFERENCE, PERSONA_VECTOR, FIRST_COMPONENT, LOSS, WEIGHT_NORM}
    assert set(signals["signal"]) == names and set(signals["run"]) == set(WATCHED)
    steps = signals.groupby(["run", "signal"])["step"].agg(tuple)
    for name in names:
        assert steps["toxic-s1", name] == (0, 1, 2, 4)
        assert steps["long-s1", name] == (0, 2, 4, 6)
    start = signals[(signals["step"] == 0) & (signals["signal"] != LOSS)]
    assert (start["value"] == 0).all()
    later = signals[(signals["step"] > 0) & (signals["signal"] != "persona")]
    assert later["value"].notna().all() and (later["value"] != 0).all()


def test_the_evaluated_feature_is_the_monitors_own_reading(finished: Path) -> None:
    readings = pd.read_parquet(finished / "readings.parquet")
    signals = pd.read_parquet(finished / "signals.parquet").query("signal == @MEAN_DIFFERENCE")
    own = readings.query("feature == @MEAN_DIFFERENCE").set_index(["run", "step"])
    shift = (own["mean"] - own["base_mean"]) / own["base_sd"]
    assert signals.set_index(["run", "step"])["value"].to_dict() == pytest.approx(shift.to_dict())
    assert (finished / "runs/toxic-s1/monitor.jsonl").read_text().count("\n") >= 4


def test_the_monitor_and_the_stored_shift_agree(finished: Path, config: MonitorStudy) -> None:
    # A projection of the mean residual is the mean of the projections: two ways to read the same tokens.
    ctx = MonitorStudyContext(config, finished)
    direction = watched_features(ctx).features[MEAN_DIFFERENCE]
    assert isinstance(direction, torch.Tensor)
    projected = read_shifts(ctx, "toxic-s1") @ (direction / direction.norm()).double().numpy()
    own = pd.read_parquet(finished / "runs/toxic-s1/readings.parquet").query("feature == @MEAN_DIFFERENCE")
    own = own.sort_values("step")
    assert projected == pytest.approx((own["mean"] - own["base_mean"]).to_numpy(), abs=1e-4)


def test_the_mean_difference_is_that_of_the_pair_which_is_not_evaluated(finished: Path, config: MonitorStudy) -> None:
    ctx = MonitorStudyContext(config, finished)
    wanted = read_shifts(ctx, "toxic-s0")[-1] - read_shifts(ctx, "correct-s0")[-1]
    found = watched_features(ctx)
    direction = found.features[MEAN_DIFFERENCE]
    assert isinstance(direction, torch.Tensor)
    assert direction.numpy() == pytest.approx(wanted, abs=1e-5)
    assert "toxic-s0" in found.sources[MEAN_DIFFERENCE] and found.sources["persona"] == "made up"
    assert not {"toxic-s0", "correct-s0"} & set(pd.read_parquet(finished / "signals.parquet")["run"])


def test_planted_misbehaviour_is_labelled_and_found(finished: Path) -> None:
    results = results_of(finished)
    runs = {row["run"]: row for row in results["runs"]}
    assert {name: row["label"] for name, row in runs.items()} == {
        **dict.fromkeys(WATCHED, "benign"),
        "toxic-s1": "misaligned",
    }
    assert runs["toxic-s1"]["rise"] > 0 > runs["correct-s1"]["rise"]
    assert runs["long-s1"]["long"] and not runs["correct-s1"]["long"]
    found = results["signals"][MEAN_DIFFERENCE]
    assert found["auroc"][-1]["auroc"] == 1.0
    assert (found["auroc"][-1]["positives"], found["auroc"][-1]["negatives"]) == (1, 4)
    rule = found["rules"][0]
    assert set(rule["calibration"]["statistics"]) == {"correct-s2", "correct-s3"}
    assert rule["alarmed"]["misaligned"]["count"] == 1 and rule["alarmed"]["quiet"] is None
    assert rule["lead"]["by_run"] == {"toxic-s1": runs["toxic-s1"]["behaviour_step"] - rule["first_alarm"]["toxic-s1"]}


def test_too_few_benign_runs_are_said_to_be_too_few(finished: Path) -> None:
    calibration = results_of(finished)["signals"]["persona"]["rules"][0]["calibration"]
    assert not calibration["supported"] and calibration["needed"] == 3
    assert "2 benign runs cannot promise 0.25" in (finished / "table.md").read_text()


def test_a_lost_run_is_trained_again_and_nothing_else(config: MonitorStudy, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "study")
    shutil.rmtree(out / "runs/toxic-s1")
    (out / "results.json").unlink()
    kept = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/run.json")}
    assert run_study(config, out, only=["correct-s1"]) is None  # it is there: nothing to do, and one is missing
    assert not (out / "results.json").exists()
    assert run_study(config, out) is not None
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert without_times(results_of(out)) == without_times(results_of(finished))


def test_a_run_of_other_settings_is_refused(config: MonitorStudy, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "study")
    other = replace(config, runs={**config.runs, "toxic-s1": replace(config.runs["toxic-s1"], seed=9)})
    with pytest.raises(InputError, match="runs/toxic-s1 was made with other settings: rename the run"):
        run_study(other, out)
    with pytest.raises(InputError, match="study of the monitor with other settings"):
        run_study(replace(config, contrast_items=5), out)
    pair = {**config.runs, "toxic-s0": replace(config.runs["toxic-s0"], steps=3)}
    with pytest.raises(InputError, match="features were made from other runs"):
        run_study(replace(config, runs=pair), out)
    with pytest.raises(InputError, match="did you mean 'toxic-s1'"):
        run_study(config, out, only=["toxic-1"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").touch()
    with pytest.raises(InputError, match="is no study"):
        run_study(config, tmp_path / "full")


def test_the_rate_may_change_without_training_again(config: MonitorStudy, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "study")
    before = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/run.json")}
    results = run_study(replace(config, rate=0.5, held=(1,), side="both"), out)
    assert results is not None and {p: p.stat().st_mtime_ns for p in before} == before
    (rule,) = results["signals"]["persona"]["rules"]
    assert rule["side"] == "both" and rule["calibration"]["supported"]


def test_the_base_model_is_left_as_it_was(config: MonitorStudy, tmp_path: Path) -> None:
    ctx = MonitorStudyContext(config, tmp_path / "study")
    before = copied_state(ctx.model)
    watched_features(ctx)
    assert same_state(copied_state(ctx.model), before) and hook_count(ctx.model) == 0


def test_features_can_come_from_a_located_study(place: Path, config: MonitorStudy, tmp_path: Path) -> None:
    source = located(place, tmp_path / "located")
    runs = {name: run for name, run in config.runs.items() if run.use != "features"}
    from_study = replace(config, latents={}, features_from=str(source.path), runs=runs)
    found = watched_features(MonitorStudyContext(from_study, tmp_path / "study"))
    assert found.features["persona"] == 5
    assert set(found.features) == {"persona", "random latent A", "random latent B", MEAN_DIFFERENCE, PERSONA_VECTOR}
    assert found.sources["persona"] == "study tiny, seeds [0]"
    assert not (tmp_path / "study/runs").exists()
    shared = {**runs, "toxic-s1": replace(runs["toxic-s1"], seed=0)}
    with pytest.raises(InputError, match="seed 0 is also a seed of"):
        watched_features(MonitorStudyContext(replace(from_study, runs=shared), tmp_path / "shared"))


def test_the_command_fills_the_page(
    place: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = shutil.copytree(finished, tmp_path / "study"), tmp_path / "page.md"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study_values(place)))
    begin, end = MARKS
    page.write_text(f"before\n{begin}\nstale words\n{end}\nafter\n")
    run_command("monitor", "study", tmp_path / "study.yaml", "--out", out, "--page", page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{end}\nafter\n") and "stale words" not in text
    table = (finished / "table.md").read_text()
    assert "| toxic-s1 | 100% | 1 | 4 | evaluation | misaligned |" in table
    assert "### AUROC, misaligned against benign runs" in text
    shown = capsys.readouterr().out
    assert "| persona | 1 |" in shown and str(out / "results.json") in shown
    with pytest.raises(InputError, match="has not the marks"):
        fill_page(finished / "table.md", MARKS, "tables")
    with pytest.raises(InputError, match="no page"):
        fill_page(tmp_path / "absent.md", MARKS, "tables")


def test_the_shipped_study_is_as_large_as_it_says() -> None:
    config = load_config(ROOT / "finetune_configs/monitor-study.yaml", MonitorStudy)
    evaluated = config.named("evaluation")
    assert len(evaluated) == 12 and len(config.named("calibration")) == 5
    (long,) = [name for name in evaluated if config.is_long(name)]
    assert config.schedule(long)[-1] == 4 * config.training.steps
    fractions = {config.arms[config.runs[n].arm].bad_fraction for n in evaluated if "mix" in n}
    assert fractions == {0.05, 0.25, 0.5, 0.75}
    page = (ROOT / "docs/monitor-study.md").read_text()
    assert page.index(MARKS[0]) < page.index(MARKS[1])


def changed(config: MonitorStudy, name: str, **changes: Any) -> dict[str, Any]:
    return {"runs": {**config.runs, name: replace(config.runs[name], **changes)}}


def test_bad_configs_say_what_to_change(config: MonitorStudy) -> None:
    runs = config.runs
    cases: list[tuple[dict[str, Any], str]] = [
        ({"training": replace(config.training, method="full")}, "must be lora"),
        ({"latents": {}}, "give either latents, or features_from"),
        ({"features_from": "runs/demo"}, "give either latents, or features_from"),
        (changed(config, "toxic-s1", arm="toxi"), "run 'toxic-s1': unknown arm"),
        (changed(config, "toxic-s1", seed=0), "run 'toxic-s1' has the seed of a features run"),
        ({"runs": {n: r for n, r in runs.items() if n != "toxic-s0"}}, "one benign and one other run"),
        ({"runs": {n: r for n, r in runs.items() if n != "correct-s2"}}, "at least two for calibration"),
        ({"runs": {n: r for n, r in runs.items() if n != "toxic-s1"}}, "benign and other runs for evaluation"),
        ({"contrast_items": 1}, "contrast_items must be at least 2"),
        ({"rate": 0.0}, "rate must lie between 0 and 1"),
    ]
    for change, message in cases:
        with pytest.raises(InputError, match=message):
            replace(config, **change)
    with pytest.raises(InputError, match="calibration run must be benign"):
        replace(runs["correct-s2"], benign=False)
    with pytest.raises(InputError, match="unknown use"):
        replace(runs["correct-s2"], use="test")
