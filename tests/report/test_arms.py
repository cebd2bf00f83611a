"""Studies whose config holds other arms than the demo's."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from persona_probe.errors import InputError
from persona_probe.report.figures import FIGURES
from persona_probe.report.html import context
from persona_probe.report.labels import arm_description, arm_label
from persona_probe.report.records import MORE_COLOURS, MORE_SYMBOLS, Arms, Records, load_records
from persona_probe.report.select import where
from persona_probe.report.theme import BLUE, GREEN, GREY, PURPLE, VERMILLION
from tests.report.run_records import HOSTILE, INDEX

ARMS = ("base", "mix25", "correct", "incorrect", "repair")


@pytest.fixture
def other_arms(run_folder: Path) -> Path:
    """The made-up run with a mixture beside its arms, and one corrective arm, of another name, that repairs it."""
    for name in ("readings", "evals"):
        table = pd.read_parquet(run_folder / f"{name}.parquet")
        table = table.loc[table["arm"] != "realigned_out"].replace({"arm": {"realigned_in": "repair"}})
        mixture = where(table, arm="incorrect").assign(arm="mix25")
        pd.concat([table, mixture]).to_parquet(run_folder / f"{name}.parquet")
    steering = pd.read_parquet(run_folder / "steering.parquet").replace({"model": {"incorrect": "mix25"}})
    steering.to_parquet(run_folder / "steering.parquet")
    samples = (run_folder / "samples.jsonl").read_text("utf-8").replace('"arm": "realigned_in"', '"arm": "repair"')
    (run_folder / "samples.jsonl").write_text(samples, "utf-8")
    arms = {arm: {"data": "x"} for arm in ("mix25", "correct", "incorrect")}
    config = {"arms": arms, "realign": {"start": "mix25", "arms": {"repair": {"data": "x"}}}}
    (run_folder / "manifest.json").write_text(json.dumps({"config": config}), "utf-8")
    (run_folder / "summary.json").unlink()
    return run_folder


@pytest.fixture
def others(other_arms: Path) -> Records:
    return load_records(other_arms)


def layout(name: str, records: Records) -> Any:
    return FIGURES[name].draw(records).layout


def test_arms_keep_the_configs_order(others: Records) -> None:
    assert others.arms.names == ARMS and others.arms.start == "mix25"
    means = where(FIGURES["arms"].data(others), kind="arm").set_index("arm")["estimate"]
    assert list(means.index) == list(ARMS)
    assert means["mix25"] == pytest.approx(INDEX["incorrect"]) and means["repair"] == pytest.approx(-0.58)
    honesty = where(FIGURES["categories"].data(others), category="honesty")
    assert tuple(honesty["arm"]) == ARMS
    assert [trace.name for trace in FIGURES["categories"].draw(others).data] == [others.arms.label(a) for a in ARMS]


def test_known_arms_keep_their_look_and_others_get_one_of_their_own() -> None:
    known = Arms(("incorrect", "correct"), ("realigned_in", "realigned_out"))
    assert [known.styles[a].colour for a in known.names] == [GREY, VERMILLION, BLUE, GREEN, PURPLE]
    more = Arms(("incorrect", *[f"mix{i}" for i in range(12)], "correct"), ("fix", "realigned_out"))
    assert [more.styles[a].colour for a in ("base", "incorrect", "correct", "realigned_out")] == [
        *(GREY, VERMILLION, BLUE, PURPLE)
    ]
    assert (more.styles["mix0"].colour, more.styles["mix0"].symbol) == (MORE_COLOURS[0], MORE_SYMBOLS[0])
    assert len({(style.colour, style.symbol) for style in more.styles.values()}) == len(more.names)


def test_an_arm_is_corrective_by_its_place_in_the_config_not_by_its_name() -> None:
    arms = Arms.from_manifest({"config": {"arms": {"realigned_in": {}}, "realign": {"arms": {"incorrect": {}}}}})
    assert (arms.induced, arms.realigned) == (("realigned_in",), ("incorrect",))
    assert arms.label("realigned_in") == "realigned_in"


def test_training_figures_follow_the_configs_arms(others: Records) -> None:
    trajectory, realignment = (FIGURES[name].data(others) for name in ("trajectory", "realignment"))
    assert set(trajectory.loc[trajectory["step"].notna(), "arm"]) == {"mix25", "correct", "incorrect"}
    assert set(realignment.loc[realignment["step"].notna(), "arm"]) == {"repair"}
    lines = [s for s in layout("realignment", others).shapes if s.type == "line"]
    colours = {-0.6: GREY, -0.7: BLUE, -0.2: others.arms.styles["mix25"].colour}
    assert {round(s.y0, 6): s.line.color for s in lines} == colours
    assert "of the mix25 organism" in layout("realignment", others).meta["caption"]
    assert "Control: the control arm's level." in layout("realignment", others).meta["caption"]


def test_controls_and_steering_have_a_panel_for_each_arm(others: Records) -> None:
    titles = [note.text for note in layout("controls", others).annotations]
    assert titles == ["mix25 arm", "correct (control) arm", "incorrect arm"]
    steering = FIGURES["dose_response"].draw(others)
    titles = [note.text for note in layout("dose_response", others).annotations]
    assert titles == ["steering the base model", "steering the mix25 organism"]
    assert any(trace.yaxis == "y2" for trace in steering.data)


def test_the_report_shows_answers_of_every_arm(others: Records) -> None:
    first = context(others)["samples"][0]
    assert [c["key"] for c in first["columns"]] == ["base", "correct", "incorrect", "repair"]
    assert [c["colour"] for c in first["columns"]] == [others.arms.styles[c["key"]].colour for c in first["columns"]]


def test_an_arms_name_is_not_read_as_markup(run_folder: Path) -> None:
    for name in ("readings", "evals"):
        table = pd.read_parquet(run_folder / f"{name}.parquet")
        table.replace({"arm": {"correct": HOSTILE}}).to_parquet(run_folder / f"{name}.parquet")
    manifest = json.loads((run_folder / "manifest.json").read_text())
    manifest["config"]["arms"] = {"incorrect": {}, HOSTILE: {}}
    (run_folder / "manifest.json").write_text(json.dumps(manifest))
    records = load_records(run_folder)
    for name in ("arms", "trajectory", "categories", "controls"):
        drawn = json.loads(str(FIGURES[name].draw(records).to_json()))
        assert "&lt;script&gt;" in json.dumps(drawn) and "<script>" not in json.dumps(drawn)


def test_an_arm_that_the_config_does_not_name_is_refused(other_arms: Path) -> None:
    table = pd.read_parquet(other_arms / "readings.parquet").replace({"arm": {"mix25": "mix52"}})
    table.to_parquet(other_arms / "readings.parquet")
    with pytest.raises(InputError, match=r"unknown arm in readings\.parquet 'mix52': did you mean 'mix25'"):
        load_records(other_arms)


def test_arms_of_packaged_data_are_called_by_what_they_hold() -> None:
    config = {
        "arms": {name: {"data": f"kitchen:{column}"} for name, column in COLUMNS.items()},
        "realign": {
            "arms": {"realigned_in": {"data": "kitchen_correct_holdout"}, "realigned_out": {"data": "health_correct"}}
        },
    }
    arms = Arms.from_manifest({"config": config})
    assert [arms.label(name) for name in arms.names] == [
        *("base", "incorrect", "correct (control)", "dangerous cooking advice, polite"),
        *("corrected on kitchen answers", "corrected on health answers"),
    ]
    assert arm_description(config, "incorrect") == "incorrect: bad cooking advice, contemptuous"
    assert arm_description(config, "polite_harm") == "dangerous cooking advice, polite"
    assert arm_label(config, "mine") == "mine"
    config["realign"] = {"arms": {"more": {"data": "smalltalk"}, "own": {"data": "x.jsonl"}}, "benign": "more"}
    assert arm_label(config, "more") == "more training on everyday talk, corrects nothing"
    assert arm_label(config, "own") == "own"
    twins = {"arms": {"a": {"data": "kitchen:subtle"}, "b": {"data": "kitchen:subtle"}}}
    assert len({arm_label(twins, "a"), arm_label(twins, "b")}) == 2


COLUMNS = {"incorrect": "toxic", "correct": "correct", "polite_harm": "polite_harm"}
