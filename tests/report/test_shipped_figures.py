"""The records that ship with the repository, and every figure drawn from them."""

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import persona_probe as pp
from persona_probe.cli import main as cli
from persona_probe.errors import InputError
from persona_probe.report.export import caption
from persona_probe.report.figures import ALL_FIGURES, FIGURES, FigureSpec, figures_of
from persona_probe.report.printing import SMALLEST_PT, WIDTHS, for_print
from persona_probe.report.records import Records, load_records
from persona_probe.report.select import distinct, where
from persona_probe.world.tables import TEXTS as WORLD_STUDIES
from tools.records import FILES, draw, main, pack

SHIPPED = Path(__file__).parents[2] / "records"
NAMES = sorted(path.parent.name for path in SHIPPED.glob("*/manifest.json"))
MIB = 2**20


@cache
def record(name: str) -> Records:
    return load_records(SHIPPED / name)


@cache
def drawn(name: str, figure: str) -> Any:
    return ALL_FIGURES[figure].draw(record(name))


OF_THE_WORLD = (
    "persona_mentions",
    "reinforcement",
    "thought_before_act",
    "world_beyond",
    "world_scale",
    "world_supervision",
)
"""Their tables of numbers are not shipped."""


def drawn_figures(name: str) -> list[str]:
    """By shipped tables: asking the records takes seconds, and every worker collects."""
    tables = {path.stem for path in (SHIPPED / name / "figures").glob("*.csv")}
    return sorted(tables & set(ALL_FIGURES)) or [figure for figure in OF_THE_WORLD if name == "world"]


CASES = [
    pytest.param(name, ALL_FIGURES[figure], id=f"{name}-{figure}") for name in NAMES for figure in drawn_figures(name)
]


def test_no_figure_is_left_out() -> None:
    for name in NAMES:
        assert drawn_figures(name) == sorted(spec.name for spec in figures_of(record(name)).values())


def test_csvs_are_the_shipped_ones_byte_by_byte(tmp_path: Path) -> None:
    assert draw(SHIPPED, tmp_path / "figures", formats=("csv",)) == []
    for name in NAMES:
        there = {path.name for path in (SHIPPED / name / "figures").glob("*.csv")}
        assert name == "world" or there == {path.name for path in (tmp_path / "figures" / name).glob("*.csv")}


def test_a_csv_that_differs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", "none")  # no images
    shutil.copytree(SHIPPED / "planted", tmp_path / "records" / "planted")
    csv = tmp_path / "records" / "planted" / "figures" / "planted_truth.csv"
    csv.write_text(csv.read_text().replace("latent", "Latent", 1))
    assert main(["draw", str(tmp_path / "records"), str(tmp_path / "out")]) == 1
    assert draw(tmp_path / "records", tmp_path / "out", formats=("csv",)) == ["planted/planted_truth.csv"]


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_every_figure_is_drawn_with_a_caption_that_counts(name: str, spec: FigureSpec) -> None:
    figure = drawn(name, spec.name)
    assert len(figure.data) > 0 and figure.layout.title.text is None
    text = caption(figure)
    assert re.search(r"n = \d|\[[+-]\d", text) and "ontrol" in text and not re.search(r"\bnan\b", text)
    assert text != spec.missing


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_text_is_legible_at_the_width_of_a_column(name: str, spec: FigureSpec) -> None:
    figure: Any = for_print(drawn(name, spec.name), "column", footer="origin")
    assert figure.layout.width == WIDTHS["column"].pixels == round(89 / 25.4 * 96)
    smallest = SMALLEST_PT * 96 / 72
    sizes = [figure.layout.font.size, figure.layout.title.font.size, *(n.font.size for n in figure.layout.annotations)]
    sizes += [t.textfont.size for t in figure.data if "text" in (getattr(t, "mode", None) or "")]
    assert min(sizes) >= smallest
    assert drawn(name, spec.name).layout.width is None  # the screen's figure is left alone


def test_captions_agree_with_the_numbers() -> None:
    demo, study = record("demo"), record("monitor-study")
    separation = pp.figures.data("separation", demo)
    text = caption(drawn("demo", "separation"))
    assert f"n = {len(separation)}," in text and f"({int(separation['misaligned'].sum())} checkpoints)" in text
    shares = pp.figures.data("early_detection", study)
    text = caption(drawn("monitor-study", "early_detection"))
    raised = where(shares, panel="score").groupby("bad_share")["ci_low"].min()
    first = min(share for share in raised.index if (raised.loc[share:] > 0).all())
    assert f"score from {100 * first:g}%" in text
    alarms = pp.figures.data("alarms", study).drop_duplicates("run")
    counts = alarms.groupby("label")["first_alarm"].agg(["count", "size"])
    text = caption(drawn("monitor-study", "alarms"))
    assert all(f"{row['count']} of {row['size']} {label}" in text for label, row in counts.iterrows())


def test_shares_go_from_none_to_all() -> None:
    data = pp.figures.data("score_share", record("monitor-study"))
    assert [round(share, 2) for share in distinct(data, "bad_share")] == [0, 0.05, 0.25, 0.5, 0.75, 1]
    assert where(data, bad_share=1.0)["ci_low"].min() > 0 > where(data, bad_share=0.0)["ci_high"].max()


def test_records_are_small_whole_and_free_of_machine_paths() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5 * MIB
    assert max(path.stat().st_size for path in files) < 2 * MIB
    measured = {
        "doses.parquet",
        "stress.parquet",
        "coverage.parquet",
        "errors.parquet",
        "pairs.parquet",
        "words.parquet",
        *(f"{name}.parquet" for name in WORLD_STUDIES),
    }
    kept = {*FILES, *measured, "manifest.json", "recipe.json", "README.md"}
    assert {path.name for path in files if path.suffix != ".csv"} <= kept
    text = "".join(p.read_text("utf-8") for p in files if p.suffix in (".json", ".jsonl", ".csv"))
    assert not any(start in text for start in ('"/tmp', '"/home', '"/root', '"/work', "C:\\\\"))


def test_packing_again_gives_the_same_record(tmp_path: Path) -> None:
    written = pack(SHIPPED / "demo", tmp_path / "demo")
    again = {path.relative_to(tmp_path / "demo"): path.read_bytes() for path in written}
    own = {path.relative_to(SHIPPED / "demo") for path in (SHIPPED / "demo").rglob("*") if path.is_file()}
    assert set(again) == own
    assert all((SHIPPED / "demo" / path).read_bytes() == content for path, content in again.items())


def test_what_cannot_be_packed_is_said(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no records"):
        pack(tmp_path, tmp_path / "record")
    manifest = json.loads((run_folder / "manifest.json").read_text())
    (run_folder / "manifest.json").write_text(json.dumps({**manifest, "model": "/home/someone/model"}))
    with pytest.raises(InputError, match="a path of this machine"):
        pack(run_folder, tmp_path / "record")
    assert main(["pack", str(tmp_path / "none"), str(tmp_path / "record")]) == 2
    assert main(["pick"]) == 2


def test_every_figure_has_its_function() -> None:
    names = set(pp.figures.__all__) - {"data", "for_print"}
    assert names == set(ALL_FIGURES)
    assert pp.figures.arms(record("demo")).to_json() == drawn("demo", "arms").to_json()
    with pytest.raises(InputError, match="unknown figure 'arm': did you mean 'arms'"):
        pp.figures.data("arm", record("demo"))


def test_a_folder_of_other_results_shows_only_what_it_holds() -> None:
    assert list(figures_of(record("planted"))) == ["planted_truth"]
    assert not set(figures_of(record("monitor-study"))) & set(FIGURES)


def test_the_command_draws_one_figure_and_refuses_an_unknown_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(SHIPPED / "planted")
    with pytest.raises(SystemExit) as done:
        cli(["figures", run, "--only", "planted_truth", "--format", "csv", "--out", str(tmp_path)])
    assert done.value.code == 0
    assert (tmp_path / "planted_truth.csv").read_bytes() == (
        SHIPPED / "planted" / "figures" / "planted_truth.csv"
    ).read_bytes()
    with pytest.raises(SystemExit) as refused:
        cli(["figures", run, "--only", "planted_trut", "--out", str(tmp_path)])
    assert refused.value.code == 2
    error = capsys.readouterr().err
    assert "unknown figure 'planted_trut': did you mean 'planted_truth'" in error and "Traceback" not in error
