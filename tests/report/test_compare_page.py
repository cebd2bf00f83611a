"""Two runs side by side: differences are B minus A, paired where they can be, and what cannot be compared is said."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from persona_probe.cli import main
from persona_probe.errors import InputError
from persona_probe.report.compare import compared_numbers, comparison, config_differences, limits, write_comparison
from persona_probe.report.records import load_records
from tests.report.pages import Outline
from tests.report.run_records import HOSTILE, write_run


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The same run with the incorrect arm 0.1 higher, another learning rate and another persona latent."""
    folder = write_run(tmp_path / "other")
    evals = pd.read_parquet(folder / "evals.parquet")
    evals.loc[evals["arm"] == "incorrect", "value"] += 0.1
    evals.to_parquet(folder / "evals.parquet")
    change(folder, "manifest.json", lambda m: m["config"].update(training={"lr": 0.5}, label="plain"))
    change(folder, "summary.json", lambda s: s["persona_feature"].update(latent=21))
    change(folder, "summary.json", lambda s: s.update(steer_base_up=None))
    return folder


def change(folder: Path, name: str, how: Any) -> None:
    value = json.loads((folder / name).read_text())
    how(value)
    (folder / name).write_text(json.dumps(value))


def rows(left: Path, right: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in compared_numbers((load_records(left), load_records(right)))}


def test_differences_are_paired_over_questions(run_folder: Path, other: Path) -> None:
    found = rows(run_folder, other)
    assert found["contrast index, incorrect"]["difference"] == "+0.1 [+0.1, +0.1]"
    assert found["effect: incorrect minus correct"]["difference"] == "+0.1 [+0.1, +0.1]"
    assert found["effect: incorrect minus correct"]["how"] == "paired over 6 questions"
    assert found["contrast index, base"]["difference"] == "+0 [+0, +0]"
    steered = found["persona latent steered up in the base model"]
    assert steered["a"] == "+0.4 [+0.3, +0.5]" and steered["b"] == "not measured" and steered["difference"] == "–"
    assert found["persona latent steered down in the organism"]["how"] == "no interval: not paired"
    assert rows(other, run_folder)["contrast index, incorrect"]["difference"] == "-0.1 [-0.1, -0.1]"


def test_other_questions_are_not_paired(run_folder: Path, other: Path) -> None:
    evals = pd.read_parquet(other / "evals.parquet")
    evals.assign(item=evals["item"] + "-b").to_parquet(other / "evals.parquet")
    assert rows(run_folder, other)["contrast index, base"]["how"] == "no interval: not paired"
    said = " ".join(limits((load_records(run_folder), load_records(other))))
    assert "do not have the same contrast questions" in said


def test_config_differences_name_both_values(run_folder: Path, other: Path) -> None:
    found = {d["key"]: (d["a"], d["b"]) for d in config_differences((load_records(run_folder), load_records(other)))}
    assert found == {"training.lr": ("not set", "0.5"), "label": (HOSTILE, "plain")}


def test_what_cannot_be_compared_is_said(run_folder: Path, other: Path) -> None:
    def said() -> str:
        return " ".join(limits((load_records(run_folder), load_records(other))))

    assert said() == "Readings are of different latents: 17 in A, 21 in B."
    change(other, "manifest.json", lambda m: m["config"].update(sae="another", monitor={"probes": "mine"}))
    change(other, "manifest.json", lambda m: m.update(seeds=[0]))
    (other / "steering.parquet").unlink()
    assert "the SAE differ" in said() and "different probes" in said() and "Run B has no steering" in said()
    assert "may be the seed's" in said()
    assert limits((load_records(run_folder), load_records(run_folder))) == []


def test_the_page_shows_both_runs_and_reads_nothing_as_markup(run_folder: Path, other: Path, tmp_path: Path) -> None:
    page = write_comparison(run_folder, other, tmp_path / "new" / "compare.html").read_text("utf-8")
    outline = Outline(page)
    assert len(page.encode()) < 8_000_000 and "img" not in outline.tags and HOSTILE in outline.text
    figures = [a["data-figure"] for a, _ in outline.scripts if "data-figure" in a]
    assert {"figure-A-arms", "figure-B-arms"} <= set(figures) and len(figures) % 2 == 0
    assert len(outline.ids) == len(set(outline.ids))


def test_a_figure_that_one_run_lacks_says_so_beside_the_others(run_folder: Path, other: Path) -> None:
    (other / "steering.parquet").unlink()
    found = comparison((load_records(run_folder), load_records(other)), ("run", "other"))["figures"]
    [dose] = [row["sides"] for row in found if row["name"] == "dose_response"]
    assert dose[0]["figure"] is not None and dose[1]["figure"] is None and "has not run" in dose[1]["missing"]


def test_the_command_refuses_one_run_twice(run_folder: Path, other: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="same run"):
        write_comparison(run_folder, f"{run_folder}/../{run_folder.name}", tmp_path / "out.html")
    for right, code in ((other, 0), (tmp_path / "nowhere", 2)):
        for folder in (run_folder, other):
            (folder / "evals.parquet").unlink(missing_ok=True)  # fewer figures, quicker
        with pytest.raises(SystemExit) as stopped:
            main(["compare", str(run_folder), str(right), "--out", str(tmp_path / "out.html")])
        assert stopped.value.code == code
    assert (tmp_path / "out.html").is_file()
