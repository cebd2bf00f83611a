"""Known answers: pooled means and ratios, verdict words, the Pareto figure, the page."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest

from persona_probe.errors import InputError
from persona_probe.mitigate.grid.grid_summary import MARKS, markdown, summarise
from persona_probe.mitigate.grid.grid_table import WORDS, Values, exponential, mean, ratio, statement, verdict
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


def row(**numbers: tuple[float, float, float]) -> dict[str, Any]:
    """A table row: a mitigation that prevents, but for what is given as (estimate, low, high)."""
    start = {
        "index": (-0.5, -0.6, -0.4),
        "index_vs_base": (0.01, -0.05, 0.06),
        "index_vs_none": (-0.5, -0.6, -0.4),
        "dressed_vs_base": (0.02, -0.04, 0.08),
        "none_vs_base": (0.5, 0.4, 0.6),
        "gain_kept": (0.8, 0.7, 0.9),
        "perplexity_ratio": (1.1, 1.05, 1.15),
    }
    found: dict[str, Any] = {"cell": "kl 0.1", "state": "done", "error": ""}
    for name, (value, low, high) in (start | numbers).items():
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return found


ABOVE, BELOW, ACROSS = (0.2, 0.1, 0.3), (-0.2, -0.3, -0.1), (0.0, -0.1, 0.1)
NOT_BACK = {"index_vs_base": ABOVE, "index": (-0.3, -0.4, -0.2)}


@pytest.mark.parametrize(
    ("word", "numbers"),
    [
        ("prevents", {}),
        ("prevents by not learning the task", {"gain_kept": (0.2, 0.1, 0.3)}),
        ("hides", {"dressed_vs_base": ABOVE}),
        ("reduces", NOT_BACK),
        ("reduces", {"index": (-0.1, -0.2, 0.0)}),  # outside the base's own interval
        ("no effect shown", NOT_BACK | {"index_vs_none": ACROSS}),
        ("no effect shown", {"index_vs_none": ACROSS}),  # near the base, but not clearly away from none
        ("harms", NOT_BACK | {"index_vs_none": ABOVE}),
        ("harms", {"perplexity_ratio": (1.8, 1.5, 2.1)}),
        ("prevents", {"perplexity_ratio": (1.8, 0.9, 2.9)}),  # not clearly damaged
        ("nothing to prevent", {"none_vs_base": ACROSS}),
        ("reduces", NOT_BACK | {"index_vs_none": BELOW}),
    ],
)
def test_the_verdict_in_a_word(word: str, numbers: dict[str, tuple[float, float, float]]) -> None:
    found = row(**numbers)
    assert verdict(found, base_high=-0.4, perplexity_bound=1.5) == word and word in WORDS
    said = statement({**found, "verdict": word})
    assert said.startswith(f"kl 0.1: {word}; contrast index ") and "gain kept" in said


def test_a_run_that_diverged_is_called_so() -> None:
    found = {**row(), "state": "diverged", "error": "the loss became nan at step 3"}
    assert verdict(found, -0.4, 1.5) == "diverged"
    assert statement({**found, "verdict": "diverged"}) == "kl 0.1: diverged (the loss became nan at step 3)"


def table() -> pd.DataFrame:
    """Base, none and one mitigation, of one seed."""
    rows = []
    for label, verdict_, at, gain in (("base", "", 0.0, 0.0), ("none", "", 0.5, 1.0), ("kl", "prevents", 0.01, 0.8)):
        own = row(index_vs_base=(at, at - 0.1, at + 0.1), gain_kept=(gain, gain, gain))
        same = {"label": label, "strength": 0.1, "unit": "", "seeds": 1, "steps": 4.0, "verdict": verdict_}
        same |= {"explained_variance": 0.9, "persona": 1.0, "persona_in_band": True, "time_ratio": 1.0}
        same |= {"coherent": float("nan"), **own, "cell": f"{label}-s0"}
        seed = float("nan") if label == "base" else 0.0
        rows += [{"kind": "cell", "seed": seed, **same}, {"kind": "all", "seed": float("nan"), **same, "cell": label}]
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
    assert "| kl | +0.010 [-0.090, +0.110] |" in text and "Not trained yet: kl-0.1-s1." in text
    fill_page(page, MARKS, markdown(table()))
    assert page.read_text().count(begin) == 1 and "Not trained yet" not in page.read_text()
    page.write_text("no marks")
    with pytest.raises(InputError, match="has not the marks"):
        fill_page(page, MARKS, "x")


def test_the_summary_is_strict_json_in_words() -> None:
    found = summarise(table(), ["kl-0.1-s1"])
    assert [v["verdict"] for v in found["verdicts"]] == ["prevents"] and found["missing"] == ["kl-0.1-s1"]
    assert set(found["references"]) == {"base", "none"} and found["references"]["none"]["coherent"] is None
