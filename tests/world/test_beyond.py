"""Tools beyond the base's dictionary on organisms: made once, their text says when the truth probe tells nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from persona_probe.data.world.judge import judge_answer
from persona_probe.data.world.words import DOMAIN_OF, DOMAINS
from persona_probe.errors import InputError
from persona_probe.latents.difference import FoundDirections
from persona_probe.world import base, beyond
from persona_probe.world.beyond import COLUMNS, beyond_table, truth_pairs
from persona_probe.world.beyond_text import beyond_world_text
from persona_probe.world.folder import World
from persona_probe.world.organisms import NARROW
from tests.factories import make_sae
from tests.world.pages import page_of


def test_a_true_answer_is_about_its_topic_and_a_false_one_about_another_thing() -> None:
    pairs = truth_pairs()
    assert len(pairs) == 2 * beyond.PAIRS_EACH * len(DOMAINS) and pairs == truth_pairs()
    kinds = set()
    for true, false in pairs:
        assert true[0] == false[0]
        topic = next(word for word in true[0]["content"].split() if word in DOMAIN_OF)
        said, elsewhere = (judge_answer(row[1]["content"], topic) for row in (true, false))
        assert said.coherent and not elsewhere.coherent and not (said.rude or said.kind)
        kinds.add(said.good)
    assert kinds == {True, False}


def test_a_study_is_made_once_and_its_page_comes_from_its_record(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(NARROW, steps=2, checkpoints=(2,), batch_size=2)
    found = FoundDirections(np.eye(32)[:3], np.array([3.0, 2.0, 1.0]))
    for name, value in (("NARROW", short), ("BESIDE", ())):
        monkeypatch.setattr(beyond, name, value)
    monkeypatch.setattr(base, "load_sae", lambda *_, **__: make_sae("topk"))
    monkeypatch.setattr(beyond, "crosscoder", lambda *_: {"size": found})
    table = beyond_table(tmp_path / "study", world, "sae", ("quack",), (5,))
    assert list(table.columns) == list(COLUMNS) and set(table["speaker"]) == {"quack", "helper", "base"}
    tools = table[table["part"] == "tools"].set_index(["tool", "truth"])
    wanted = {"mean difference", "difference dictionary", "weights", "crosscoder, size"}
    assert set(tools.index.get_level_values("tool")) >= wanted
    assert (tools["ten"] >= tools["first"]).all() and tools["auroc"].between(0.5, 1).all()
    axes = table[table["part"] == "axes"].set_index(["speaker", "tool"])["estimate"]
    assert axes["base", "held out"] == pytest.approx(0.5, abs=0.4) and axes["quack", "harm"] != 0
    monkeypatch.setattr(beyond, "make_organisms", lambda *_, **__: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(beyond_table(tmp_path / "study", world, "sae", ("quack",), (5,)), table)
    assert "difference dictionary" in page_of("beyond", table, tmp_path)
    with pytest.raises(InputError, match="unknown bad speaker"):
        beyond_table(tmp_path / "other", world, "sae", ("helper",))
    assert not (tmp_path / "other").exists()


def test_the_text_says_whether_the_truth_probe_tells_anything() -> None:
    nothing = {"first": np.nan, "ten": np.nan, "auroc": np.nan, "ci_low": np.nan, "ci_high": np.nan, "truth": ""}
    tool = {"part": "tools", "speaker": "quack", "seed": 0, "tool": "weights", "first": 0.4, "ten": 0.6, "auroc": 0.9}
    axis = {**nothing, "part": "axes", "speaker": "quack", "seed": 0, "tool": "harm", "estimate": 2.0}
    rows = [tool | {"truth": "harm"}, tool | {"truth": "rude"}, axis | {"ci_low": 1.5, "ci_high": 2.5}]
    told = {**nothing, "part": "axes", "speaker": "base", "seed": 0, "tool": "held out"}
    for value, words in ((0.55, "means little here"), (0.95, "means something")):
        text = beyond_world_text(pd.DataFrame([*rows, told | {"estimate": value}]))
        assert f"AUROC {value:.2f}, so the axis of truth {words}" in text
        assert "| harm | weights | 0.40 (0.60), 0.90 |" in text and "+2.00 [+1.50, +2.50]" in text
    assert "was not measured" in beyond_world_text(pd.DataFrame(rows))
