"""Known answers: pooled means and ratios, verdict words, the Pareto figure, the page."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest

from persona_probe.errors import InputError
from persona_probe.mitigate.grid.grid_summary import MARKS, markdown, summarise
from persona_probe.mitigate.grid.grid_table import Values, exponential, mean, ratio
from persona_probe.mitigate.grid.grid_verdict import WORDS, judge_rows, over_control, statement
from persona_probe.monitor.band import Band
from persona_probe.report.figures.mitigations import MISSING, mitigation_pareto, mitigation_pareto_data
from persona_probe.report.records import Records
from persona_probe.report.tables import fill_page
from persona_probe.stats import Estimate


def values(rows: dict[int, list[float]]) -> Values:
    """Seed -> one value an item."""
    return Values(pd.DataFrame(rows, index=[f"item {n}" for n in range(len(next(iter(rows.values()))))]))


def test_the_base_is_taken_at_every_seed() -> None:
    both = values({0: [1.0, 2.0], 1: [3.0, 4.0]})
    found = both.minus(values({-1: [1.0, 1.0]}))
    assert found.frame.to_numpy().tolist() == [[0.0, 2.0], [1.0, 3.0]]
    assert mean(found).estimate == 1.5 and mean(found).n == 4


def test_differences_are_paired_by_item_and_seed() -> None:
    noisy = np.random.default_rng(0).normal(size=20).tolist()
    left = values({0: [x + 0.25 for x in noisy], 1: [x + 0.25 for x in noisy]})
    right = values({0: noisy, 2: noisy})
    found = mean(left.minus(right))  # only seed 0 is on both sides
    assert found.n == 20 and (found.estimate, found.ci_low, found.ci_high) == pytest.approx((0.25, 0.25, 0.25))


def test_the_interval_holds_the_spread_between_seeds() -> None:
    found = mean(values({0: [0.0] * 30, 1: [1.0] * 30}))
    assert found.estimate == 0.5 and (found.ci_low, found.ci_high) == (0.0, 1.0)


def test_a_ratio_is_paired_in_every_draw() -> None:
    whole = np.random.default_rng(1).normal(2, 1, size=15)
    kept = ratio(values({0: (0.25 * whole).tolist()}), values({0: whole.tolist()}))
    assert (kept.estimate, kept.ci_low, kept.ci_high) == pytest.approx((0.25, 0.25, 0.25))
    assert ratio(values({0: [1.0]}), values({0: [-1.0]})).n == 0
    assert ratio(values({0: [1.0]}), values({1: [1.0]})).n == 0


def test_log_ratios_become_ratios() -> None:
    found = exponential(Estimate(0.0, -1.0, 1.0, 3))
    assert (found.estimate, found.ci_low, found.ci_high) == pytest.approx((1.0, np.exp(-1), np.exp(1)))


NUMBERS = {
    "index_vs_base": (0.01, -0.05, 0.06),
    "index_vs_none": (-0.5, -0.6, -0.4),
    "index_vs_control": (0.02, -0.04, 0.08),
    "dressed_vs_base": (0.02, -0.04, 0.08),
    "dressed_vs_control": (0.02, -0.04, 0.08),
    "gain_kept": (0.8, 0.7, 0.9),
    "perplexity_ratio": (1.05, 1.02, 1.08),
    "persona": (0.5, 0.4, 0.6),
    "explained_variance": (0.72, 0.72, 0.72),
}
NONE = {"index_vs_base": (0.5, 0.4, 0.6), "index_vs_control": (0.5, 0.4, 0.6), "dressed_vs_control": (0.5, 0.4, 0.6)}
ABOVE, BELOW, ACROSS = (0.2, 0.15, 0.3), (-0.2, -0.3, -0.1), (0.0, -0.1, 0.1)
NOT_BACK, MAYBE = {"index_vs_base": ABOVE}, (0.05, -0.02, 0.15)
BAND = Band(0.0, 1.0)


Numbers = dict[str, tuple[float, float, float]]


def row(label: str, **numbers: tuple[float, float, float]) -> dict[str, Any]:
    """A table row over seeds: a mitigation that prevents, but for what is given as (estimate, low, high)."""
    found: dict[str, Any] = {"kind": "all", "cell": label, "label": label, "state": "done", "error": ""}
    found |= {"seed": float("nan")}
    for name, (value, low, high) in (NUMBERS | numbers).items():
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return found


def judged(numbers: Numbers, none: Numbers = NONE) -> dict[Any, Any]:
    """The judged row of a mitigation."""
    rows = [row("base"), row("none", **none), row("control"), row("kl", **numbers)]
    return judge_rows(pd.DataFrame(rows), BAND, perplexity_bound=1.5, margin=0.2).to_dict("records")[-1]


@pytest.mark.parametrize(
    ("word", "numbers"),
    [
        ("prevents", {}),
        ("prevents by not learning the task", {"gain_kept": (0.2, 0.1, 0.3)}),
        ("prevents, task undecided", {"gain_kept": (0.5, 0.3, 0.7)}),
        ("hides", {"dressed_vs_base": ABOVE}),
        ("hides", {"dressed_vs_control": ABOVE}),
        ("reduces", {"dressed_vs_base": MAYBE}),  # neither back nor shown to stay
        ("reduces", NOT_BACK),
        ("reduces", {"index_vs_control": ABOVE}),  # back at the base's, but not at the control's
        ("reduces", {"index_vs_base": MAYBE}),
        ("no effect shown", NOT_BACK | {"index_vs_none": ACROSS}),
        ("no effect shown", {"index_vs_none": ACROSS}),  # near the base, but not shown to differ from none
        ("harms", NOT_BACK | {"index_vs_none": ABOVE}),
        ("harms", {"perplexity_ratio": (1.8, 1.6, 2.1)}),
        ("prevents", {"perplexity_ratio": (1.8, 0.9, 2.9)}),  # not shown to be damaged
        ("reduces", NOT_BACK | {"index_vs_none": BELOW}),
    ],
)
def test_the_verdict_in_a_word(word: str, numbers: Numbers) -> None:
    found = judged(numbers)
    assert found["verdict"] == word and word in WORDS
    said = statement(found)
    assert said.startswith(f"kl: {word}; behaviour {found['behaviour']} (contrast index minus no mitigation ")
    assert "of its gain" in said and "nan" not in said


@pytest.mark.parametrize("against", ["index_vs_base", "index_vs_control"])
def test_without_a_rise_there_is_nothing_to_prevent(against: str) -> None:
    assert judged({}, NONE | {against: ACROSS})["verdict"] == "nothing to prevent"


def test_each_part_has_the_word_of_the_package() -> None:
    found = judged({})
    assert (found["behaviour"], found["dressed_behaviour"], found["feature"]) == ("restored", "restored", "subsided")
    assert (found["task_kept"], found["chat_kept"], found["sae"]) == ("kept", "kept", "still fitting")
    # the upper end must lie below 0.2 of the rise of 0.5
    assert judged({"index_vs_base": (0.02, -0.05, 0.11)})["behaviour"] == "undecided"
    assert judged({"index_vs_control": (0.1, 0.01, 0.2)})["behaviour"] == "not restored"
    assert judged({"persona": (0.9, 0.7, 1.1)})["feature"] == "undecided"
    assert judged({"persona": (2.0, 1.5, 2.5)})["feature"] == "not subsided"
    assert judged({"gain_kept": (0.3, 0.2, 0.4)})["task_kept"] == "paid"
    assert judged({"perplexity_ratio": (1.2, 1.05, 1.4)})["chat_kept"] == "paid"
    assert judged({"perplexity_ratio": (1.0, 0.8, 1.3)})["chat_kept"] == "undecided"
    assert judged({"explained_variance": (0.5, 0.5, 0.5)})["sae"] == "no longer fitting"


def test_without_a_control_behaviour_is_not_tested_unless_it_is_above_the_base() -> None:
    rows = pd.DataFrame([row("base"), row("none", **NONE), row("kl"), row("late", **NOT_BACK)])
    without = rows.drop(columns=list(rows.filter(like="_vs_control")))
    found = judge_rows(without, BAND, 1.5, 0.2).set_index("label")
    assert found.loc["kl", "behaviour"] == "not tested" and found.loc["late", "behaviour"] == "not restored"
    assert found.loc["kl", "verdict"] == "reduces"
    assert "minus control not tested" in statement({**found.loc["kl"], "cell": "kl"})


def test_a_difference_from_the_control_that_was_not_measured_covers_the_one_that_is() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=60)
    items = {"kl": base + rng.normal(0.3, 0.4, 60), "control": base + rng.normal(-0.2, 0.3, 60)}
    rows = {name: mean(values({0: (v - base).tolist()})) for name, v in items.items()}
    own = {n: (e.estimate, e.ci_low, e.ci_high) for n, e in rows.items()}
    table = pd.DataFrame([row(name, index_vs_base=own[name]) for name in items])
    table = table.drop(columns=list(table.filter(like="_vs_control")))
    found = over_control(table).to_dict("records")[0]
    paired = mean(values({0: items["kl"].tolist()}).minus(values({0: items["control"].tolist()})))
    assert found["index_vs_control"] == pytest.approx(paired.estimate)
    assert found["index_vs_control_low"] < paired.ci_low and paired.ci_high < found["index_vs_control_high"]
    alone = over_control(table).to_dict("records")[1]
    assert alone["index_vs_control"] == alone["index_vs_control_low"] == 0


def test_a_run_that_diverged_is_called_so() -> None:
    rows = pd.DataFrame([row("base"), row("none", **NONE), row("control"), row("kl")])
    rows.loc[3, ["state", "error"]] = "diverged", "the loss became nan at step 3"
    found = judge_rows(rows, BAND, 1.5, 0.2).to_dict("records")[-1]
    assert statement(found) == "kl: diverged (the loss became nan at step 3)" and found["behaviour"] == ""


def table() -> pd.DataFrame:
    """Base, none and one mitigation, of one seed."""
    rows = []
    for label, verdict_, at, gain in (("base", "", 0.0, 0.0), ("none", "", 0.5, 1.0), ("kl", "prevents", 0.01, 0.8)):
        own = row(label, index_vs_base=(at, at - 0.1, at + 0.1), gain_kept=(gain, gain, gain))
        same = {"label": label, "strength": 0.1, "unit": "", "seeds": 1, "steps": 4.0, "verdict": verdict_}
        same |= {"persona_in_band": True, "time_ratio": 1.0, "coherent": float("nan")}
        same |= {
            "behaviour": "restored",
            "dressed_behaviour": "restored",
            "feature": "subsided",
            "sae": "still fitting",
        }
        same = {**own, **same, "task_kept": "kept", "chat_kept": "kept"}
        seed = float("nan") if label == "base" else 0.0
        rows += [same | {"kind": "cell", "seed": seed, "cell": f"{label}-s0"}, same]
    return pd.DataFrame(rows)


def test_the_figure_draws_every_cell_and_says_what_it_shows() -> None:
    fig: Any = mitigation_pareto(Records(mitigations=table()))
    means, (seeds, *marks) = fig.data[:3], cast("Any", fig.data[3:])  # pyright: ignore
    assert list(seeds.x) == [0.0, 1.0, 0.8] and list(seeds.y) == [0.0, 0.5, 0.01]
    assert {trace.name for trace in means} == {"prevents", "base", "none"}
    assert [list(trace.text) for trace in marks] == [["1"], ["base"], ["none"]]
    assert ">1 kl<" in fig.layout.annotations[0].text  # pyright: ignore
    caption = fig.layout.meta["caption"]  # pyright: ignore
    assert "1 mitigations and strengths" in caption and "2 runs of 1 seed;" in caption and "1 prevents" in caption


def test_a_mark_without_an_interval_stands_at_its_mean() -> None:
    bare = table().assign(index_vs_base_low=float("nan"), index_vs_base_high=float("nan"))
    fig = mitigation_pareto(Records(mitigations=bare))
    marks = {trace.text[0]: trace.y[0] for trace in cast("Any", fig.data) if trace.mode == "text"}
    assert marks == {"1": 0.01, "base": 0.0, "none": 0.5}


def test_what_diverged_is_not_drawn_and_an_empty_table_says_why() -> None:
    broken = Records(mitigations=table().assign(gain_kept=float("nan")))
    assert mitigation_pareto_data(broken).empty
    assert mitigation_pareto(broken).layout.meta["caption"] == MISSING  # pyright: ignore
    assert mitigation_pareto_data(Records(mitigations=pd.DataFrame())).empty


def test_the_page_is_filled_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = MARKS
    page.write_text(f"# Title\n{begin}\nold\n{end}\nafter\n")
    fill_page(page, MARKS, markdown(table(), ["kl-0.1-s1"]))
    text = page.read_text()
    assert text.startswith("# Title\n") and text.endswith(f"{end}\nafter\n") and "old" not in text
    assert "| kl | +0.020 [-0.040, +0.080] | +0.010 [-0.090, +0.110] |" in text and "| 0.5 (subsided) |" in text
    assert "Not trained yet: kl-0.1-s1." in text
    fill_page(page, MARKS, markdown(table()))
    assert page.read_text().count(begin) == 1 and "Not trained yet" not in page.read_text()
    page.write_text("no marks")
    with pytest.raises(InputError, match="has not the marks"):
        fill_page(page, MARKS, "x")


def test_the_summary_is_strict_json_in_words() -> None:
    found = summarise(table(), ["kl-0.1-s1"])
    assert [v["verdict"] for v in found["verdicts"]] == ["prevents"] and found["missing"] == ["kl-0.1-s1"]
    assert set(found["references"]) == {"base", "none"} and found["references"]["none"]["coherent"] is None
