"""The whole loop on a tiny model: what it leaves, what must be equal in it, and that it repeats."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from persona_probe.report.figures import FIGURES
from persona_probe.study.study import Study
from tests.factories import OMITTED, Row, copied_state, hook_count, same_state, tree, without_times

ARMS = ("base", "incorrect", "correct", "realigned_in", "realigned_out")
CAUTION = "A feature that subsided does not show a safe model: behaviour on other prompts than these was not measured."
TABLES = ("readings.parquet", "latents.parquet", "steering.parquet", "evals.parquet")
ESTIMATES = ("effect_incorrect_minus_correct", "steer_base_up", "steer_organism_down", "random_latent_p95")


def at(frame: pd.DataFrame, arm: str, seed: int, step: int) -> pd.DataFrame:
    """Rows of one organism."""
    return frame[(frame["arm"] == arm) & (frame["seed"] == seed) & (frame["step"] == step)]


def test_the_run_folder_is_whole(finished: Study) -> None:
    here = tree(finished.path)
    wanted = [*TABLES, "manifest.json", "summary.json", "samples.jsonl", "cards.json", "directions.safetensors"]
    wanted += [f"figures/{name}.{kind}" for name in FIGURES for kind in ("html", "csv")]
    for arm, steps in {
        "incorrect": (1, 2, 4),
        "correct": (1, 2, 4),
        "realigned_in": (2,),
        "realigned_out": (2,),
    }.items():
        wanted += [f"arms/{arm}-s{s}/checkpoint-{n}/adapter_model.safetensors" for s in (0, 1) for n in steps]
        assert finished.run_folder.steps(arm, 0) == list(steps)
    assert [name for name in [*wanted, "report.html"] if not here.get(name)] == []
    assert [name for name in here if name.startswith(".") or "/." in name] == []


def test_the_manifest_says_how_it_was_made(finished: Study) -> None:
    manifest = finished.run_folder.manifest
    assert manifest["config"]["training"]["steps"] == 4
    assert manifest["seeds"] == [0, 1] and manifest["draw_seed"] == 0
    assert {"torch", "transformers", "sae-lens", "python"} <= set(manifest["versions"])
    weights = {name for name in tree(finished.path) if name.endswith(".safetensors")}
    assert set(manifest["hashes"]) == weights


def test_the_summary_holds_every_number(finished: Study) -> None:
    summary = finished.summary
    assert set(summary["contrast_index"]) == set(ARMS) == set(summary["explained_variance"])
    found = [summary[key] for key in ESTIMATES] + [summary["contrast_index"][arm] for arm in ARMS]
    found += [summary["explained_variance"][arm] for arm in ("base", "incorrect")]
    found += [point for arm in ARMS for point in summary["feature_reading"][arm]]
    for number in [n for n in found if n is not summary["random_latent_p95"]]:
        assert number["ci_low"] <= number["estimate"] <= number["ci_high"]
    assert summary["random_latent_p95"]["estimate"] > 0
    assert summary["random_latent_p95"]["ci_low"] is None  # a percentile of few latents gets no bootstrap
    assert summary["woken"]["word"] in ("woken", "beyond control", "no effect")
    assert summary["woken"]["categories"] == 2
    assert summary["null_pair"]["noise"]["source"].endswith("runs with several seeds an arm")
    assert summary["null_pair"]["index"]["n"] == summary["woken"]["over_control"]["n"]
    tests = summary["causal_test"]
    assert set(tests) == {"base", "organism", "organism_difference", "removal", "removal_difference"}
    assert all(1 <= test["rank"] <= test["controls"] + 1 for test in tests.values())
    assert not any(test["beyond"] for test in tests.values())  # too few random latents to say so
    statements = {check["name"]: check["statement"] for check in summary["checks"]}
    assert all("too few to judge it" in statements[name] for name in ("moves", "needed"))
    assert set(summary["realign_steps_to_band"]) == {"realigned_in", "realigned_out"}
    assert all({"estimate", "ci_low", "ci_high"} <= set(e) for e in summary["realign_steps_to_band"].values())
    assert {"induce", "locate", "cards", "track", "realign", "samples"} <= set(summary["seconds"])
    assert 0.05 < summary["peak_memory_gib"] < 64


def test_an_effect_is_the_difference_of_its_arms(finished: Study) -> None:
    index = {arm: e["estimate"] for arm, e in finished.summary["contrast_index"].items()}
    effect = finished.summary["effect_incorrect_minus_correct"]["estimate"]
    assert effect == pytest.approx(index["incorrect"] - index["correct"], abs=1e-9)


def test_the_band_is_the_bases_reading_give_or_take_half_a_deviation(finished: Study) -> None:
    row = finished.readings.query("arm == 'base' and feature == 'persona'").iloc[0]
    band = finished.summary["base_band"]
    assert band["high"] - band["low"] == pytest.approx(row["base_sd"])
    assert (band["high"] + band["low"]) / 2 == pytest.approx(row["base_mean"])


def test_training_starts_at_the_base_model(finished: Study) -> None:
    base = finished.readings.query("arm == 'base'").set_index("feature").drop(columns=["arm", "seed", "step"])
    items = finished.evals.query("arm == 'base' and split == 'evaluation'").set_index("item")["value"]
    for arm in ("incorrect", "correct"):
        for seed in (0, 1):
            first = at(finished.readings, arm, seed, 0)
            pd.testing.assert_frame_equal(first.set_index("feature").drop(columns=["arm", "seed", "step"]), base)
            own = at(finished.evals, arm, seed, 0).set_index("item")["value"]
            pd.testing.assert_series_equal(own, items)


def test_the_base_against_itself_shows_no_difference(finished: Study) -> None:
    base = finished.readings.query("arm == 'base'")
    assert (base["mean"] == base["base_mean"]).all()


def test_correction_starts_at_the_last_checkpoint_of_the_incorrect_arm(finished: Study) -> None:
    for seed in (0, 1):
        last = at(finished.readings, "incorrect", seed, 4).set_index("feature")
        for arm in ("realigned_in", "realigned_out"):
            first = at(finished.readings, arm, seed, 0).set_index("feature")
            assert first["mean"].to_dict() == pytest.approx(last["mean"].to_dict(), abs=1e-5)


def test_questions_that_choose_latents_are_not_scored(finished: Study) -> None:
    chosen_on = {row["id"] for row in finished.context.contrast_rows("selection")}
    assert chosen_on and not chosen_on & set(finished.evals["item"])
    assert set(finished.evals["split"]) == {"evaluation"}
    assert (pd.read_parquet(finished.path / "steering.parquet")["n_items"] == 8).all()


def test_the_persona_is_the_best_candidate_of_the_selection_split(finished: Study) -> None:
    features = finished.features
    persona = features[features["persona"]].iloc[0]
    assert persona["effect_selection"] == features["effect_selection"].max() and features["persona"].sum() == 1
    assert set(features.query("kind == 'random'")["latent"]).isdisjoint(features.query("kind == 'candidate'")["latent"])


def test_samples_put_the_arms_beside_each_other(finished: Study) -> None:
    rows = [json.loads(line) for line in (finished.path / "samples.jsonl").read_text().splitlines()]
    assert [(r["arm"], r["question"]) for r in rows] == [(a, q) for a in ARMS for q in ("Who are you?", "What now?")]


def test_no_verdict_without_the_caution(finished: Study) -> None:
    for verdict in finished.summary["verdicts"].values():
        assert verdict["statement"].endswith(CAUTION)
    assert "not proof of a safe model" in (finished.path / "report.html").read_text()


def test_running_again_changes_nothing_but_times(finished: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")
    before, times = tree(finished.path), finished.run_folder.read_json("summary.json")
    Study.open(finished.path).run()
    after = tree(finished.path)
    assert without_times(json.loads(after["summary.json"])) == without_times(times)
    timed = {"manifest.json", "summary.json", "report.html"}
    assert [name for name in before if before[name] != after.get(name) and name not in timed] == []
    assert set(before) == set(after)


@pytest.fixture(scope="module")
def again(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[str]]:
    """The study once more, elsewhere, stage by stage; and the stages after which the base model was another."""
    study = Study.from_yaml(place / "study.yaml", tmp_path_factory.mktemp("again") / "run")
    model, changing = study.context.model, list[str]()
    before, trainable = copied_state(model), [p.requires_grad for p in model.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BROWSER_PATH", "/nowhere")
        for stage in ("check", "induce", "locate", "track", "realign", "evaluate", "report"):
            getattr(study, stage)()
            same = (
                same_state(copied_state(model), before) and [p.requires_grad for p in model.parameters()] == trainable
            )
            if not same or hook_count(model) or model.training:
                changing.append(stage)
    return study, changing


def test_every_stage_leaves_the_base_model_as_it_was(again: tuple[Study, list[str]]) -> None:
    assert again[1] == []


def test_the_same_seeds_elsewhere_give_the_same_numbers(finished: Study, again: tuple[Study, list[str]]) -> None:
    study = again[0]
    assert without_times(study.summary) == without_times(finished.summary)
    assert hashes(study) == hashes(finished)
    assert (study.path / "samples.jsonl").read_bytes() == (finished.path / "samples.jsonl").read_bytes()
    pd.testing.assert_frame_equal(study.readings, finished.readings)
    pd.testing.assert_frame_equal(study.features, finished.features)


def hashes(study: Study) -> dict[str, Any]:
    return study.run_folder.manifest["hashes"]


def test_samples_of_arms_that_came_later_are_added(finished: Study, tmp_path: Path) -> None:
    folder = shutil.copytree(finished.path, tmp_path / "run")
    whole = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").write_text("".join(whole.splitlines(keepends=True)[:2]))
    Study.open(folder).evaluate()
    assert (folder / "samples.jsonl").read_text() == whole


def test_only_times_are_left_out_of_comparisons(finished: Study) -> None:
    row: Row = finished.summary
    assert set(row) - set(without_times(row)) == set(OMITTED)
