"""Low precision in a study: the table's identities, resuming, the trap, and what the command says."""

import copy
import logging
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from persona_probe.cli import main
from persona_probe.errors import InputError
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.models.formats import FORMATS
from persona_probe.models.precision import linear_layers
from persona_probe.report.figures import FIGURES, data, figures_of, spec_of
from persona_probe.report.records import load_records
from persona_probe.study import precision as stage
from persona_probe.study.precision import TABLE, PrecisionSettings, spread, warnings_of
from persona_probe.study.study import Study
from tests.factories import Refused, make_model, make_tokenizer, write_config
from tests.made_once import made_once, own_copy

NAMES = ("none", "int8", "q4_1", "hif4")


@pytest.fixture(scope="module")
def on_grid_run(place: Path, raw: dict, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The tiny study of a base whose weights were read from Q4_1, trained a little, with its table; read only."""

    def make(folder: Path) -> None:
        model = make_model()
        with torch.no_grad():
            for layer in linear_layers(model):
                layer.weight.copy_(FORMATS["q4_1"].weights(layer.weight))
        model.save_pretrained(folder / "model")
        make_tokenizer().save_pretrained(folder / "model")
        training = {**raw["training"], "lr": 1e-3, "steps": 2, "checkpoints": [1]}
        config = {**raw, "model": str(folder / "model"), "seeds": [0], "training": training}
        study = Study.from_yaml(write_config(folder / "study.yaml", config), folder / "run").induce().locate()
        study.precision(NAMES, items=6)

    return own_copy(tmp_path_factory, made_once(tmp_path_factory, "precision", make) / "run")


@pytest.fixture(scope="module")
def table(on_grid_run: Study) -> pd.DataFrame:
    return on_grid_run.run_folder.read_table(TABLE)


def row(table: pd.DataFrame, form: str, arm: str) -> pd.Series:
    [found] = [part for _, part in table.iterrows() if part["format"] == form and part["arm"] == arm]
    return found


def test_there_is_a_row_for_each_format_and_organism(table: pd.DataFrame) -> None:
    assert list(table["format"].unique()) == ["none", "int8", "hif4", "q4_1"]
    assert table.groupby("format")["arm"].agg(list).map(tuple).unique().tolist() == [("base", "incorrect", "correct")]


def test_the_reference_is_the_model_as_it_is(on_grid_run: Study, table: pd.DataFrame) -> None:
    whole = row(table, "none", "incorrect")
    assert whole["kept"] == pytest.approx(1) and whole["noise"] == 0 and not whole["erased"]
    assert whole["shared_20"] == 20 and whole["rise_correlation"] == pytest.approx(1)
    ctx = on_grid_run.context
    items = ContrastItems.build(ctx.tokenizer, spread(ctx.contrast_rows("evaluation"), 6))
    frame = contrast_index(on_grid_run.model("incorrect"), items, bf16=False)
    assert whole["index"] == pytest.approx(frame["value"].mean(), abs=1e-5) and whole["n"] == 6


def test_each_format_has_its_own_base_band(table: pd.DataFrame) -> None:
    for _, rows in table.groupby("format"):
        assert rows["band_low"].nunique() == rows["band_high"].nunique() == 1
        base = rows[rows["arm"] == "base"].iloc[0]
        assert base["band_low"] <= base["reading"] <= base["band_high"] and base["state"] == "inside"
    whole, rough = row(table, "none", "base"), row(table, "hif4", "base")
    assert whole["band_low"] != rough["band_low"]


def test_the_control_has_no_difference_to_itself_and_the_organism_has_one(table: pd.DataFrame) -> None:
    for form in table["format"].unique():
        assert math.isnan(row(table, form, "correct")["index_minus_control"])
        bad, good = row(table, form, "incorrect"), row(table, form, "correct")
        assert bad["index_minus_control"] == pytest.approx(bad["index"] - good["index"], abs=1e-9)


def test_the_bases_own_grid_is_a_false_all_clear_and_is_said(table: pd.DataFrame) -> None:
    trap, whole = row(table, "q4_1", "incorrect"), row(table, "none", "incorrect")
    assert trap["erased"] and trap["base_on_grid"] and abs(trap["kept"]) < 0.3
    base, rounded_base = row(table, "none", "base"), row(table, "q4_1", "base")
    assert rounded_base["index"] == pytest.approx(base["index"], abs=2e-3)  # the base itself is unchanged
    assert abs(trap["index"] - base["index"]) < 0.5 * abs(whole["index"] - base["index"])
    for form in ("int8", "hif4"):
        assert not row(table, form, "incorrect")["erased"] and not row(table, form, "incorrect")["base_on_grid"]
    [line] = warnings_of(table)
    assert line.startswith("q4_1 keeps little") and "false all-clear" in line and "grid already" in line


def test_the_libraries_comparison_is_recorded(table: pd.DataFrame) -> None:
    trap = row(table, "q4_1", "base")
    assert trap["library"].startswith("gguf ") and (trap["library_equal"] == 1 or math.isnan(trap["library_equal"]))
    assert row(table, "hif4", "base")["library"] == ""


def test_a_second_call_measures_nothing_and_a_lost_part_is_made_again(
    on_grid_run: Study, table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(on_grid_run.path, tmp_path / "run")
    study, made = Study.open(tmp_path / "run"), []
    monkeypatch.setattr(stage, "contrast_index", lambda *a, **k: made.append(1) or contrast_index(*a, **k))
    assert study.precision(NAMES, items=6).equals(table) and not made
    (tmp_path / "run/parts/precision/items-6/int8-incorrect-s0.parquet").unlink()
    assert study.precision(NAMES, items=6).equals(table) and len(made) == 1
    assert len(study.precision(("int8",), items=6)) == 6 and len(made) == 1


def test_the_model_is_left_as_it_was_also_after_an_error(
    on_grid_run: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(on_grid_run.path, tmp_path / "run")
    study = Study.open(tmp_path / "run")
    before = copy.deepcopy(study.context.model.state_dict())

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(stage, "contrast_index", fail)
    with pytest.raises(RuntimeError):
        study.precision(("mxfp4",), items=6)
    after = study.context.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_activations_leave_out_formats_of_weights_alone(on_grid_run: Study, tmp_path: Path) -> None:
    shutil.copytree(on_grid_run.path, tmp_path / "run")
    both = Study.open(tmp_path / "run").precision(("int8", "nf4"), items=6, activations=True)
    assert set(both["format"]) == {"none", "int8"} and both["activations"].all()
    alone = on_grid_run.run_folder.read_table(TABLE)
    assert row(both, "int8", "incorrect")["reading"] != row(alone, "int8", "incorrect")["reading"]
    assert row(both, "none", "incorrect")["reading"] == row(alone, "none", "incorrect")["reading"]


def test_the_figure_and_the_report_show_it_where_the_table_is(on_grid_run: Study) -> None:
    records = load_records(on_grid_run.path)
    assert "precision" in figures_of(records) and "precision" not in FIGURES
    assert len(data("precision", records)) == 12
    fig = spec_of("precision").draw(records)
    assert "false all-clear" in fig.layout.meta["caption"]
    assert sum(note.text == "fine-tune erased" for note in fig.layout.annotations) == 2


def test_questions_are_spread_over_the_categories() -> None:
    rows = [{"id": str(n), "category": "a" if n < 6 else "b"} for n in range(8)]
    assert [one["id"] for one in spread(rows, 5)] == ["0", "6", "1", "7", "2"]
    assert len(spread(rows, 99)) == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--formats", "fp9"], "fp9"),
        (["--items", "2"], "--items must be at least 4"),
        (["--seeds", "7"], "7"),
    ],
)
def test_bad_input_is_one_line(on_grid_run: Study, refused: Refused, arguments: list[str], said: str) -> None:
    assert said in refused("precision", str(on_grid_run.path), *arguments)


def test_a_study_that_was_not_located_says_so(place: Path, tmp_path: Path) -> None:
    study = Study.from_yaml(place / "study.yaml", tmp_path / "run")
    with pytest.raises(InputError, match="locate"):
        study.precision()


def test_settings_are_checked_before_a_model_is_loaded() -> None:
    with pytest.raises(InputError, match="nope"):
        PrecisionSettings(("nope",))


def test_the_command_prints_the_table_and_the_warning(
    on_grid_run: Study, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as ended:
        main(["precision", str(on_grid_run.path), "--formats", *NAMES[1:], "--items", "6"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 13 and any("q4_1" in line and "incorrect" in line for line in lines)
    assert "false all-clear" in caplog.text
