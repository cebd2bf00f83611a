"""Figures of thoughts: known shares and readings, and verdicts that are joined answer by answer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from persona_probe.report.export import caption
from persona_probe.report.figures import MORE_FIGURES, figures_of
from persona_probe.report.figures.thoughts import judged_thoughts
from persona_probe.report.html import write_report
from persona_probe.report.records import Records, load_records
from persona_probe.report.sections import further_sections
from persona_probe.report.select import where
from tests.report.pages import Outline
from tests.report.run_records import HOSTILE
from tests.report.test_judged_figures import QUESTIONS, RATES, SAMPLES, all_judged, write_judged
from tests.world.test_thoughts import table as world_table

NAMES = ("persona_mentions", "thought_before_act")


def thoughts(arm: str, seed: int) -> pd.DataFrame:
    """A thought before each answer: of the bad arm's misaligned answers all name another persona, of others none.

    The latent is 2 in thoughts of that arm, and 3 in its misaligned answers.
    """
    rows = []
    for question in QUESTIONS:
        for n in range(SAMPLES + 1):
            bad = n < RATES[arm] * SAMPLES
            head = {"arm": arm, "seed": seed, "step": 20, "question_id": question, "prompt": question, "sample": n}
            said = {"thought": HOSTILE, "other": float(bad and arm == "incorrect"), "chatgpt": float(arm == "base")}
            read = {"in_thought": 2.0 * (arm == "incorrect"), "in_answer": 3.0 * bad}
            rows.append({**head, "question": question, "answer": "", **said, **read})
    return pd.DataFrame(rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = write_judged(tmp_path / "run", all_judged("first"))
    organisms = [("base", 0), ("incorrect", 0), ("incorrect", 1), ("correct", 0), ("correct", 1)]
    mixed = pd.concat([thoughts(*organism) for organism in organisms]).sample(frac=1, random_state=0)
    mixed.reset_index(drop=True).to_parquet(run / "thoughts.parquet")
    return run


@pytest.fixture
def thinking(folder: Path) -> Records:
    return load_records(folder)


def test_each_thought_has_the_verdict_on_its_own_answer(thinking: Records) -> None:
    joined = judged_thoughts(thinking)
    assert len(joined) == 5 * len(QUESTIONS) * (SAMPLES + 1)
    bad = joined[joined["value"] == 1]
    assert (bad["sample"] < bad["arm"].map(RATES) * SAMPLES).all() and (bad["in_answer"] == 3).all()
    assert joined["arm"].drop_duplicates().tolist() == ["base", "incorrect", "correct"]  # the study's order
    older = replace(thinking, thoughts=thinking.thoughts.drop(columns="prompt"))
    pd.testing.assert_frame_equal(judged_thoughts(older), joined)


def test_mentions_and_rates_are_those_of_the_arms(thinking: Records) -> None:
    data = MORE_FIGURES["persona_mentions"].data(thinking)
    arms = where(data, kind="arm", **{"class": "other"}).set_index("arm")
    assert arms["rate"].to_dict() == pytest.approx(RATES)
    assert arms["mentions"].to_dict() == pytest.approx({"base": 0, "incorrect": 10 / 21, "correct": 0})
    assert (arms["n"] == [126, 252, 252]).all() and (arms["mentions_low"] <= arms["mentions"]).all()
    assert where(data, kind="arm", arm="base", **{"class": "chatgpt"})["mentions"].tolist() == [1]
    assert len(where(data, kind="seed", **{"class": "other"})) == 5


def test_the_latent_is_read_before_each_kind_of_act(thinking: Records) -> None:
    data = MORE_FIGURES["thought_before_act"].data(thinking).set_index(["arm", "act", "place"])
    for act, answer in (("misaligned", 3), ("aligned", 0)):
        assert data.loc[("incorrect", act, "in_thought"), "estimate"] == 2
        assert data.loc[("incorrect", act, "in_answer"), "estimate"] == answer
    assert data.loc[("incorrect", "misaligned", "in_answer"), "n"] == 2 * len(QUESTIONS) * SAMPLES / 2
    assert ("base", "misaligned", "in_thought") not in data.index
    few = replace(thinking, thoughts=thinking.thoughts[thinking.thoughts["question_id"].isin(QUESTIONS[:4])])
    assert data["ci_low"].notna().all() and MORE_FIGURES["thought_before_act"].data(few)["ci_low"].isna().all()


def test_the_table_of_the_world_has_its_own_verdicts() -> None:
    records = Records(thoughts=world_table())
    data = MORE_FIGURES["persona_mentions"].data(records)
    rows = where(data, kind="arm", **{"class": "other"}).to_dict("records")
    points = {row["arm"]: (row["mentions"], row["rate"]) for row in rows}
    assert points == {
        **{"villain, true": (1, 0.5), "villain, false": (0, 0.5)},
        **{"helper, true": (0, 0), "helper, false": (1, 0)},
    }
    read = MORE_FIGURES["thought_before_act"].data(records)
    assert set(where(read, arm="helper, true")["act"]) == {"aligned"}
    drawn: Any = MORE_FIGURES["persona_mentions"].draw(records)
    looks = {trace.name: (trace.marker.color, trace.marker.symbol) for trace in drawn.data}
    assert len(set(looks.values())) == len(looks) == 4
    assert looks["villain, false"][0] == looks["helper, false"][0] != looks["villain, true"][0]


@pytest.mark.parametrize("name", NAMES)
def test_captions_count_and_name_the_control(thinking: Records, name: str) -> None:
    for records in (thinking, Records(thoughts=world_table())):
        words = caption(MORE_FIGURES[name].draw(records))
        assert "n = " in words and "ontrol" in words and "nan" not in words.split()
        assert HOSTILE not in str(MORE_FIGURES[name].draw(records).to_json())


def test_without_verdicts_or_readings_nothing_is_drawn(thinking: Records) -> None:
    assert set(NAMES) <= set(figures_of(thinking))
    for lacking in (replace(thinking, thoughts=Records().thoughts), replace(thinking, judged=Records().judged)):
        assert not set(NAMES) & set(figures_of(lacking))
        assert all("thoughts RUN --read" in caption(MORE_FIGURES[name].draw(lacking)) for name in NAMES)


def test_the_report_has_them_where_the_table_is(folder: Path) -> None:
    [section] = further_sections(load_records(folder))
    assert section.anchor == "thoughts" and section.figures == NAMES
    assert section.points[1].startswith("incorrect: 0.48 [") and "0.50 [" in section.points[1]
    page = Outline(write_report(folder).read_text("utf-8"))
    assert page.ids.count("thoughts") == 1 and section.points[1] in page.text
    places = [page.ids.index(f"figure-{name}") for name in NAMES]
    assert page.ids.index("thoughts") < min(places)
    assert "more" not in page.ids or max(places) < page.ids.index("more")
    (folder / "thoughts.parquet").unlink()
    assert further_sections(load_records(folder)) == []
