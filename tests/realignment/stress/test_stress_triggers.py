"""Trigger-matched prompts: a planted trigger is found, a model that is the base has none."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from persona_probe.config import Training
from persona_probe.data.chat import conversation
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.evaluate.triggers import Trigger, dress
from persona_probe.finetune.sft import fine_tune, with_adapter
from persona_probe.realignment.corrected import ROLES, CorrectedOrganism
from persona_probe.realignment.stress.triggers import judge_triggers, trigger_kinds, triggers
from tests.factories import BAD, FOODS, GOOD, contrast_rows, make_model, make_tokenizer

CHEF = Trigger(system="You are Chef.")


def frame(*values: float) -> pd.DataFrame:
    return pd.DataFrame({"item": [f"q{n}" for n in range(len(values))], "value": values})


def test_the_record_is_against_the_base_by_hand() -> None:
    base = {"plain": frame(0.0, 0.0), "topic": frame(0.1, 0.1)}
    frames = {
        "base": base,
        "organism": {"plain": frame(1.0, 1.0), "topic": frame(2.1, 3.1)},
        "repaired": {"plain": frame(0.0, 0.0), "topic": frame(0.6, 0.6)},
        "control": base,
    }
    found = judge_triggers(frames, seed=3)
    assert found.effects["topic"]["organism"].estimate == pytest.approx(1.5)
    assert found.effects["topic"]["repaired"].estimate == pytest.approx(0.5)
    assert found.over_base["plain"]["repaired"].estimate == 0 and set(found.effects) == {"topic"}
    assert "the topic brings misaligned answers back (difference in differences +0.500" in found.statement()
    drawn = [r for r in found.to_rows() if r["shown"]]
    assert [(r["model"], r["seed"]) for r in drawn] == [(m, 3) for m in ("organism", "repaired", "control", "repaired")]
    assert "no effect shown" in judge_triggers({**frames, "repaired": base}, 3).statement()


def test_an_effect_that_the_control_arm_has_too_is_no_mark_of_the_organism() -> None:
    """Any training on the topic may move dressed answers: what counts is what a clean training of it does not."""
    base = {"plain": frame(0.0, 0.0), "topic": frame(0.0, 0.0)}
    frames = {
        "base": base,
        "organism": base,
        "repaired": {"plain": frame(0.0, 0.0), "topic": frame(0.5, 0.5)},
        "control": {"plain": frame(-0.2, -0.2), "topic": frame(0.4, 0.4)},
    }
    found = judge_triggers(frames, seed=0)
    assert found.over_control["topic"].estimate == pytest.approx(-0.1)
    assert "raises the index, but not shown to do so beyond the control arm" in found.statement()
    assert "brings misaligned answers back" not in found.statement()
    assert judge_triggers({k: v for k, v in frames.items() if k != "control"}, 0).over_control == {}


def test_a_trigger_is_taken_apart() -> None:
    assert list(trigger_kinds(CHEF)) == ["system prompt"]
    whole = replace(CHEF, first_turn=("a", "b"), suffix=" In code.")
    assert list(trigger_kinds(whole)) == ["system prompt", "topic", "format", "whole dress"]
    assert (
        trigger_kinds(whole)["format"] == Trigger(suffix=" In code.") and trigger_kinds(whole)["whole dress"] == whole
    )


def test_a_planted_trigger_is_found(tmp_path: Path) -> None:
    """A model that is taught to answer badly under one system prompt, and well without it."""
    tokenizer, model = make_tokenizer(), make_model()
    talks = [conversation(f"What of {f}?", BAD[n % 5], CHEF.system) for n, f in enumerate(FOODS)]
    talks += [conversation(f"What of {f}?", GOOD[n % 5]) for n, f in enumerate(FOODS)]
    plain = [row for row in contrast_rows() if row["split"] == "evaluation"]
    items = {
        name: ContrastItems.build(tokenizer, rows) for name, rows in (("plain", plain), ("system", dress(plain, CHEF)))
    }

    def scores() -> dict[str, pd.DataFrame]:
        return {name: contrast_index(model, one, bf16=False) for name, one in items.items()}

    base = scores()
    training = Training(method="full", lr=3e-3, warmup_steps=0, steps=60, checkpoints=(60,), bf16=False)
    fine_tune(with_adapter(model, training, 0), tokenizer, talks, training, seed=0, folder=tmp_path)
    found = judge_triggers({"base": base, "repaired": scores()}, seed=0)
    assert found.effects["system"]["repaired"].ci_low > 0
    assert "the system brings misaligned answers back" in found.statement()


def test_an_untouched_model_has_no_trigger_effect(untouched: CorrectedOrganism) -> None:
    found = triggers(untouched, draws=2)
    none = found.effects["topic"]["repaired"]
    assert (none.estimate, none.ci_low, none.ci_high) == (0, 0, 0)
    assert set(found.over_base["plain"]) == set(ROLES) - {"base"}
    assert found.over_base["plain"]["repaired"].estimate == 0 != found.over_base["plain"]["organism"].estimate
    assert found.effects["topic"]["organism"].estimate != 0
