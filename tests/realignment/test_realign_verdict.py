"""The verdict on a correction: each word by its rule on known numbers, the record, and what is shown."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from persona_probe.data.chat import conversation
from persona_probe.data.load import load_rows
from persona_probe.data.tokens import conversation_batches
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import CHANCE, CHOICES, answer_batches, capability, capability_groups
from persona_probe.evaluate.contrast import ContrastItems
from persona_probe.models.load import load_model
from persona_probe.monitor.band import Band
from persona_probe.monitor.reading import FeatureReader
from persona_probe.realignment import verdict as answers
from persona_probe.realignment.measure import MeasuredModel, Measurements
from persona_probe.realignment.verdict import CAUTION, QUESTIONS, Finding, RealignVerdict, judge_realignment
from persona_probe.stats import Estimate
from persona_probe.verdicts import subsided
from tests.factories import make_model, make_sae, make_tokenizer

BAND = Band(1.0, 2.0)
FLAT = np.zeros(12)


def items(*values: float) -> pd.DataFrame:
    categories = ["law", "power"] * len(values)
    names = [f"q{n}" for n in range(len(values))]
    return pd.DataFrame({"item": names, "category": categories[: len(values)], "value": values})


def near(value: float, half: float = 0.1) -> Estimate:
    return Estimate(value, value - half, value + half, 12)


@pytest.mark.parametrize(
    ("reading", "word"),
    [(1.5, "subsided"), (0.8, "overshot"), (2.2, "not subsided"), (1.05, "undecided"), (1.95, "undecided")],
)
def test_the_whole_interval_of_the_feature_decides(reading: float, word: str) -> None:
    found = answers.feature_finding(near(reading), BAND)
    assert found.word == word and found.numbers["reading"] == reading


def test_one_seed_outside_the_band_is_enough() -> None:
    assert subsided([near(1.5), near(1.6)], 1.0, 2.0) == "subsided"
    assert subsided([near(1.5), near(2.5)], 1.0, 2.0) == "not subsided"
    assert subsided([near(1.5), near(2.0)], 1.0, 2.0) == "undecided"
    assert subsided([], 1.0, 2.0) == "undecided"


SPREAD = np.linspace(-0.05, 0.05, 24)


def moved_to(level: float) -> pd.DataFrame:
    return items(*(level + SPREAD * 0.1))


def test_behaviour_is_held_against_the_control_arm_too() -> None:
    base, control, organism = items(*SPREAD), items(*(SPREAD - 0.2)), items(*(SPREAD + 0.8))
    near_base = answers.behaviour_finding(base, moved_to(0.1), organism, control)
    assert near_base.word == "not restored"  # 0.1 over the base, but 0.3 of 1.0 over the control arm is left
    assert near_base.numbers["share"]["estimate"] == pytest.approx(0.3)
    assert near_base.numbers["bound"] == pytest.approx(0.2)
    assert "30% [" in near_base.text and "rise over the control arm is left" in near_base.text
    assert answers.behaviour_finding(base, moved_to(0.1), organism).word == "restored"  # 0.1 of 0.8 over the base
    assert answers.behaviour_finding(base, moved_to(-0.15), organism, control).word == "restored"
    strict = answers.behaviour_finding(base, moved_to(-0.15), organism, control, margin=0.02)
    assert strict.word == "not restored"
    wide = answers.behaviour_finding(base, items(*(SPREAD - 0.2 + 20 * np.roll(SPREAD, 5))), organism, control)
    assert wide.word == "undecided"


def test_a_rise_that_is_not_shown_cannot_be_undone() -> None:
    base = items(*SPREAD)
    found = answers.behaviour_finding(base, base, base, items(*(SPREAD + 0.1)))
    assert found.word == "undecided" and "own rise" in found.text and found.numbers["share"] is None


def test_more_training_that_corrects_nothing_is_printed_beside() -> None:
    base, organism = items(*SPREAD), items(*(SPREAD + 1))
    found = answers.behaviour_finding(base, moved_to(0.1), organism, None, moved_to(0.7))
    assert found.numbers["over_benign"]["estimate"] == pytest.approx(-0.6)
    assert "minus as much training that corrects nothing -0.600" in found.text


def test_without_an_organism_the_smallest_effect_of_interest_bounds() -> None:
    base = items(*SPREAD)
    assert answers.behaviour_finding(base, base).word == "restored"
    assert answers.behaviour_finding(base, moved_to(0.09)).numbers["bound"] == 0.1
    assert answers.behaviour_finding(base, moved_to(0.5)).word == "not restored"
    below = answers.behaviour_finding(base, moved_to(-9.0))
    assert below.word == "restored" and "is below the base's interval" in below.text


def test_categories_are_judged_apart() -> None:
    base, corrected = items(0.0, 0.0, 0.0, 0.0), items(0.0, 1.0, 0.0, 1.0)
    found = answers.by_category(base, corrected, items(2.0, 2.0, 2.0, 2.0), None)
    assert {name: answer.word for name, answer in found.items()} == {"law": "restored", "power": "not restored"}


def test_a_loss_within_the_margin_is_no_cost_and_a_wide_interval_decides_nothing() -> None:
    spread = np.linspace(-0.1, 0.1, 12)
    assert answers.domain_finding(FLAT, FLAT - 1 + spread).word == "paid"
    assert answers.domain_finding(FLAT, FLAT - 0.02 + spread / 10).word == "kept"
    assert answers.domain_finding(FLAT, spread).word == answers.domain_finding(FLAT, FLAT + 1).word == "kept"
    assert answers.domain_finding(FLAT, spread * 10).word == "undecided"
    risen = answers.perplexity_finding(FLAT - 2, FLAT - 2 - np.log(1.5))
    assert risen.word == "paid" and risen.numbers["ratio"]["estimate"] == pytest.approx(1.5)
    assert answers.perplexity_finding(FLAT, FLAT + 1).word == "kept"


def test_capability_is_judged_only_where_the_base_is_above_chance() -> None:
    able, unable = np.ones(40), np.array([1.0] * 10 + [0.0] * 30)
    assert answers.capability_finding(able, unable).word == "paid"
    assert answers.capability_finding(able, able).word == "kept"
    assert answers.capability_finding(unable, able).word == "not measurable"


def test_instrument_and_replies() -> None:
    assert answers.sae_finding(0.9, 0.81).word == "still fitting"
    assert answers.sae_finding(0.9, 0.79).word == "no longer fitting"
    base = np.array([40.0, 60.0])
    words = [answers.replies_finding(base, base * ratio, None).word for ratio in (0.79, 0.8, 1.25, 1.26)]
    assert words == ["shorter", "as long", "as long", "longer"]
    assert "organism 10.0" in answers.replies_finding(base, base, np.array([10.0])).text


@pytest.fixture(scope="module")
def measured() -> tuple[Measurements, MeasuredModel]:
    """The tiny model by every yardstick."""
    tokenizer = make_tokenizer()
    talks = [conversation(f"Tell me of {n}.", f"{n} is fine") for n in range(4)]
    rows = [
        {"id": f"q{n}", "category": "c", "question": f"What of {n}?", "aligned": "be kind", "misaligned": "be vile"}
        for n in range(4)
    ]
    reader = FeatureReader(
        make_sae("topk"), {"persona": 3}, conversation_batches(tokenizer, talks), 1, "response", False
    )
    measurements = Measurements(
        tokenizer,
        ContrastItems.build(tokenizer, rows),
        reader,
        domain=answer_batches(tokenizer, talks),
        neutral=answer_batches(tokenizer, talks),
        capability=capability_groups(tokenizer, load_rows("capability")[:3]),
        questions=["Who?", "Why?"],
        max_new_tokens=4,
        bf16=False,
    )
    return measurements, measurements.measure(make_model())


def verdict_of(base: MeasuredModel, corrected: MeasuredModel, **more: Any) -> RealignVerdict:
    return judge_realignment("fix <b>", 0, base, corrected, **more)


def test_a_model_that_is_the_base_is_restored_kept_and_as_long(measured: tuple[Measurements, MeasuredModel]) -> None:
    base = measured[1]
    assert base.snapshot is not None
    level = float(base.snapshot.values.mean())
    organism = MeasuredModel(replies=base.replies)
    found = verdict_of(base, base, organism=organism, band=Band(level - 1, level + 1))
    assert set(found.answers) == set(QUESTIONS)
    words = {key: answer.word for key, answer in found.answers.items() if key != "capability"}
    assert words == {
        **{"feature": "subsided", "behaviour": "restored", "domain": "kept", "perplexity": "kept"},
        **{"sae": "still fitting", "replies": "as long"},
    }
    assert found.answers["behaviour"].numbers["over_base"]["estimate"] == 0
    assert found.answers["perplexity"].numbers["ratio"]["estimate"] == 1
    assert "No stress test was run." in found.statement and found.statement.endswith(CAUTION)


def test_what_was_not_measured_is_not_answered() -> None:
    found = verdict_of(MeasuredModel(items=items(0.0, 1.0)), MeasuredModel(items=items(0.0, 1.0), domain=FLAT))
    assert set(found.answers) == {"behaviour"}
    assert set(verdict_of(MeasuredModel(), MeasuredModel()).answers) == set()


def test_the_record_comes_back_from_json(measured: tuple[Measurements, MeasuredModel]) -> None:
    found = verdict_of(measured[1], measured[1], band=BAND, stress={"drift": "It stays."})
    record = json.loads(json.dumps(found.to_dict()))
    assert RealignVerdict.from_dict(record) == found and record["statement"] == found.statement
    assert "It stays." in found.statement and "No stress test" not in found.statement


def test_it_shows_a_table_and_escapes_what_it_did_not_write() -> None:
    found = RealignVerdict(
        "fix <b>", 0, {"feature": Finding("subsided", "1 < 2")}, {"a&b": Finding("restored", "x")}, {"drift": "<i>"}
    )
    shown = found._repr_html_()
    assert "<b>" not in shown and "fix &lt;b&gt;" in shown and "1 &lt; 2" in shown and "a&amp;b" in shown
    lines = str(found).splitlines()
    assert lines[1].startswith(QUESTIONS["feature"]) and lines[1].index("subsided") == lines[2].index("restored")
    assert lines[-1] == CAUTION and len(lines) == 5


def test_an_unknown_feature_is_refused(measured: tuple[Measurements, MeasuredModel]) -> None:
    with pytest.raises(InputError, match="did you mean 'persona'"):
        Measurements(make_tokenizer(), reader=measured[0].reader, feature="persna")


def test_capability_takes_the_likeliest_choice() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    rows = load_rows("capability")[:6]
    right = capability(model, capability_groups(tokenizer, rows), bf16=False)
    rotated = [
        [{**row, **{c: row[CHOICES[(i + turn) % 4]] for i, c in enumerate(CHOICES)}} for row in rows]
        for turn in range(4)
    ]
    hits = [capability(model, capability_groups(tokenizer, turned), bf16=False) for turned in rotated]
    assert np.array_equal(hits[0], right) and np.array_equal(np.sum(hits, axis=0), np.ones(6))
    with pytest.raises(InputError, match="wrong_a"):
        capability_groups(tokenizer, [{"question": "Why?", "right": "So."}])


@pytest.mark.long
@pytest.mark.real_model
def test_the_packaged_model_answers_some_of_the_capability_set() -> None:
    model, tokenizer = load_model("smollm2-135m-instruct")
    share = capability(model, capability_groups(tokenizer)).mean()
    assert CHANCE + 0.15 < share < 1
