import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from persona_probe.errors import InputError
from persona_probe.report.records import COLUMNS, as_estimate, load_records
from tests.report.run_records import evals, write_run


def test_loads_what_was_written(run_folder: Path) -> None:
    records = load_records(run_folder)
    pd.testing.assert_frame_equal(records.evals, evals())
    assert records.summary["study"] == "made-up"
    assert len(records.samples) == 14  # a line separator inside an answer does not split its row
    assert [card["latent"] for card in records.cards] == [3, 17, 21]


def test_missing_files_are_empty_with_the_right_columns(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    records = load_records(tmp_path)
    for name, columns in COLUMNS.items():
        table = getattr(records, name)
        assert table.empty and list(table.columns) == list(columns)
    assert (records.samples, records.cards, records.summary) == ([], [], {})


def test_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a run folder.*manifest\.json"):
        load_records(tmp_path)


def test_damaged_files_say_which(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "samples.jsonl").write_text('{"a": 1}\n{"a":\n')
    with pytest.raises(InputError, match=r"samples\.jsonl, line 2"):
        load_records(folder)
    write_run(folder)
    evals().drop(columns="value").to_parquet(folder / "evals.parquet")
    with pytest.raises(InputError, match=r"evals\.parquet has no column 'value'"):
        load_records(folder)
    evals().replace({"arm": {"correct": "corect"}}).to_parquet(folder / "evals.parquet")
    with pytest.raises(InputError, match=r"'corect'.*'correct'"):
        load_records(folder)
    write_run(folder)
    (folder / "evals.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"evals\.parquet cannot be read"):
        load_records(folder)
    write_run(folder)
    (folder / "summary.json").write_text("[]")
    with pytest.raises(InputError, match="holds a list, not an object"):
        load_records(folder)


def test_as_estimate() -> None:
    value = as_estimate(json.loads('{"estimate": 0.5, "ci_low": null, "ci_high": 0.75, "n": 3}'))
    assert value is not None and (value.estimate, value.ci_high, value.n) == (0.5, 0.75, 3)
    assert math.isnan(value.ci_low)
    assert as_estimate({"estimate": None}) is None
    assert as_estimate(None) is None


def test_no_file_of_the_report_imports_a_model() -> None:
    code = """
import pkgutil, sys, persona_probe.report as report
for module in pkgutil.walk_packages(report.__path__, report.__name__ + "."):
    __import__(module.name)
assert len(report.__all__) == len([getattr(report, name) for name in report.__all__])
print(sorted({"torch", "transformers", "sae_lens"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
