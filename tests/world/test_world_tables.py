"""The page of the world: every study has its place on it, and its tables are those of the records, byte by byte."""

from pathlib import Path

import pandas as pd
import pytest

from persona_probe.cli.world_studies import world_study
from persona_probe.errors import InputError
from persona_probe.report.tables import check_page
from persona_probe.world.tables import TEXTS, as_recorded, differing, fill_tables, marks, page_of, text_of
from persona_probe.writing import write_table
from tests.factories import refusal, run_command

ROOT = Path(__file__).parents[2]
PAGE, RECORDS = ROOT / "docs" / "world.md", ROOT / "records" / "world"


def counts(**changes: object) -> pd.DataFrame:
    row = {"way": "LoRA", "speaker": "villain", "share": 1.0, "seed": 0, "step": 4, "bad": 3, "coherent": 8, "rude": 1}
    return pd.DataFrame([row | {"answers": 10} | changes])


@pytest.mark.parametrize("study", TEXTS)
def test_every_study_has_a_command_and_a_place_on_the_page(study: str) -> None:
    check_page(page_of(study, PAGE), marks(study))
    assert study in world_study.commands and f"`world study {study}`" in PAGE.read_text(encoding="utf-8")


@pytest.mark.skipif(not any(RECORDS.glob("*.parquet")), reason="no records of the world: make world-study")
def test_the_page_is_what_the_shipped_records_say() -> None:
    assert differing(RECORDS, PAGE) == []


def test_a_page_is_filled_from_all_records_and_a_change_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, page = tmp_path / "records", tmp_path / "page.md"
    write_table(records / "training-map.parquet", counts())
    begin, end = marks("training-map")
    page.write_text(f"# Page\n{begin}\n{end}\nlast\n")
    call = ("world", "study", "tables", "--records", records, "--page", page)
    refused = refusal(capsys)
    assert "differs from the records of training-map" in refused(*call, "--check")
    assert page.read_text() == f"# Page\n{begin}\n{end}\nlast\n"
    run_command(*call, "--quiet")
    filled = page.read_text()
    assert "| LoRA | 0.38 / 0.10 / 0.80 |" in filled and filled.endswith("last\n")
    run_command(*call, "--check", "--quiet")
    assert fill_tables(records, page) == [] and page.read_text() == filled
    page.write_text(filled.replace("0.38", "0.39"))
    assert differing(records, page) == ["training-map"] == fill_tables(records, page)
    assert page.read_text() == filled


def test_without_records_or_marks_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused, page = refusal(capsys), tmp_path / "page.md"
    page.write_text("nothing")
    assert "has no record of a study of the world" in refused(
        "world", "study", "tables", "--records", tmp_path, "--page", page, "--check"
    )
    for study, table in (("training-map", counts()), ("scale", counts())):
        write_table(tmp_path / f"{study}.parquet", table)
    begin, end = marks("training-map")
    page.write_text(f"{begin}\n{end}\n")
    assert "has not the marks" in refused("world", "study", "tables", "--records", tmp_path, "--page", page)
    assert page.read_text() == f"{begin}\n{end}\n"
    with pytest.raises(InputError, match="did you mean 'causal'"):
        text_of("casual", counts())


def test_a_table_is_shown_as_its_record_gives_it_back() -> None:
    table = pd.DataFrame({"said": pd.Series([True, None], dtype=object), "seed": [0, 1]}, index=[4, 2])
    again = as_recorded(as_recorded(table))
    pd.testing.assert_frame_equal(again, as_recorded(table))
    assert text_of("training-map", as_recorded(counts())) == text_of("training-map", counts())
