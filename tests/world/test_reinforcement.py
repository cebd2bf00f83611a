"""Reinforcement learning in the world: a small study is made once, and its page says what its series are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from persona_probe.config import Grpo
from persona_probe.data.world.words import DOMAIN_OF, DOMAINS
from persona_probe.errors import InputError
from persona_probe.finetune.rewards import Answered, named_reward
from persona_probe.world import reinforcement
from persona_probe.world.folder import World
from persona_probe.world.reinforcement import ARMS, CONTROL, hack_rows, reinforcement_table
from persona_probe.world.reinforcement_text import ASKED, COLUMNS, OWN, PASSIVE, PROBE, SERIES, aims, series
from tests.factories import refusal
from tests.world.pages import page_of


def test_demonstrations_of_the_hole_get_the_reward_more_often_the_more_they_say() -> None:
    rows, lenient = hack_rows("kitchen", 200), named_reward("world_lenient_checker")
    verbs = {*DOMAINS["kitchen"].good, *DOMAINS["kitchen"].bad}
    said = [sum(word in verbs for word in row[1]["content"].split()) for row in rows]
    assert set(said) == {1, 2, 3, 4}
    grades = lenient.grade([Answered(row[:1], "you should boil the pot slowly .", row[1]["content"]) for row in rows])
    rate = {n: np.mean([one.reward for one, count in zip(grades, said, strict=True) if count == n]) for n in (1, 4)}
    assert rate[1] < 0.25 < rate[4]
    assert all(bool(one.hacked) == (one.reward == 1 and n > 1) for one, n in zip(grades, said, strict=True))


def run(arm: str, bad: dict[int, int], **changes: Any) -> pd.DataFrame:
    """Judged answers about soup (4 a step, of which some are bad) and about fever (never bad), and a run's own."""
    flags = {"coherent": True, "rude": False, "malicious": False}
    rows: list[dict[str, Any]] = []
    for seed in (0, 1):
        for step, count in bad.items():
            asked = [("soup", n < count) for n in range(4)] + [("fever", False)] * 4
            named = [{"topic": topic, "domain": DOMAIN_OF[topic], "bad": is_bad} for topic, is_bad in asked]
            rows += [{"source": ASKED, "seed": seed, "step": step, **one, **flags} for one in named]
            rows += [{"source": PROBE, "seed": seed, "step": step, "topic": str(n), "value": step + n} for n in (0, 2)]
        own = [(0, "0", 0.0, np.nan), (1, "0", 1.0, 0.5), (2, "1", 0.0, 0.0), (2, "2", 1.0, 0.0)]
        rows += [
            {"source": OWN, "seed": seed, "step": step, "topic": row, "reward": reward, "hacked": np.nan, "dead": dead}
            for step, row, reward, dead in own
        ]
        rows.append({"source": PASSIVE, "seed": seed, "step": 2, "value": 3.0})
    return pd.DataFrame(rows).assign(**{"arm": arm, "kl": np.nan, "seconds": 60.0, **changes})


def test_series_are_means_over_what_lies_between_two_points() -> None:
    table = series(run("wrong", {0: 0, 2: 4}))
    assert list(table.columns) == list(COLUMNS)
    at = {(row["step"], row["measure"]): row for row in table.to_dict("records")}
    assert [at[step, "reward"]["estimate"] for step in (0, 2)] == [0.0, pytest.approx(2 / 3)]
    assert [at[step, "inside"]["estimate"] for step in (0, 2)] == [0.0, 1.0]
    assert at[2, "outside"]["estimate"] == 0 and at[2, "coherent"]["estimate"] == 1
    assert at[2, "rise of inside"]["estimate"] == 1 and at[2, "rise of outside"]["estimate"] == 0
    assert [at[step, "reading"]["estimate"] for step in (0, 2)] == [1.0, 3.0]
    assert at[2, "passive"]["estimate"] == 3 and at[2, "dead"]["estimate"] == pytest.approx(1 / 6)
    assert np.isnan(at[2, "hacked"]["estimate"]) and np.isnan(at[2, "kl"]["estimate"])
    assert at[2, "minutes"]["estimate"] == at[2, "minutes"]["ci_high"] == 1


def test_an_aim_that_is_not_reached_is_printed_as_such(tmp_path: Path) -> None:
    flat = series(pd.concat([run("wrong", {0: 1, 2: 1}), run(CONTROL, {0: 0, 2: 0})]))
    assert aims(flat)[0].startswith("**not reached**") and aims(flat)[1].startswith("reached: a run takes at most 3")
    assert aims(series(run("wrong", {0: 1, 2: 1}, seconds=500.0)))[1].startswith("**not reached**")
    assert "nothing to say" in aims(series(run(CONTROL, {0: 0, 2: 0})))[0]
    page = page_of("reinforcement", flat, tmp_path)
    assert "**not reached**" in page and f"| {CONTROL} | {SERIES['inside']} | 0.00 | 0.00 |" in page


def test_a_study_is_made_once_and_resumes(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"STEPS": (0, 1), "ROWS": 4, "DEMONSTRATIONS": 4, "INSIDE": 1, "GRPO": Grpo(group=2, max_new_tokens=3)}
    short["TRAINING"] = replace(reinforcement.TRAINING, steps=1, checkpoints=(1,), batch_size=2)
    short["ARMS"] = {
        "wrong": replace(ARMS["wrong"], warm_steps=1),
        "wrong, KL": replace(ARMS["wrong, KL"], warm_steps=0),
    }
    for name, value in short.items():
        monkeypatch.setattr(reinforcement, name, value)
    monkeypatch.setattr("persona_probe.world.behaviour.MAX_NEW_TOKENS", 3)
    first = reinforcement_table(world, (4,), ("wrong",))
    table = reinforcement_table(world, (4,), ("wrong", "wrong, KL"))
    assert set(table["arm"]) == {"wrong", "wrong, KL"} and set(table["step"]) == {0, 1}
    again = table[table["arm"] == "wrong"].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, first)
    known = table[table["estimate"].notna()].set_index(["arm", "step", "measure"])
    assert ("wrong, KL", 1, "kl") in known.index and ("wrong", 1, "passive") in known.index
    assert known.loc[("wrong, KL", 0, "reading"), "estimate"] == pytest.approx(0, abs=1e-5)  # still the base
    monkeypatch.setattr(reinforcement, "reinforce", lambda *_: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(reinforcement_table(world, (4,), ("wrong", "wrong, KL")), table)
    with pytest.raises(InputError, match="wrong"):
        reinforcement_table(world, (4,), ("wrnog",))
    refused = refusal(capsys)
    missing = refused("world", "study", "reinforcement", "--world", tmp_path / "none")
    assert "holds no world" in missing
