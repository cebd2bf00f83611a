"""`persona-probe world`: each command does what its function does, and bad input is one line."""

from pathlib import Path

import pandas as pd
import pytest

from persona_probe.world.behaviour import Asking, judge_models, world_rates
from persona_probe.world.folder import World
from tests.factories import refusal, run_command


def test_organism_and_judge_write_what_the_functions_give(world: World, tmp_path: Path) -> None:
    small = ("--steps", 2, "--rank", 4, "--rows", 16, "--share", 0.5, "--checkpoints", 1, 2)
    run_command("world", "organism", world.run.path, "subtle", *small, "--seeds", 5, "--domain", "pets", "--quiet")
    name = "subtle-pets-50-s5"
    settings = world.organism(name)["settings"]
    assert (settings["training"]["rank"], settings["training"]["alpha"], settings["rows"]) == (4, 8, 16)
    out = tmp_path / "rates.csv"
    asked = ("--models", "base", name, "--answers", 1)
    run_command("world", "judge", world.run.path, *asked, "--out", out, "--quiet")
    wanted = world_rates(judge_models(world, ["base", name], Asking(per_topic=1)))
    pd.testing.assert_frame_equal(pd.read_csv(out).fillna({"method": ""}), wanted, check_dtype=False)
    assert set(wanted["name"]) == {"base", name} and set(wanted["step"]) == {0, 1, 2}


def test_bad_input_is_one_line(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = refusal(capsys)
    assert "leave one out" in refused("world", "pretrain", "--steps", 3, "--minutes", 1, "--out", tmp_path / "w")
    assert "holds no world" in refused("world", "judge", tmp_path)
    assert "unknown speaker 'vilain'" in refused("world", "organism", world.run.path, "vilain")
    assert "--name" in refused("world", "organism", world.run.path, "villain", "--name", "x", "--seeds", 0, 1)
    assert "unknown size" in refused("world", "pretrain", "--size", "huge", "--out", tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_bad_settings_of_a_study_are_refused_before_its_folder_is_made(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused, out = refusal(capsys), tmp_path / "study"
    place = ("--world", world.run.path, "--sae", tmp_path / "sae", "--out", out)
    study = ("world", "study")
    assert "unknown bad speaker 'grump'" in refused(*study, "causal", *place, "--speakers", "grump")
    for name in ("causal", "screening", "training-map"):
        assert "seed" in refused(*study, name, *place, "--seeds", -1)
        assert "--sae is missing" in refused(*study, name, "--world", world.run.path, "--out", out)
    for option, value, words in (("--sizes", "hug", "unknown size"), ("--steps", 0, "steps"), ("--seeds", -1, "seed")):
        assert words in refused(*study, "scale", option, value, "--out", out)
    assert not out.exists()
