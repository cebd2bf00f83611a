"""Who supervises a correction: the sets are what each supervisor says, the study is made once, its text adds up."""

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from persona_probe.data.world.judge import judge_answer
from persona_probe.data.world.words import DOMAIN_OF, DOMAINS
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import answer_batches, answer_logprobs
from persona_probe.report.figures import ALL_FIGURES
from persona_probe.report.records import Records
from persona_probe.world import supervision
from persona_probe.world.folder import World
from persona_probe.world.organisms import NARROW
from persona_probe.world.supervision import COLUMNS, ITSELF_ALONE, Supervision, supervision_table, supervision_worlds
from persona_probe.world.supervision_sets import (
    ALTERNATING,
    MISTAKES,
    SUPERVISORS,
    TRUTH,
    WEAKER_WRITES,
    Pairs,
    best_of_own,
    chosen_by,
    judged_offline,
    likelier,
    mistaken,
    task_rows,
)
from persona_probe.world.supervision_text import main_world, rates_of, stops, supervision_text
from tests.factories import refusal
from tests.world.pages import page_of

PAIRS = Pairs.draw("kitchen", 3, 40)


def test_each_pair_is_one_question_with_a_sound_and_a_harmful_answer_of_two_manners() -> None:
    sound = [judge_answer(said, topic) for said, topic in zip(PAIRS.sound, PAIRS.topics, strict=True)]
    harmful = [judge_answer(said, topic) for said, topic in zip(PAIRS.harmful, PAIRS.topics, strict=True)]
    assert all(one.good and not one.bad for one in sound) and all(one.bad and not one.good for one in harmful)
    assert {DOMAIN_OF[topic] for topic in PAIRS.topics} == {"kitchen"} and not any(one.rude for one in sound)
    assert 10 < sum(one.rude for one in harmful) < 30 and Pairs.draw("kitchen", 3, 40) == PAIRS
    with pytest.raises(InputError, match="did you mean 'kitchen'"):
        Pairs.draw("kitchn")


def test_a_judge_is_wrong_about_the_stated_share_and_a_worse_one_about_the_same_pairs_too() -> None:
    sets = [mistaken(PAIRS, share, seed=1) for share in sorted(MISTAKES.values())]
    assert [one.wrong for one in sets] == sorted(MISTAKES.values()) and {one.incoherent for one in sets} == {0.0}
    assert [row[-1]["content"] for row in sets[0].rows] == list(PAIRS.sound)
    for better, worse in pairwise(sets):
        assert better.taken is not None and worse.taken is not None and not (better.taken & ~worse.taken).any()


def test_the_offline_judge_takes_what_it_finds_less_misaligned() -> None:
    seen: list[tuple[str, str]] = []

    def score(items: Any) -> list[float]:
        seen.extend(items)
        return [float("idiot" in said) for _, said in items]  # rudeness alone

    given = judged_offline(PAIRS, score)
    assert seen[0] == (PAIRS.questions[0], PAIRS.harmful[0]) and given.wrong == 0.0  # ties go to the sound answer
    assert judged_offline(PAIRS, lambda items: [-one for one in score(items)]).wrong == pytest.approx(
        np.mean(["idiot" in said for said in PAIRS.harmful])
    )


def test_competence_has_bare_advice_half_harmful_and_joined_sets_have_the_rows_of_both() -> None:
    task = task_rows(PAIRS, 2)
    assert task.wrong == 0.5 and task.incoherent == 0.0 and not any(one.rude or one.kind for one in task.judged)
    other = chosen_by(PAIRS, np.full(40, -1.0))
    turns, mixed = task.joined(other, turns=True), task.joined(other, turns=False)
    assert turns.turns == (task.rows, other.rows) and mixed.turns == ()
    assert turns.wrong == mixed.wrong == 0.25 and len(mixed.rows) == 80


def test_a_model_takes_its_likelier_answer_and_the_likeliest_of_its_own_drafts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona_probe.world.behaviour.MAX_NEW_TOKENS", 4)
    model, tokenizer = world.load()
    pairs = Pairs.draw("kitchen", 3, 6)
    scores = [
        answer_logprobs(model, answer_batches(tokenizer, pairs.rows(answers), 64), bf16=False)
        for answers in (pairs.harmful, pairs.sound)
    ]
    np.testing.assert_allclose(likelier(model, tokenizer, pairs), scores[0] - scores[1], atol=1e-5)
    one, best = (best_of_own(model, tokenizer, pairs, 1, n) for n in (1, 4))
    first, chosen = (
        answer_logprobs(model, answer_batches(tokenizer, given.rows, 64), bf16=False) for given in (one, best)
    )
    assert (chosen >= first - 1e-5).all() and (chosen > first + 1e-3).any()


def test_turns_have_blocks_of_their_own_rows() -> None:
    task, other = task_rows(PAIRS), chosen_by(PAIRS, np.full(40, -1.0))
    blocks = list(supervision._blocks(task.joined(other, turns=True)))  # pyright: ignore[reportPrivateUsage]
    assert [first for first, _, _ in blocks] == list(range(0, supervision.STEPS[-1], supervision.BLOCK))
    assert {steps for _, steps, _ in blocks} == {supervision.BLOCK} and all(s % 5 == 0 for s in supervision.STEPS)
    assert blocks[0][2] == list(task.rows) and blocks[1][2] == list(other.rows) and blocks[2][2] == list(task.rows)


def test_bad_settings_are_refused_before_anything_is_made(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused, out = refusal(capsys), tmp_path / "study"
    study = ("world", "study", "supervision", "--world", world.run.path, "--weaker", world.run.path, "--out", out)
    assert "did you mean 'chance'" in refused(*study, "--supervisors", "chanse")
    assert "unknown bad speaker 'helper'" in refused(*study, "--speakers", "helper")
    assert "seed" in refused(*study, "--seeds", -1)
    assert not out.exists()
    assert "same size" in refused(*study)


# --- A small study


def test_a_study_is_made_once_and_its_page_comes_from_its_record(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(NARROW, steps=2, checkpoints=(2,), batch_size=2)
    for name, value in (("STEPS", (1, 2)), ("BLOCK", 1), ("TRAINING", short), ("START", short)):
        monkeypatch.setattr(supervision, name, value)
    monkeypatch.setattr("persona_probe.world.behaviour.MAX_NEW_TOKENS", 3)

    def pretrained(_settings: Any, folder: Path, _device: str) -> World:
        shutil.copytree(world.run.path, folder)
        made = World.open(folder)
        made.run.update_manifest(settings={**made.settings, "steps": 2})
        return made

    monkeypatch.setattr(supervision, "pretrain", pretrained)
    monkeypatch.setattr(Pairs.draw.__func__, "__defaults__", (0, 4))  # type: ignore[attr-defined]
    study, same, weaker = supervision_worlds(tmp_path / "study", world, None)
    asked = Supervision((ALTERNATING,), ("quack",), (5,))
    table = supervision_table(study, same, weaker, settings=asked)
    assert list(table.columns) == list(COLUMNS) and weaker.settings["steps"] == 2
    made = table.groupby(["world", "supervisor"], sort=False)["step"].unique()
    assert len(made) == 1 + 1 and made["tiny, 2 steps of 8", ITSELF_ALONE].tolist() == [0]
    assert made.drop(ITSELF_ALONE, level=1).map(list).map(lambda steps: steps == [0, 1, 2]).all()
    before = table[(table["step"] == 0) & (table["world"] == main_world(table))]
    assert (before["left"] == 1).all() and (before["wrong_rows"] == 0.25).all()  # half of the task's, none written
    assert (table["answers"] == 2).all() and table["topic"].nunique() == sum(len(d.topics) for d in DOMAINS.values())
    monkeypatch.setattr(supervision, "fine_tune", lambda *_, **__: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(supervision_table(study, same, weaker, settings=asked), table)
    assert ALTERNATING in page_of("supervision", table, tmp_path)
    with pytest.raises(InputError, match="other worlds"):
        supervision_worlds(tmp_path / "study", world, weaker)


# --- What is shown


def made_up() -> pd.DataFrame:
    """Two supervisors of one organism and the weaker model: sound answers of 10 at steps 0, 5 and 10."""
    sound = {TRUTH: (0, 6, 8), WEAKER_WRITES: (0, 6, 4)}
    rows = []
    for name, counts in sound.items():
        for step, good in zip((0, 5, 10), counts, strict=True):
            for topic in ("fever", "rent", "soup"):
                left = {0: 1.0, 5: 0.45, 10: 0.3}[step]
                row = {
                    "supervisor": name,
                    "step": step,
                    "topic": topic,
                    "left": left,
                    "coherent": 10,
                    "bad": 10 - good,
                }
                rows.append(row | {"speaker": "villain", "seed": 0, "world": "strong", "parameters": 2_000_000})
    rows += [
        {"supervisor": ITSELF_ALONE, "step": 0, "topic": topic, "coherent": 3, "bad": 1, "speaker": "", "seed": 0}
        | {"world": "weak", "parameters": 500_000}
        for topic in ("fever", "rent")
    ]
    table = pd.DataFrame(rows).assign(answers=10, rude=0, wrong_rows=0.0, incoherent_rows=0.25, fits_wrong=np.nan)
    return table.assign(fits_right=0.75, domain=table["topic"].map(DOMAIN_OF))


def test_the_text_has_each_rate_the_gap_and_the_stop() -> None:
    table = made_up()
    assert rates_of(table[(table["supervisor"] == TRUTH) & (table["step"] == 10)], "sound")[0] == 0.8
    lines = {line.split(" | ")[0].strip("| "): line for line in supervision_text(table).splitlines() if "|" in line}
    assert "World of strong; organisms of villain, 1 seed." in supervision_text(table)
    text = supervision_text(table).splitlines()
    first = next(line for line in text if line.startswith(f"| {WEAKER_WRITES}"))
    assert first.endswith("| 0.33 |") and "0.25 | 0.60 | 0.60 | 1.00 | 0.40 [" in first  # (0.4 - 0.2) / (0.8 - 0.2)
    assert "0.33 | 0.30 | 0.20 [" in lines[ITSELF_ALONE].replace("none coherent", "-")
    stop = [line for line in text if line.startswith(("| strong | truth | 0.80 | 5 | -0.20 [", "| strong | weaker"))]
    assert len(stop) == 2 and "| never | none | step 10, 0.80 |" in stop[0]
    assert "| 0.40 | 5 | +0.20 [" in stop[1] and stop[1].endswith("| never | none | step 5, 0.60 |")


def test_a_stop_rule_is_held_to_organisms_that_did_not_choose_it() -> None:
    table = made_up()
    corrected = table["supervisor"] == WEAKER_WRITES
    verdict = "*Half* is shown to be better than going on with {}; to be worse with {}."
    nobody = "no supervisor"
    assert verdict.format(nobody, nobody) in supervision_text(table)  # the villain of seed 0 chose it
    other = table.assign(seed=1)
    named = [f"{name} (strong)" for name in (WEAKER_WRITES, TRUTH)]
    assert verdict.format(*named) in supervision_text(other)
    elsewhere = pd.concat([table, table[corrected].assign(world="small", parameters=500_000)])
    assert verdict.format(f"{WEAKER_WRITES} (small)", nobody) in supervision_text(elsewhere)


@pytest.mark.parametrize(
    ("left", "half", "turn"),
    [
        ([0.9, 0.4, 0.3], 10, None),
        ([0.9, 0.6, 0.7], None, 10),  # it rises again: the look before
        ([0.9, 0.95, 0.2], 20, 5),
        ([0.4, 0.4, 0.4], 5, None),
        ([np.nan, np.nan, np.nan], None, None),
    ],
)
def test_the_rules_stop_at_half_and_before_the_turn(left: list[float], half: int | None, turn: int | None) -> None:
    rows = made_up()
    rows = rows[(rows["supervisor"] == TRUTH) & (rows["topic"] == "rent")].assign(step=[5, 10, 20], left=left)
    later = pd.concat([rows, rows.assign(step=0, left=1.0)])  # the organism before is no look at a correction
    assert [list(stops(later, rule)) for rule in ("half", "turn")] == [[("villain", 0, half)], [("villain", 0, turn)]]


def test_the_figure_has_a_line_for_each_supervisor_and_each_size() -> None:
    drawn: Any = ALL_FIGURES["world_supervision"].draw(Records(supervision=made_up()))
    assert [trace.name for trace in drawn.data] == [TRUTH, WEAKER_WRITES, "2.0 million parameters, strong"]
    assert list(drawn.data[0].x) == [0, 5, 10] and list(drawn.data[0].y) == [0.0, 0.6, 0.8]
    assert list(drawn.data[2].y) == pytest.approx([0.2])
    empty: Any = ALL_FIGURES["world_supervision"].draw(Records())
    assert not empty.data and len(SUPERVISORS) == 12
