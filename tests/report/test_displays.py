"""Studies, latents, verdicts and cards show themselves: escaped HTML in a notebook, a table in a terminal."""

import json
from pathlib import Path

import pytest

from persona_probe.config import StudyConfig
from persona_probe.report.tables import FeatureTable, StudyVerdict, Table
from persona_probe.runs import first_manifest
from persona_probe.study.study import Study
from tests.report.made_up_cards import CARDS
from tests.report.pages import Outline
from tests.report.run_records import HOSTILE, write_run


@pytest.fixture
def study(tmp_path: Path) -> Study:
    folder = write_run(tmp_path / "run")
    config = StudyConfig("made-up", f"release/{HOSTILE}", seeds=(0, 1))
    (folder / "manifest.json").write_text(json.dumps(first_manifest(config)))
    return Study.open(folder, device="cpu")


def test_a_study_shows_its_stages_and_result(study: Study) -> None:
    shown, text = Outline(study._repr_html_()), repr(study)
    assert HOSTILE in shown.text and "script" not in shown.tags and "img" not in shown.tags
    for words in ("Study made-up", "induce to do", "locate done", "realign to do", "evaluate done", "Made-up numbers"):
        assert words in shown.text and words in " ".join(text.replace("│", " ").split())


def test_a_study_that_has_only_begun_shows_itself(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(first_manifest(StudyConfig("begun", "release/id"))))
    begun = Study.open(tmp_path, device="cpu")
    assert "locate to do" in " ".join(repr(begun).split()) and "result" not in begun._repr_html_()


def test_the_feature_table_puts_the_persona_first_and_no_control_in(study: Study) -> None:
    table = study.feature_table(6)
    assert isinstance(table, FeatureTable) and table.frame["latent"].tolist() == [17, 21, 30, 3, 8, 110]
    shown = Outline(table._repr_html_())
    assert shown.tags.count("tr") == 7 and "+0.4 [+0.35, +0.45]" in shown.text and "scorn <b>" in shown.text
    assert "not tested" in repr(table) and "+0.4 [+0.35, +0.45]" in repr(table) and "b" not in shown.tags


def test_the_verdict_shows_headline_failed_checks_and_arms(study: Study) -> None:
    verdict = study.verdict
    assert isinstance(verdict, StudyVerdict) and verdict.checks[1][:2] == ("specific", False)
    for text in (Outline(verdict._repr_html_()).text, repr(verdict)):
        assert "Made-up numbers" in text and "FAILED" in text and "realigned_out" in text
    notebook = Outline(verdict._repr_html_())
    assert notebook.tags[:3] == ["p", "strong", "table"] and "<" not in notebook.text  # HTML, not its source


def test_a_card_is_a_table_in_a_terminal() -> None:
    text = str(CARDS[0])
    for words in ("Latent 3: scorn for cooks", "ranker rise", "rank 2 of 64", "+0.3 [+0.05, +1.5]", "soup]"):
        assert words in text
    assert "It never" not in text and "effect, organism" not in text  # not tested


def test_cells_are_escaped_and_an_empty_table_is_a_table() -> None:
    assert Table(("<a>",), [["<b>"]], "<c>").html().count("&lt;") == 3
    assert Outline(Table((), []).html()).tags == ["table", "tbody"]
    assert Table((), []).plain() == ""


def test_a_bar_in_a_cell_ends_no_cell_of_a_markdown_table() -> None:
    assert Table(("a", "b"), [["x|y", 1]]).markdown() == "| a | b |\n| --- | --- |\n| x\\|y | 1 |"
