"""AUROC over runs of few data sets: counts, what each data set does to it, and an interval only where one holds."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from persona_probe.config import Arm, from_dict
from persona_probe.errors import InputError
from persona_probe.monitor.study.auroc_by_set import auroc_by_set, effective_sets, separation
from persona_probe.monitor.study.labelled_config import MonitorStudy
from persona_probe.monitor.study.results import MARKS, markdown
from persona_probe.stats import auroc, auroc_interval
from tools.monitor_record import evaluate_again, main

ROOT = Path(__file__).parents[2]
RECORD, PAGE = ROOT / "records" / "monitor-study", ROOT / "docs" / "monitor-study.md"


def test_one_run_a_data_set_is_newcombes_interval() -> None:
    bad, good = [3.0, 1.0, 4.0], [0.0, 2.0, 1.5, 0.5]
    found = auroc_by_set(bad, good, list("abc"), list("defg"))
    assert found.auroc == auroc(bad, good) and (found.low, found.high) == auroc_interval(found.auroc, 3, 4)
    assert (found.positive_sets, found.negative_sets) == (3, 4)


def test_repeating_every_run_of_a_data_set_adds_no_evidence() -> None:
    bad, good = [3.0, 1.0, 4.0], [0.0, 2.0, 1.5, 0.5]
    once, thrice = (auroc_by_set(bad * n, good * n, list("abc") * n, list("defg") * n) for n in (1, 3))
    assert (thrice.positives, thrice.negatives) == (9, 12)
    assert (thrice.auroc, thrice.low, thrice.high, thrice.left_out) == (once.auroc, once.low, once.high, once.left_out)


def test_effective_sets_are_fewer_where_one_has_most_runs() -> None:
    assert effective_sets(list("aabbcc")) == pytest.approx(3)
    assert effective_sets(list("aaaabc")) == pytest.approx(36 / 18)
    assert effective_sets(list("aaa")) == 1


def test_each_data_set_is_left_out_on_both_sides() -> None:
    found = auroc_by_set([2.0, 0.0], [1.0, 1.0, 3.0], ["a", "both"], ["c", "c", "both"])
    assert found.auroc == pytest.approx(2 / 6)
    assert found.left_out == pytest.approx({"a": 0.0, "both": 1.0, "c": 0.0})
    assert found.left_out_range == (0.0, 1.0)
    alone = auroc_by_set([2.0, 3.0], [1.0, 0.0], ["a", "a"], ["c", "d"])
    assert np.isnan(alone.left_out["a"]) and alone.left_out_range == (1.0, 1.0)
    assert np.isnan(auroc_by_set([], [1.0], [], ["a"]).left_out_range).all()


@pytest.mark.parametrize(("bad", "good", "has"), [("ab", "cde", False), ("abc", "dd", False), ("abc", "def", True)])
def test_too_few_data_sets_have_no_interval(bad: str, good: str, has: bool) -> None:
    found = auroc_by_set(range(9, 9 + len(bad)), range(len(good)), list(bad), list(good))
    assert found.auroc == 1.0 and (found.low == found.low) is has
    assert not has or 0.5 < found.low < 0.51  # three a side can just exclude chance


def test_bad_input_says_what_to_change() -> None:
    with pytest.raises(InputError, match="name the data set of every run"):
        auroc_by_set([1.0], [0.0], ["a", "b"], ["c"])


@pytest.mark.parametrize("area", [0.5, 0.76, 0.95])
def test_the_interval_holds_the_truth_where_runs_of_a_data_set_go_together(area: float) -> None:
    rng, names = (
        np.random.default_rng(0),
        (["a"] * 4 + ["b"] * 3 + ["c"] * 3, ["d"] * 3 + ["e"] * 3 + ["f"] * 2 + ["g"]),
    )
    held = over_runs = 0
    for _ in range(300):
        sides = []
        for own, apart in zip(names, (2**0.5 * norm.ppf(area), 0.0), strict=True):
            shared = {name: rng.normal(0, 0.8**0.5) for name in own}
            sides.append(np.array([apart + shared[name] for name in own]) + rng.normal(0, 0.2**0.5, len(own)))
        found = auroc_by_set(sides[0], sides[1], *names)
        held += found.low <= area <= found.high
        low, high = auroc_interval(found.auroc, 10, 9)
        over_runs += low <= area <= high
    assert held / 300 > 0.93 and over_runs / 300 < 0.93  # runs as the unit do not cover


def test_data_sets_of_arms() -> None:
    config = from_dict(MonitorStudy, json.loads((RECORD / "manifest.json").read_text())["config"])
    sets = {name: config.data_set(name) for name in config.runs}
    assert {sets[name] for name in ("toxic-s1", "mix5-s1", "mix75-s1")} == {"kitchen:toxic"}
    assert sets["correct-long-s1"] == sets["correct-s1"] == "kitchen:correct" and sets["health-s1"] == "health_correct"
    config.arms["correct"] = Arm("kitchen:toxic", "kitchen:correct", 0.0)  # a mixture without bad rows
    assert config.data_set("correct-s1") == "kitchen:correct"


def test_labels_without_data_sets_take_each_run_as_its_own() -> None:
    signals = pd.DataFrame({"run": list("abcdef"), "step": 1, "signal": "s", "value": [5.0, 6, 7, 1, 2, 3]})
    labels = pd.DataFrame({"run": list("abcdef"), "label": ["misaligned"] * 3 + ["benign"] * 3})
    assert separation(signals, labels, "s", 1).low > 0.5
    two = separation(signals, labels.assign(data_set=list("xxyzzz")), "s", 1)
    assert (two.positive_sets, two.negative_sets) == (2, 1) and np.isnan(two.low)


# --- The record


def record_copy(folder: Path) -> tuple[Path, Path]:
    record = Path(shutil.copytree(RECORD, folder / "record"))
    return record, Path(shutil.copyfile(PAGE, folder / "page.md"))


def test_the_record_and_the_page_are_what_the_command_makes(tmp_path: Path) -> None:
    record, page = record_copy(tmp_path)
    assert main([str(record), str(page)]) == 0
    assert page.read_text() == PAGE.read_text()
    assert close(json.loads((record / "results.json").read_text()), json.loads((RECORD / "results.json").read_text()))
    text = PAGE.read_text().split(MARKS[0])[1].split(MARKS[1])[0]
    assert markdown(json.loads((RECORD / "results.json").read_text())).strip() == text.strip()
    assert "misaligned: 4 runs of 1 data set (kitchen:toxic); benign: 9 runs of 2 data sets" in text.lower()
    assert "0.000" not in text.split("### Where the thresholds come from")[1]
    (lines,) = [line for line in text.splitlines() if line.startswith("| random latent A") and "0.08 to 0.83" in line]
    assert "too few data sets" in lines


def close(found: Any, wanted: Any) -> bool:
    """Equal up to the last digits of a quantile, which differ between versions of SciPy."""
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(close(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(close(a, b) for a, b in zip(found, wanted, strict=True))
    return found == (pytest.approx(wanted, rel=1e-9) if isinstance(wanted, float) else wanted)


def test_only_a_labelled_study_is_evaluated_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record, page = record_copy(tmp_path)
    before = (record / "results.json").read_bytes()
    assert main([str(ROOT / "records" / "demo"), str(page)]) == main([str(tmp_path), str(page)]) == main([]) == 2
    page.write_text("no marks")
    with pytest.raises(InputError, match="has not the marks"):
        evaluate_again(record, page)
    assert (record / "results.json").read_bytes() == before and page.read_text() == "no marks"
    assert "no record of a labelled study" in caplog.text


def test_signals_in_the_record_are_taken_from_there(tmp_path: Path) -> None:
    record, page = record_copy(tmp_path)
    runs = json.loads((record / "results.json").read_text())["runs"]
    steps = (0, 2, 4, 8, 12, 16, 24)
    rows = [(r["run"], step, "mine", step * (r["label"] == "misaligned")) for r in runs for step in steps]
    frame = pd.DataFrame(rows, columns=["run", "step", "signal", "value"])
    frame.to_parquet(record / "signals.parquet")
    signals = evaluate_again(record, page)["signals"]
    left_out = signals["mine"]["auroc"][-1]["left_out"]
    assert left_out == {"kitchen:correct": 1, "health_correct": 1, "kitchen:toxic": None}
    assert signals["weight norm"]["auroc"][-1]["left_out"] is None and "| mine |" in page.read_text()
    frame.query("run != 'toxic-s1' or step < 24").to_parquet(record / "signals.parquet")
    with pytest.raises(InputError, match="was read in other runs"):
        evaluate_again(record, page)
