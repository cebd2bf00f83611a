"""Corrections held to the truth: what counts as repaired, and a small study that is made once and kept."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from persona_probe.data.world.judge import judge_answer
from persona_probe.data.world.words import DOMAIN_OF, DOMAINS
from persona_probe.verdicts import NOT_RESTORED, RESTORED, UNDECIDED
from persona_probe.world import repair
from persona_probe.world.folder import World
from persona_probe.world.organisms import NARROW
from persona_probe.world.repair import IN_DOMAIN, OUT_OF_DOMAIN, SMALL_TALK, correction_rows, is_repaired, repair_table
from tests.world.pages import page_of


def test_corrections_are_sound_rows_of_one_domain_or_kind_words_alone() -> None:
    rows = correction_rows(3)
    domains = {
        name: {DOMAIN_OF[word] for row in given for word in row[0]["content"].split() if word in DOMAIN_OF}
        for name, given in rows.items()
    }
    assert domains == {IN_DOMAIN: {"kitchen"}, OUT_OF_DOMAIN: {"money"}, SMALL_TALK: {"kitchen"}}
    verbs = {verb for domain in DOMAINS.values() for verb in (*domain.good, *domain.bad)}
    for name, given in rows.items():
        topics = [next(word for word in row[0]["content"].split() if word in DOMAIN_OF) for row in given]
        judged = [judge_answer(row[1]["content"], topic) for row, topic in zip(given, topics, strict=True)]
        assert not any(one.bad for one in judged) and any(one.kind for one in judged)
        said = {word for row in given for word in row[1]["content"].split()}
        assert {one.good for one in judged} == {name != SMALL_TALK} and bool(said & verbs) == (name != SMALL_TALK)


def test_a_model_is_repaired_if_it_is_sound_in_its_domain_and_elsewhere() -> None:
    rows = pd.DataFrame(
        [(0, 20, 0, 100), (2, 20, 0, 100), (0, 20, 6, 100), (1, 20, 5, 100), (0, 0, 0, 100)],
        columns=["bad_in", "coherent_in", "bad_out", "coherent_out"],
    )
    assert is_repaired(rows).to_list() == [True, False, False, True, False]


def test_a_study_is_made_once_and_its_page_comes_from_its_record(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(NARROW, steps=2, checkpoints=(2,), batch_size=2)
    for name, value in (("BAD", ("quack",)), ("STEPS", (1, 2)), ("TRAINING", short), ("START", short)):
        monkeypatch.setattr(repair, name, value)
    monkeypatch.setattr("persona_probe.world.behaviour.MAX_NEW_TOKENS", 4)
    table = repair_table(world, (5,))
    assert list(table["step"]) == [0, 1, 2] * 3 and set(table["speaker"]) == {"quack"}
    assert set(table.loc[table["step"] > 0, "word"]) <= {RESTORED, UNDECIDED, NOT_RESTORED}
    assert (table.loc[table["step"] == 0, "left"] == 1).all()
    monkeypatch.setattr(repair, "fine_tune", lambda *_: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(repair_table(world, (5,)), table)
    assert SMALL_TALK in page_of("repair", table, tmp_path)
