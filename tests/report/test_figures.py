from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from persona_probe.report.export import caption
from persona_probe.report.figures import FIGURES
from persona_probe.report.figures.registry import computed_once
from persona_probe.report.records import Records
from persona_probe.report.select import distinct, groups, numbers, where
from persona_probe.report.theme import BLUE, GREY, VERMILLION, plain
from tests.report.run_records import INDEX

N_IN_CAPTION = {
    "arms": ["n = 6 evaluation items", "2 seeds", "+0.5 [+0.4, +0.6]"],
    "trajectory": ["n = 6 evaluation items", "n = 48 probes", "base band 0.3 to 0.8", "2 seeds"],
    "dose_response": ["n = 4 random latents", "n = 2 random directions", "32 of 80 points"],
    "realignment": ["n = 6 evaluation items", "2 seeds", "base band 0.3 to 0.8"],
    "latents": ["n = 5 tested candidates", "n = 10 random latents", "±2", "0.09"],
    "categories": ["3 categories of n = 2 evaluation items"],
    "controls": ["n = 48 probes", "2 seeds", "random latent B"],
}


def layout(name: str, records: Records) -> Any:
    return FIGURES[name].draw(records).layout


def mean_by_arm(data: pd.DataFrame) -> dict[str, float]:
    return {arm: numbers(rows, "estimate").mean() for (arm,), rows in groups(data, "arm")}


@pytest.mark.parametrize("name", FIGURES)
def test_captions_come_from_the_numbers(records: Records, name: str) -> None:
    text = caption(FIGURES[name].draw(records))
    for words in N_IN_CAPTION[name]:
        assert words in text
    assert "ontrol" in text


@pytest.mark.parametrize("name", FIGURES)
def test_axes_have_titles(records: Records, name: str) -> None:
    shown = layout(name, records).to_plotly_json()
    assert all(axis["title"]["text"] for key, axis in shown.items() if key.startswith("yaxis"))
    assert any(axis.get("title", {}).get("text") for key, axis in shown.items() if key.startswith("xaxis"))


@pytest.mark.parametrize("name", FIGURES)
def test_without_records_a_figure_says_so(name: str) -> None:
    spec = FIGURES[name]
    assert spec.data(Records()).empty
    assert [note.text for note in layout(name, Records()).annotations] == [spec.missing]
    assert "has not run" in spec.missing or "have not run" in spec.missing


@pytest.mark.parametrize("name", FIGURES)
def test_drawing_leaves_the_records_alone(records: Records, name: str) -> None:
    before = {table: getattr(records, table).copy() for table in ("readings", "evals", "latents", "steering")}
    FIGURES[name].draw(records)
    for table, frame in before.items():
        pd.testing.assert_frame_equal(getattr(records, table), frame)


def test_arms_show_the_last_step_of_the_evaluation_split(records: Records) -> None:
    data = FIGURES["arms"].data(records)
    means = where(data, kind="arm").set_index("arm")["estimate"]
    assert means.to_dict() == INDEX
    assert mean_by_arm(where(data, kind="seed")) == pytest.approx(INDEX)
    incorrect = where(data, kind="seed", arm="incorrect")
    assert incorrect["estimate"].tolist() == pytest.approx([-0.25, -0.15])
    assert incorrect["step"].tolist() == [20, 20]
    drawn = {trace.name: trace.x[0] for trace in FIGURES["arms"].draw(records).data}
    assert drawn["incorrect"] == -0.2


def test_arms_fall_back_to_the_items_without_a_summary(records: Records) -> None:
    data = FIGURES["arms"].data(replace(records, summary={}))
    incorrect = where(data, kind="arm", arm="incorrect").to_dict("records")[0]
    assert incorrect["estimate"] == pytest.approx(-0.2)
    assert incorrect["ci_low"] < -0.2 < incorrect["ci_high"]


def test_trajectory_follows_both_arms_and_keeps_the_base_band(records: Records) -> None:
    data = FIGURES["trajectory"].data(records)
    assert set(data.loc[data["step"].notna(), "arm"]) == {"incorrect", "correct"}
    mean = data.loc[data["seed"].isna() & data["step"].notna()]
    index = where(mean, panel="contrast_index", arm="incorrect")
    assert index["estimate"].tolist() == pytest.approx([-0.6, -0.4, -0.2])
    assert where(mean, panel="persona", arm="incorrect")["estimate"].tolist() == pytest.approx([0.51, 1.51, 2.51])
    assert where(mean, panel="explained_variance", arm="correct")["estimate"].tolist() == pytest.approx(
        [0.8, 0.75, 0.7]
    )
    band = data.loc[(data["panel"] == "persona") & data["step"].isna()]
    assert band[["ci_low", "ci_high"]].to_numpy().tolist() == [[0.3, 0.8]]


def test_references_are_drawn(records: Records) -> None:
    shapes = layout("trajectory", records).shapes
    assert [(s.type, s.y0, s.y1) for s in shapes if s.yref.startswith("y2")] == [("rect", 0.3, 0.8)]
    assert [s.y0 for s in shapes if s.type == "line"] == [-0.6]
    lines = [s for s in layout("realignment", records).shapes if s.type == "line"]
    assert {(s.y0, s.line.color) for s in lines} == {(-0.6, GREY), (-0.7, BLUE), (-0.2, VERMILLION)}


def test_realignment_starts_at_the_organism_and_ends_where_it_ends(records: Records) -> None:
    data = FIGURES["realignment"].data(records)
    mean = data.loc[data["seed"].isna() & data["step"].notna()]
    for arm in ("realigned_in", "realigned_out"):
        index = where(mean, panel="contrast_index", arm=arm)["estimate"].tolist()
        assert [index[0], index[-1]] == pytest.approx([INDEX["incorrect"], INDEX[arm]])


def test_dose_response_keeps_the_persona_latent_and_every_control(records: Records) -> None:
    data = FIGURES["dose_response"].data(records)
    assert set(data.loc[data["kind"] == "candidate", "name"]) == {"latent 17"}
    lines = {kind: len(distinct(rows, "name")) for (kind,), rows in groups(data, "kind")}
    assert lines == {"candidate": 1, "mean_difference": 1, "random": 4, "random_direction": 2}
    figure = FIGURES["dose_response"].draw(records)
    persona = next(t for t in figure.data if t.name == "latent 17" and t.yaxis == "y")
    assert list(persona.y) == pytest.approx([-1.4, -1.0, -0.6, -0.2, 0.2])
    assert list(persona.marker.symbol) == ["circle-open", "circle", "circle", "circle", "circle-open"]
    assert [s.y0 for s in layout("dose_response", records).shapes] == pytest.approx([INDEX["base"], INDEX["incorrect"]])


def test_without_a_named_latent_every_candidate_is_drawn(records: Records) -> None:
    unnamed = replace(records, summary={}, latents=records.latents.assign(persona=False))
    data = FIGURES["dose_response"].data(unnamed)
    assert set(data.loc[data["kind"] == "candidate", "name"]) == {"latent 17", "latent 21"}


def test_latents_are_sorted_and_stand_beside_the_random_ones(records: Records) -> None:
    data = FIGURES["latents"].data(records)
    assert where(data, kind="candidate")["latent"].tolist() == [17, 21, 30, 3, 8]
    assert len(where(data, kind="random")) == 10
    assert [s.x0 for s in layout("latents", records).shapes] == [0.09]
    computed = layout("latents", replace(records, summary={})).shapes[0].x0
    assert computed == pytest.approx(np.quantile(np.linspace(-0.1, 0.1, 10), 0.95))


def test_categories_average_to_the_arm(records: Records) -> None:
    data = FIGURES["categories"].data(records)
    assert mean_by_arm(data) == pytest.approx(INDEX)
    assert where(data, arm="base")["n"].tolist() == [2, 2, 2]
    assert where(data, category="honesty")["arm"].tolist() == list(INDEX)


def test_controls_are_in_base_standard_deviations(records: Records) -> None:
    data = FIGURES["controls"].data(records)
    rows = where(data, arm="incorrect", seed=0, step=20)
    last = dict(zip(rows["feature"], rows["z"], strict=True))
    assert last["persona"] == pytest.approx(2.0 / 0.25)
    assert last["mean difference"] == pytest.approx(0.8 * 2.0 / 0.25)
    assert np.isnan(last["random latent B"])  # its base spread is zero
    assert "random latent B" not in {trace.name for trace in FIGURES["controls"].draw(records).data}


def test_labels_are_shown_not_read_as_markup(records: Records) -> None:
    assert plain("a <b>\n & c") == "a &lt;b&gt; &amp; c"
    assert plain("x" * 60) == "x" * 47 + "…"
    rows = layout("latents", records).yaxis.categoryarray
    assert "17 scorn &lt;b&gt;" in rows


def test_numbers_that_take_long_are_computed_once_for_records(records: Records) -> None:
    counted = list[Records]()

    @computed_once
    def slow(records: Records) -> pd.DataFrame:
        counted.append(records)
        return pd.DataFrame({"a": [len(counted)]})

    slow(records).loc[0, "a"] = 99  # a caller's change stays with the caller
    assert slow(records)["a"].tolist() == [1]
    assert slow(replace(records, samples=[]))["a"].tolist() == [2] and len(counted) == 2
