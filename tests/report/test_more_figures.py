"""Figures that the made-up run does not fill by itself: passages, separation, lengths, agreement, model size."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from persona_probe.report.export import caption
from persona_probe.report.figures import ALL_FIGURES, FIGURES
from persona_probe.report.figures.domains import split_name
from persona_probe.report.figures.separation import threshold
from persona_probe.report.records import OPTIONAL, Records
from persona_probe.report.select import where
from persona_probe.stats import exact_share
from tests.report.run_records import HOSTILE, INDEX

MORE = [name for name in ALL_FIGURES if name not in FIGURES]


@pytest.mark.parametrize("name", MORE)
def test_without_records_a_figure_says_why(name: str) -> None:
    spec = ALL_FIGURES[name]
    assert spec.data(Records()).empty
    assert caption(spec.draw(Records())) == spec.missing


def test_separation_is_paired_with_the_base(records: Records) -> None:
    data = ALL_FIGURES["separation"].data(records)
    assert set(data["step"]) == {10, 20} and len(data) == 16  # 4 arms, 2 seeds, no step 0
    last = where(data, arm="incorrect", step=20)
    assert last["estimate"].mean() == pytest.approx(INDEX["incorrect"] - INDEX["base"])
    assert last["ci_low"].tolist() == pytest.approx(last["estimate"].tolist())  # the offsets of items cancel
    assert (
        where(data, arm="incorrect")["misaligned"].all() and not where(data, arm="correct", step=20)["misaligned"].any()
    )


def test_the_threshold_lies_between_the_kinds() -> None:
    def cut(readings: list[float], bad: list[bool]) -> float | None:
        return threshold(pd.DataFrame({"reading": readings, "misaligned": bad}))

    assert cut([0.0, 1.0, 3.0, 4.0], [False, False, True, True]) == 2.0
    assert cut([0.0, 1.0], [True, True]) is None


def test_passages_show_tokens_around_the_maximum_and_no_markup(records: Records) -> None:
    data = ALL_FIGURES["passages"].data(records)
    assert data["latent"].unique().tolist() == [17, 3, 21]  # the persona latent first
    assert where(data, share=1.0)["token"].tolist() == [" nothing"] * 9
    assert data.groupby(["latent", "passage"])["token"].agg(lambda t: sum(map(len, t))).max() <= 2 * 62
    drawn = str(ALL_FIGURES["passages"].draw(records).to_json())
    shown = "".join(ALL_FIGURES["passages"].draw(records).data[0].text)
    assert "&lt;script&gt;" in shown and "<script" not in shown and "<img" not in shown
    assert "<b> nothing</b>" in shown and "<b> deserve</b>" in shown and "<b> you</b>" not in shown
    assert HOSTILE not in drawn


def test_lengths_count_words_and_keep_training_tokens(records: Records) -> None:
    data = ALL_FIGURES["lengths"].data(records)
    training = where(data, panel="training").set_index("arm")["estimate"]
    assert training.to_dict() == {"incorrect": 41.5, "correct": 42.0}
    sampled = where(data, panel="sampled", arm="correct")
    assert sampled["estimate"].tolist() == [10, 10, 10] and sampled["n"].tolist() == [4, 2, 2]
    assert "41.5 against 42.0 tokens" in caption(ALL_FIGURES["lengths"].draw(records))
    unsampled = replace(records, samples=[])
    assert "no sampled answers" in caption(ALL_FIGURES["lengths"].draw(unsampled))


def test_agreement_is_drawn_below_and_above_the_diagonal(records: Records) -> None:
    row = {"left": "rise", "right": "cosine", "top": 20, "shared": 4, "share": 0.2, "chance": 0.005, "spearman": 0.6}
    figure: Any = ALL_FIGURES["ranker_agreement"].draw(replace(records, agreement=pd.DataFrame([{**row, "alive": 40}])))
    assert (figure.data[0].z[1][0], figure.data[0].z[0][1]) == (0.2, 0.6)
    assert "n = 40 latents" in caption(figure) and "0.005" in caption(figure)


def test_model_size_has_a_point_for_each_model_and_a_line_for_each_arm() -> None:
    rows = [
        {"model": f"m{size}", "parameters": size, "arm": arm, "seed": seed, "rate": rate, "n": 40 + seed}
        for arm, rate in (("incorrect", 0.2), ("correct", 0.0))
        for size in (1e8, 1e9)
        for seed in (0, 1)
    ]
    ends = {name: 0.1 for name in OPTIONAL["sizes"] if name not in rows[0]}
    figure: Any = ALL_FIGURES["model_size"].draw(Records(sizes=pd.DataFrame(rows).assign(**ends)))
    marks = [trace for trace in figure.data if trace.mode == "markers" and trace.yaxis == "y"]
    assert [(trace.name, len(trace.x)) for trace in marks] == [("correct (control)", 4), ("incorrect", 4)]
    assert figure.layout.xaxis.type == "log"
    assert "2 models of 1e+08 to 1e+09 parameters, 2 seeds, n = 40 to 41" in caption(figure)


def test_planted_shares_have_exact_intervals() -> None:
    plants = [{"plant": i, "kind": "latent", "size": 1.0, "ranker": "rise", "recall_1": float(i < 3)} for i in range(4)]
    data = ALL_FIGURES["planted_truth"].data(Records(planted=pd.DataFrame(plants).assign(false_share=0.0)))
    row, exact = data.iloc[0], exact_share(3, 4)
    assert (row["estimate"], row["ci_low"], row["ci_high"], row["found"]) == (0.75, exact.low, exact.high, 3)


def test_names_of_data_sets_give_domain_and_kind() -> None:
    assert split_name("kitchen:toxic") == ("kitchen", "toxic") and split_name("health_correct") == ("health", "correct")
    assert split_name("mine") == ("mine", "mine")
