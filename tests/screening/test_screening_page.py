"""The page and files of a screening: nothing untrusted is read as markup, tables sort, every figure has its numbers."""

import html
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from persona_probe.data.chat import Conversation, conversation
from persona_probe.evaluate.shift import calibrate
from persona_probe.report.export import caption
from persona_probe.report.figures.screening import calibration, histogram
from persona_probe.report.page import asset, script_hash
from persona_probe.screening.feature import ScreenFeature
from persona_probe.screening.page import fitted_line, result_lines, screening_page, worst_rows, write_screening
from persona_probe.screening.prediction import predict_shift
from persona_probe.screening.reading import ScreenSettings
from persona_probe.screening.screening import Screening, screening
from tests.factories import make_model, make_tokenizer
from tests.screening.test_screening_calibrate import line

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture
def found(rows: list[Conversation], latent: ScreenFeature) -> Screening:
    settings = ScreenSettings(own_tokens=4, bf16=False)
    hostile = [*rows, conversation(f"Ask {HOSTILE}", f"Say {HOSTILE}")]
    return screening(hostile, make_model(), latent, tokenizer=make_tokenizer(), settings=settings)


def test_text_of_rows_and_models_is_escaped(found: Screening) -> None:
    frame = found.frame.assign(own_answer=HOSTILE)
    page = screening_page(replace(found, frame=frame), f"mine {HOSTILE}", HOSTILE)
    assert "<img src=x" not in page and "<script>alert" not in page
    assert page.count("&lt;img src=x onerror=alert(2)&gt;") >= len(frame) + 3


def test_the_page_loads_nothing_and_runs_its_own_scripts_only(found: Screening) -> None:
    page = screening_page(found, "mine", "tiny")
    policy = html.unescape(page.split('Content-Security-Policy" content="')[1].split('"')[0])
    assert "default-src 'none'" in policy
    scripts = [part.split("</script>")[0] for part in page.split("<script>")[1:]]
    assert len(scripts) == 3 and scripts[-1] == asset("tables.js")
    assert all(script_hash(text).strip("'") in policy for text in scripts)
    ours = page.replace(get_plotlyjs(), "")
    assert not any(word in ours for word in ("onclick", 'src="http', "@import"))


def test_the_worst_rows_of_every_ranker_are_listed(found: Screening) -> None:
    rankers = [ranker.name for ranker in found.rankers]
    listed = worst_rows(found.frame, rankers, 2)
    for name in rankers:
        assert set(found.frame[name].nlargest(2)) <= set(listed[name])
    assert listed["rank"].is_monotonic_increasing and listed["rank"].iloc[0] == 1
    assert len(listed) < len(found.frame)
    page = screening_page(found, "mine", "tiny", worst=2)
    assert page.count("<tr>") == len(listed) + 1


def test_files_hold_every_row_and_say_what_they_mean(found: Screening, tmp_path: Path) -> None:
    page = write_screening(found, tmp_path / "new", "mine.jsonl", "tiny")
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    pd.testing.assert_frame_equal(pd.read_parquet(page.with_name("screen.parquet")), found.frame)
    assert len(pd.read_csv(page.with_name("screen.csv"))) == len(found.frame)
    about = json.loads(page.with_name("screen.json").read_text())
    assert list(about["rankers"]) == [ranker.name for ranker in found.rankers]
    assert about["shift"]["estimate"] is None and about["shift"]["statement"].startswith("no prediction")
    lines = result_lines(found)
    assert lines[0].startswith("9 rows, worst first by projection_difference") and lines[-1] == found.shift.statement


def test_a_histogram_marks_the_listed_rows_and_counts_the_missing() -> None:
    scores = [*map(float, range(10)), float("nan")]
    fig = histogram(scores, "score <b>", 3)
    assert sorted(fig.data[0].x) == scores[:10]  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    assert fig.layout.shapes[0].x0 == 7  # pyright: ignore[reportAttributeAccessIssue]
    assert "1 rows have no score" in caption(fig) and "largest 9" in caption(fig)
    assert "<b>" not in str(fig.layout.xaxis.title.text)  # pyright: ignore[reportAttributeAccessIssue]
    assert "No row has a score" in caption(histogram([float("nan")], "score", 3))


def traces(fig: go.Figure) -> list[str | None]:
    return [trace["name"] for trace in fig.to_dict()["data"] if "name" in trace]


def test_the_calibration_figure_shows_runs_line_and_prediction() -> None:
    held = calibrate(line(noise=0.2))
    shift = predict_shift(held, 2.5)
    drawn = fitted_line(held, shift)
    assert drawn.sets["shift"].tolist() == [p.shift for p in held.pairs]
    np.testing.assert_allclose(drawn.band["estimate"], held.intercept + held.slope * drawn.band["score"])
    fig = calibration(drawn)
    names = traces(fig)
    assert names[-1] == "this set, predicted" and "our training runs" in names
    assert held.statement in caption(fig)
    outside = calibration(fitted_line(held, predict_shift(held, 99.0)))
    assert "this set, predicted" not in traces(outside)
