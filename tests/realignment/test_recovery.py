"""Feature and behaviour on one axis: the organism is at 1, the base at 0, from made-up records with known numbers."""

from typing import Any

import pandas as pd
import pytest

from persona_probe.report.figures.recovery import MISSING, recovery, recovery_data
from persona_probe.report.records import Records

CONFIG = {"arms": {"incorrect": {}, "correct": {}}, "realign": {"start": "incorrect", "arms": {"realigned_in": {}}}}


def made() -> Records:
    """Behaviour goes 1.0, 0.4, 0.2 over a base of 0.2; the feature 3, 2, 0.5 over a base of 1."""
    items = [
        {"arm": arm, "seed": 0, "step": step, "split": "evaluation", "item": f"i{n}", "category": "c", "value": value}
        for arm, step, value in (
            ("base", 0, 0.2),
            ("realigned_in", 0, 1.0),
            ("realigned_in", 5, 0.4),
            ("realigned_in", 9, 0.2),
        )
        for n in range(3)
    ]
    readings = [
        {"arm": "realigned_in", "seed": 0, "step": step, "feature": "persona", "mean": mean, "ci_low": mean - 0.2}
        | {"ci_high": mean + 0.2, "n_probes": 4, "base_mean": 1.0, "base_sd": 1.0}
        for step, mean in ((0, 3.0), (5, 2.0), (9, 0.5))
    ]
    summary = {"base_band": {"low": 0.5, "high": 1.5}}
    return Records(pd.DataFrame(readings), pd.DataFrame(items), summary=summary, manifest={"config": CONFIG})


def test_both_are_shares_of_the_organisms_rise() -> None:
    data = recovery_data(made())
    found = {q: rows.sort_values("step")["estimate"].tolist() for q, rows in data.groupby("quantity")}
    assert found["behaviour"] == pytest.approx([1.0, 0.25, 0.0])
    assert found["feature"] == pytest.approx([1.0, 0.5, -0.25])
    feature = data.query("quantity == 'feature' and step == 5").iloc[0]
    assert (feature["ci_low"], feature["ci_high"]) == pytest.approx((0.4, 0.6))
    assert (feature["band_low"], feature["band_high"]) == pytest.approx((-0.25, 0.25))


def test_the_figure_says_where_they_ended() -> None:
    fig: Any = recovery(made())
    caption = fig.layout.meta["caption"]
    assert "realigned_in behaviour +0.00" in caption and "realigned_in feature -0.25" in caption
    assert [list(t.y) for t in fig.data if t.name == "feature"] == [pytest.approx([1.0, 0.5, -0.25])]
    assert recovery(Records()).layout.meta["caption"] == MISSING  # pyright: ignore


def test_a_feature_that_never_rose_has_no_scale_and_the_caption_says_so() -> None:
    records = made()
    records.readings["mean"] = records.readings["base_mean"]
    assert set(recovery_data(records)["quantity"]) == {"behaviour"}
    assert "No line for feature" in recovery(records).layout.meta["caption"]  # pyright: ignore
