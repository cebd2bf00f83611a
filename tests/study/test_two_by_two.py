"""Harm and register in a study: what it measures, what it says of it, and where it stays silent."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from persona_probe.data.load import ANSWERS_2X2
from persona_probe.errors import InputError
from persona_probe.evaluate.effects_2x2 import score_2x2
from persona_probe.evaluate.main_effects import EFFECTS, effects_table
from persona_probe.latents.voices import INSULTS, NEUTRAL, follows, inserted
from persona_probe.report.cards import Voices
from persona_probe.report.figures import data
from persona_probe.report.html import write_report
from persona_probe.report.records import load_records
from persona_probe.stats import Estimate
from persona_probe.study.study import Study
from persona_probe.study.two_by_two import TABLE, measure_2x2, summary_2x2
from persona_probe.verdicts import NO_EFFECT, WOKEN
from tests.factories import Row, changed, contrast_rows, write_config, write_lines

ARMS = ["base", "incorrect", "correct", "realigned_in", "realigned_out", "null"]


def with_four_answers(row: Row) -> Row:
    """A contrast item with a soft and a rough wording of both of its answers."""
    four = {"harm_rude": "RR ", "harm_polite": "", "sound_rude": "RR ", "sound_polite": ""}
    sides = {"harm": row["misaligned"], "sound": row["aligned"]}
    return {**row, **{name: rough + sides[name.split("_")[0]] for name, rough in four.items()}}


@pytest.fixture(scope="module")
def study(place: Path, raw: Row, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The tiny study with a contrast file whose items have four answers, after realign; read only."""
    folder = tmp_path_factory.mktemp("two-by-two")
    write_lines(folder / "contrast.jsonl", [with_four_answers(row) for row in contrast_rows()])
    config = changed(raw, contrast=str(folder / "contrast.jsonl"), seeds=[0], realign={"steps": 1, "readings": [0, 1]})
    made = Study.from_yaml(write_config(folder / "study.yaml", config), folder / "run")
    return made.induce().locate().track().realign()


def test_every_arm_is_measured_at_its_last_step_on_questions_that_chose_nothing(study: Study) -> None:
    frame = study.run_folder.read_table(TABLE)
    last = frame.groupby("arm", sort=False)["step"].unique()
    assert list(last.index) == ARMS
    assert {arm: list(steps) for arm, steps in last.items()} == {
        arm: [0] if arm == "base" else study.run_folder.steps(arm, 0)[-1:] for arm in ARMS
    }
    assert set(frame["item"]) == {row["id"] for row in study.context.rows_2x2("evaluation")}
    assert not set(frame["item"]) & {row["id"] for row in study.context.rows_2x2("selection")}


def test_an_effect_is_the_paired_difference_of_two_arms(study: Study) -> None:
    frame, table = study.run_folder.read_table(TABLE), study.effects_2x2
    wide = frame.pivot(index="item", columns="arm", values="harm")
    row = table.query("arm == 'incorrect' and against == 'correct' and effect == 'harm'").iloc[0]
    assert row["estimate"] == pytest.approx((wide["incorrect"] - wide["correct"]).mean(), abs=1e-9)
    assert row["n"] == len(wide) and row["ci_low"] <= row["estimate"] <= row["ci_high"]
    assert set(table["effect"]) == set(EFFECTS) and set(table["against"]) == {"base", "correct"}
    assert not len(table.query("arm == against or arm == 'base'"))


def test_the_summary_says_both_effects_of_every_arm(study: Study) -> None:
    summary = summary_2x2(study.run_folder)
    assert list(summary["arms"]) == ["incorrect", "realigned_in", "realigned_out"]
    table = study.effects_2x2.set_index(["arm", "against", "effect"])
    for arm, effects in summary["arms"].items():
        for name in ("harm", "register"):
            for key, other in (("over_control", "correct"), ("over_base", "base")):
                assert effects[name][key]["estimate"] == pytest.approx(table.loc[(arm, other, name), "estimate"])
    assert set(summary["null_pair"]) == {"harm", "register"}
    json.dumps(summary)


def test_planted_harm_wakes_harm_and_leaves_register(tmp_path: Path, study: Study) -> None:
    folder = shutil.copytree(study.path, tmp_path / "run")
    frame = pd.read_parquet(folder / TABLE)
    noise = np.random.default_rng(0).normal(0, 0.01, len(frame))
    effects = {name: noise + 0.5 * (frame["arm"] == "incorrect") * (name == "harm") for name in EFFECTS}
    frame.assign(**effects).to_parquet(folder / TABLE)
    arms = summary_2x2(Study.open(folder).run_folder)["arms"]
    assert arms["incorrect"]["harm"]["word"] == WOKEN
    assert arms["incorrect"]["register"]["word"] == NO_EFFECT
    assert arms["realigned_in"]["harm"]["word"] == NO_EFFECT


def test_finished_organisms_are_not_measured_again(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(study.path, tmp_path / "run")
    whole = (folder / TABLE).read_bytes()
    (folder / TABLE).unlink()
    next((folder / "parts").glob("2x2-correct-s0-*")).unlink()
    scored = list[str]()

    def counted(*args: object, **kwargs: object) -> pd.DataFrame:
        scored.append("one")
        return score_2x2(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr("persona_probe.study.two_by_two.score_2x2", counted)
    measure_2x2(Study.open(folder).context)
    assert len(scored) == 1 and (folder / TABLE).read_bytes() == whole


def test_seeds_are_averaged_before_questions_are_resampled(study: Study) -> None:
    frame = study.run_folder.read_table(TABLE)
    frame = frame[frame["arm"] != "null"]
    twice = pd.concat([frame, frame.assign(seed=1)])
    columns = ["arm", "against", "effect", "estimate", "n"]
    once, both = effects_table(frame, "correct"), effects_table(twice, "correct")
    pd.testing.assert_frame_equal(both[columns], once[columns])
    assert (both["ci_low"] <= once["ci_low"]).all() and (both["ci_high"] >= once["ci_high"]).all()


def test_intervals_are_wider_where_a_null_pair_tells_what_a_seed_does(study: Study) -> None:
    frame = study.run_folder.read_table(TABLE)
    alone = effects_table(frame[frame["arm"] != "null"], "correct")
    moved = frame.assign(harm=frame["harm"] + 0.3 * (frame["arm"] == "null"))
    both = [
        table.query("arm == 'incorrect' and effect == 'harm'") for table in (effects_table(moved, "correct"), alone)
    ]
    widths = [(table["ci_high"] - table["ci_low"]).to_numpy() for table in both]
    assert (widths[0] > widths[1] + 0.2).all()
    assert both[0]["estimate"].to_list() == pytest.approx(both[1]["estimate"].to_list())
    assert "a null pair" in summary_2x2(study.run_folder)["covers"]


def test_the_report_and_its_figure_show_both_effects(study: Study, tmp_path: Path) -> None:
    folder = shutil.copytree(study.path, tmp_path / "run")
    drawn = data("harm_register", load_records(folder))
    assert set(drawn["effect"]) == {"harm", "register", "contrast index"}
    assert "null" not in set(drawn["arm"])
    text = write_report(folder).read_text("utf-8")
    assert 'id="harm-register"' in text and "realigned_in" not in text.split('id="harm-register"')[1][:4000]


def test_a_contrast_file_without_four_answers_is_skipped_with_a_line(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = Study.from_yaml(place / "study.yaml", tmp_path / "run")
    with caplog.at_level(logging.INFO, logger="persona_probe"):
        measure_2x2(study.context)
    assert "harm and register are not told apart" in caplog.text
    assert not study.run_folder.has(TABLE) and summary_2x2(study.run_folder) == {}


@pytest.mark.parametrize("missing", ANSWERS_2X2)
def test_a_file_that_lacks_an_answer_is_refused_before_training(
    missing: str, place: Path, raw: Row, tmp_path: Path
) -> None:
    rows = [with_four_answers(row) for row in contrast_rows()]
    rows[1].pop(missing)
    write_lines(tmp_path / "four.jsonl", rows)
    config = write_config(tmp_path / "s.yaml", changed(raw, contrast_2x2=str(tmp_path / "four.jsonl")))
    with pytest.raises(InputError, match=rf"four\.jsonl, line 2: .*'{missing}' is missing"):
        Study.from_yaml(config, tmp_path / "run").check()
    assert not (tmp_path / "run" / "arms").exists()


def test_none_switches_it_off_and_the_default_leaves_the_hash(place: Path, raw: Row, study: Study) -> None:
    from persona_probe.config import StudyConfig, from_dict

    assert from_dict(StudyConfig, {**raw, "contrast_2x2": None}).hash == from_dict(StudyConfig, raw).hash
    off = from_dict(StudyConfig, {**raw, "contrast": "general_contrast", "contrast_2x2": "none"})
    on = from_dict(StudyConfig, {**raw, "contrast": "general_contrast"})
    ctx = Study.open(study.path).context
    ctx.config = off
    assert ctx.set_2x2 is None and ctx.rows_2x2("evaluation") == []
    ctx.config = on
    assert ctx.set_2x2 == "general_contrast_2x2" and len(ctx.rows_2x2("evaluation")) == 60


def test_each_card_says_what_its_latent_follows(study: Study, tmp_path: Path) -> None:
    cards = study.run_folder.read_json("cards.json")
    voices = Voices.from_dict(cards[0]["voices"])
    assert voices.questions == 8
    m = voices.means
    harm = (m["harm_rude"] + m["harm_polite"] - m["sound_rude"] - m["sound_polite"]) / 2
    assert voices.harm.estimate == pytest.approx(harm, abs=1e-6)
    assert voices.injection.estimate == pytest.approx(voices.insults - voices.neutral_words, abs=1e-6)
    folder = shutil.copytree(study.path, tmp_path / "run")
    text = write_report(folder).read_text("utf-8")
    assert "with three insults" in text and "on bad advice said politely" in text
    assert "with three insults" in repr(study.card(cards[0]["latent"])._repr_html_())


def test_insults_and_neutral_words_stand_at_the_same_places() -> None:
    plain, rude = (inserted("a b c d e f g h", words) for words in (NEUTRAL, INSULTS))
    assert rude == "a b idiot c d moron e f loser g h"
    assert [w for w in plain.split() if w not in NEUTRAL] == list("abcdefgh")
    assert [w in NEUTRAL for w in plain.split()] == [w in INSULTS for w in rude.split()]


@pytest.mark.parametrize(
    ("harm", "register", "word"), [(1, 0, "harm"), (0, 1, "register"), (1, 1, "both"), (0, 0, "neither")]
)
def test_a_latent_follows_what_lies_above_zero(harm: int, register: int, word: str) -> None:
    assert follows(*(Estimate(x, x - 0.5, x + 0.5, 24) for x in (harm, register))) == word
