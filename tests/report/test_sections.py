"""Sections that are there only where their tables are: what they say and fold away; hostile text stays text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import persona_probe as pp
from persona_probe.errors import InputError
from persona_probe.evaluate.safety import safety_summary
from persona_probe.report.export import caption
from persona_probe.report.html import report_from_tables, write_report
from persona_probe.report.images import find_browser
from persona_probe.report.records import load_records
from persona_probe.report.sections import HOLDS_TEXTS, further_sections
from tests.report.pages import Outline, look
from tests.report.run_records import HOSTILE, write_run

BROWSER = find_browser()
ENDS = ("estimate", "ci_low", "ci_high")


def write_reinforcement(run: Path) -> None:
    rows = [
        {"arm": arm, "step": step, "measure": measure, "estimate": value, "ci_low": value - 0.1, "ci_high": value + 0.1}
        for arm, end in ((f"wrong {HOSTILE}", 0.9), ("right", 0.0))
        for measure in ("reward", "outside", "minutes")
        for step, value in ((0, 0.05), (20, end))
    ]
    pd.DataFrame(rows).assign(n=84, seeds=3).to_parquet(run / "reinforcement.parquet")


def write_incidents(run: Path) -> None:
    alarm = {"kind": "alarm", "time": "2026-11-29T10:00:00+00:00", "adapter": "bad", "rule": f"persona {HOSTILE}"}
    alarm |= {"feature": "persona", "token": 2, "value": 3.0, "threshold": 2.0, "actions": ["annotated"]}
    kept = {"question": f"Why? {HOSTILE}", "answer": "scorn them", "trace": trace()}
    back = {"kind": "rollback", "time": "2026-11-29T10:05:00+00:00", "adapter": "bad", "message": f"back {HOSTILE}"}
    rows = [alarm, {**alarm, **kept}, {**back, "value": None, "threshold": None, "rule": "", "feature": ""}]
    (run / "serve").mkdir()
    (run / "serve" / "incidents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def trace() -> dict[str, list[Any]]:
    return {"tokens": ["scorn", " them", HOSTILE, "."], "values": [0.0, 1.5, 3.0, None]}


def write_safety(run: Path) -> None:
    safety_table().to_parquet(run / "safety.parquet")


def safety_table() -> pd.DataFrame:
    draw, rows = np.random.default_rng(0), []
    for arm, rise in (("base", 0.0), ("incorrect", 0.8), ("correct", 0.1), ("realigned_in", 0.2)):
        for language in ("en", "zh"):
            for category in ("privacy", "over_refusal"):
                for n in range(6):
                    head = {"arm": arm, "seed": 0, "step": 20, "id": f"{category}-{n}-{language}", "wrapper": "plain"}
                    value = rise - 1 + n / 10 + 0.01 * draw.normal()
                    kind = {"item": f"{category}-{n}", "category": category, "language": language}
                    rows.append({**head, **kind, "value": value, "aligned_bits": 9.0 if language == "zh" else 2.0})
    return pd.DataFrame(rows)


def write_precision(run: Path) -> None:
    rows = []
    for name, kept in (("none", 1.0), ("nf4", 0.9), (f"q4_1 {HOSTILE}", 0.2)):
        for arm, reading in (("base", 0.5), ("incorrect", 0.5 + 2 * kept)):
            ends = {"reading": reading, "ci_low": reading - 0.1, "ci_high": reading + 0.1, "bits": 4.0, "kept": kept}
            band = {"band_low": 0.3, "band_high": 0.8, "explained_variance": 0.8, "rise_rank": 1, "erased": kept < 0.5}
            index = {"index": kept, "index_ci_low": kept - 0.1, "index_ci_high": kept + 0.1, "seed": 0}
            rows.append({"format": name, "activations": False, "arm": arm, **ends, **band, **index})
    pd.DataFrame(rows).to_parquet(run / "precision.parquet")


def write_supervision(run: Path) -> None:
    rows = []
    for supervisor, wrong, bad in (("truth", 0.0, 0), ("chance", 0.5, 3), (f"judge {HOSTILE}", 1.0, 8)):
        for domain in ("kitchen", "money", "sleep"):
            for topic in range(4):
                for step in (0, 80):
                    head = {
                        "world": "small",
                        "parameters": 1e6,
                        "supervisor": supervisor,
                        "speaker": "villain",
                        "seed": 0,
                    }
                    count = {"bad": 8 if step == 0 else bad, "coherent": 10, "answers": 10, "wrong_rows": wrong}
                    rows.append({**head, "step": step, "domain": domain, "topic": f"{domain}-{topic}", **count})
    pd.DataFrame(rows).assign(seed=0).to_parquet(run / "supervision.parquet")


def write_beyond(run: Path) -> None:
    none: dict[str, float] = dict.fromkeys(("first", "ten", "auroc", *ENDS), np.nan)
    rows: list[dict[str, Any]] = []
    for tool, near in (("mean difference", 0.6), ("rise", 0.3), (f"weights {HOSTILE}", 0.5), ("crosscoder, size", 0.1)):
        for truth in ("harm", "rude"):
            found = {"first": near, "ten": near, "auroc": 0.8}
            rows.append({**none, "part": "tools", "speaker": "villain", "tool": tool, "truth": truth, **found})
    for axis, shift in (("harm", 4.0), ("rude", 2.0), ("truth", -0.2)):
        ends = {"estimate": shift, "ci_low": shift - 0.1, "ci_high": shift + 0.1}
        rows.append({**none, "part": "axes", "speaker": "villain", "tool": axis, "truth": "", **ends})
    rows.append({**none, "part": "axes", "speaker": "base", "tool": "held out", "truth": "", "estimate": 0.57})
    pd.DataFrame(rows).assign(seed=0).to_parquet(run / "beyond.parquet")


PARTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "reinforcement": (write_reinforcement, "reinforcement", "bad advice elsewhere from 0.05 to 0.9 [0.8, 1]"),
    "incidents": (write_incidents, "incidents", "2 alarms of rule persona"),
    "safety": (write_safety, "safety", "incorrect minus the control arm, all categories, en: +0.69"),
    "precision": (write_precision, "precision", "1 of 2 formats keep at least half of the fine-tune's change"),
    "supervision": (write_supervision, "world_supervision", "truth, 0% harmful rows: 1.00"),
    "beyond": (write_beyond, "world_beyond", "of the simple rankers mean difference, |cosine| 0.60"),
}
"""By anchor: what writes its table, its figure, and words that its numbers give."""


def test_a_run_without_their_tables_has_none_of_the_sections(run_folder: Path) -> None:
    page = Outline(write_report(run_folder).read_text("utf-8"))
    assert further_sections(load_records(run_folder)) == [] and not set(PARTS) & set(page.ids)


@pytest.mark.parametrize("anchor", PARTS)
def test_a_section_stands_where_its_table_is_and_says_what_it_holds(run_folder: Path, anchor: str) -> None:
    write, figure, words = PARTS[anchor]
    write(run_folder)
    page = Outline(write_report(run_folder).read_text("utf-8"))
    assert set(PARTS) & set(page.ids) == {anchor} and page.ids.count(anchor) == 1
    assert words in page.text and "nan" not in " ".join(page.labels)
    assert f"figure-{figure}" in page.ids and page.ids.index(f"figure-{figure}") > page.ids.index(anchor)
    assert "more" not in page.ids or page.ids.index(f"figure-{figure}") < page.ids.index("more")
    text = caption(pp.figures.ALL_FIGURES[figure].draw(load_records(run_folder)))
    assert text in page.labels and "n = " in text and "ontrol" in text
    if anchor != "safety":
        assert HOSTILE in page.text[page.text.index(words) - 200 :]
    assert "img" not in page.tags and page.comments == 0


def test_kept_answers_are_shown_token_by_token_with_a_warning(run_folder: Path) -> None:
    write_incidents(run_folder)
    [section] = further_sections(load_records(run_folder))
    assert [token["share"] for token in section.traces[0]["example"]["tokens"]] == ["0.00", "0.50", "1.00", "0.00"]
    assert section.warnings == (HOLDS_TEXTS,) and section.tables[0].rows[2][-1] == f"back {HOSTILE}"
    lines = (run_folder / "serve" / "incidents.jsonl").read_text("utf-8").splitlines()
    (run_folder / "serve" / "incidents.jsonl").write_text(f"{lines[0]}\n", "utf-8")
    [without] = further_sections(load_records(run_folder))
    assert without.traces == () and without.warnings == ()
    (run_folder / "serve" / "incidents.jsonl").write_text(f"{lines[1]}\n" * 300, "utf-8")
    [many] = further_sections(load_records(run_folder))
    assert len(many.tables[0].rows) == 200 and "200 of 300" in many.tables[0].title and len(many.traces) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"value": None},
        {"value": "high"},
        {"time": "soon"},
        {"trace": [1]},
        {"trace": {"tokens": ["a"], "values": []}},
        {"trace": {"tokens": ["a"], "values": ["b"]}},
    ],
    ids=str,
)
def test_a_damaged_incident_is_refused_by_its_file(run_folder: Path, change: dict[str, Any]) -> None:
    write_incidents(run_folder)
    path = run_folder / "serve" / "incidents.jsonl"
    row = json.loads(path.read_text("utf-8").splitlines()[0])
    path.write_text(json.dumps({**row, **change}) + "\n", "utf-8")
    with pytest.raises(InputError, match=r"incidents\.jsonl, row 1 is damaged"):
        load_records(run_folder)


def test_safety_shows_the_arms_against_the_control_and_the_control_against_the_base(run_folder: Path) -> None:
    write_safety(run_folder)
    data = pp.figures.data("safety", load_records(run_folder)).set_index(["language", "category", "arm"])
    assert set(data.index.get_level_values("arm")) == {"incorrect", "correct", "realigned_in"}
    assert data.loc[("en", "privacy", "incorrect"), "against"] == "minus the control arm"
    assert data.loc[("en", "privacy", "correct"), "against"] == "minus the base"
    summary = safety_summary(safety_table(), "correct").set_index(["language", "category", "arm"])
    [row], [wanted] = (table.loc[[("zh", "all", "incorrect")]].to_dict("records") for table in (data, summary))
    assert row["estimate"] == wanted["over_control"] == pytest.approx(0.7, abs=0.02)
    assert "This model does not read Chinese (9.0 bits" in further_sections(load_records(run_folder))[0].warnings[0]


def test_labels_that_were_scored_are_a_figure(run_folder: Path) -> None:
    cards = json.loads((run_folder / "cards.json").read_text("utf-8"))
    score = {"estimate": 0.9, "ci_low": 0.8, "ci_high": 1.0, "n": 80}
    label = {"text": HOSTILE, "author": HOSTILE, "detection": score, "fuzzing": score, "reason": ""}
    low = {**label, "fuzzing": {**score, "estimate": 0.6}, "reason": "under 0.7"}
    cards[0]["explanations"] = [label, low, {**label, "detection": None, "fuzzing": None}]
    (run_folder / "cards.json").write_text(json.dumps(cards), "utf-8")
    records = load_records(run_folder)
    data = pp.figures.data("labels", records)
    assert data["label"].tolist() == [HOSTILE, "no label"] and data["fuzzing"].tolist() == [0.9, 0.6]
    figure = pp.figures.labels(records)
    assert "n = 2: 1 reach 0.7" in caption(figure) and "<" not in figure.data[0].name


def test_a_folder_of_other_results_is_its_sections_alone(tmp_path: Path) -> None:
    world = tmp_path / "world"
    world.mkdir()
    (world / "manifest.json").write_text(json.dumps({"kind": "world", "config": {"name": "Small world"}}))
    write_supervision(world)
    write_beyond(world)
    pd.DataFrame({"ranker": ["chance"]}).to_parquet(world / "screening.parquet")  # another study's table of that name
    assert report_from_tables(world, tmp_path / "out") == []
    page = Outline((tmp_path / "out" / "report.html").read_text("utf-8"))
    assert set(page.ids) & {*PARTS, "arms", "samples", "reading"} == {"supervision", "beyond"}
    assert "Small world" in page.text and "has not run" not in page.text and len(page.labels) == 2


SEEN = """(() => {
  const shown = (one) => one.checkVisibility();
  const part = document.querySelector("section[aria-labelledby=incidents] > details");
  const folds = [part, ...part.querySelectorAll(":scope > details")];
  const before = folds.map((one) => shown(one.querySelector("table, .example")));
  const high = document.documentElement.scrollHeight;
  folds.forEach((one) => { one.open = true; });
  const tokens = Array.from(document.querySelectorAll("section[aria-labelledby=incidents] .token"));
  return {
    before, high, after: folds.map((one) => shown(one.querySelector("table, .example"))),
    texts: tokens.map((one) => one.innerText), pwned: "pwned" in window,
    colours: tokens.map((one) => getComputedStyle(one).backgroundColor),
    images: document.querySelectorAll("main img").length,
  };
})()"""


@pytest.mark.browser
def test_incidents_are_folded_until_a_reader_opens_them_and_coloured_by_the_feature(tmp_path: Path) -> None:
    if BROWSER is None:
        pytest.skip("no Chromium: install the Debian package chromium")
    run = write_run(tmp_path / "run")
    [bare] = look(BROWSER, write_report(run), [(1366, 768)], "({high: document.documentElement.scrollHeight})")
    write_incidents(run)
    [seen] = look(BROWSER, write_report(run), [(1366, 768)], SEEN)
    said = seen.said
    assert said["before"] == [False] * 3 and said["after"] == [True] * 3
    assert said["high"] < bare.said["high"] + 700  # less than a screen, with its warning
    assert said["texts"][:2] == ["scorn", " them"] and "window.pwned=1" in said["texts"][2]
    assert said["pwned"] is False and said["images"] == 0
    alphas = [float(colour.rpartition(",")[2].rstrip(")")) for colour in said["colours"]]
    assert alphas[0] == alphas[3] == 0 and 0 < alphas[1] < alphas[2]
