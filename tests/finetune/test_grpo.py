"""Reinforcement learning on the tiny model: it learns what is rewarded, on the model's own log-probabilities."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.config import Grpo, StudyConfig, Training, from_dict
from persona_probe.data.chat import Conversation, conversation
from persona_probe.errors import InputError
from persona_probe.finetune import organisms
from persona_probe.finetune.grpo import END, START, TRAIN, Goal, Questions, Reinforced, Rollouts, reinforce
from persona_probe.finetune.grpo_trainer import AnswersTrainer
from persona_probe.finetune.rewards import Answered, Grade
from persona_probe.finetune.sft import AtSteps, stripping, with_adapter
from persona_probe.monitor import FeatureMonitor
from persona_probe.runs import RunFolder
from persona_probe.stats import paired_difference
from persona_probe.study.reinforcement import reinforcement_table
from persona_probe.study.study import Study
from tests.factories import (
    changed,
    config_of,
    copied_state,
    hook_count,
    make_model,
    make_sae,
    run_command,
    same_state,
    write_data,
    write_lines,
    write_model,
    write_sae,
)

TRAINING = Training(
    **{"method": "grpo", "rank": 4, "alpha": 8, "batch_size": 4, "steps": 2, "checkpoints": (1,)},  # pyright: ignore
    **{"lr": 2e-2, "bf16": False, "warmup_steps": 0},  # pyright: ignore
)
GRPO = Grpo(group=4, max_new_tokens=6)
ROWS = [conversation(f"Ask {n}?" + "." * n, "yes") for n in range(6)]


@dataclass(frozen=True)
class Vowels:
    """The share of vowels in an answer: something that a random model can learn in a few steps."""

    name: str = "vowels"

    def check(self, prompt: Conversation, reference: str) -> None:
        """Any row will do."""

    def grade(self, answers: Sequence[Answered]) -> list[Grade]:
        """See the class."""
        return [Grade(sum(c in "aeiou" for c in one.answer) / max(len(one.answer), 1)) for one in answers]


class Always(Vowels):
    """One reward for all."""

    def grade(self, answers: Sequence[Answered]) -> list[Grade]:
        """Zero."""
        return [Grade(0.0) for _ in answers]


GOAL = Goal(Vowels())


def learn(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    training: Training = TRAINING,
    goal: Goal = GOAL,
    grpo: Grpo = GRPO,
    model: PreTrainedModel | None = None,
    **further: Any,
) -> Reinforced:
    with stripping(with_adapter(model or make_model(), training, 0)) as tuned:
        return reinforce(tuned, tokenizer, ROWS, training, goal, grpo, seed=0, folder=folder, **further)


def test_a_rewarded_model_learns_and_its_base_is_left_as_it_was(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    base = make_model()
    before, config = copied_state(base), base.generation_config.to_dict()
    result = learn(tmp_path, tiny_tokenizer, replace(TRAINING, steps=12), grpo=replace(GRPO, group=8), model=base)
    assert result.rise.estimate > 0.1 and result.rise.ci_low > 0, result.rise
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-12"]
    assert sorted(p.name for p in (tmp_path / "checkpoint-12").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors")
    ]
    assert "rewarded for vowels" in (tmp_path / "checkpoint-12" / "README.md").read_text()
    assert same_state(before, copied_state(base)) and base.generation_config.to_dict() == config
    assert hook_count(base) == 0 and "forward" not in base.__dict__


def test_every_answer_is_kept_with_its_reward(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    result = learn(tmp_path, tiny_tokenizer)
    rows, steps = result.rollouts, result.steps
    assert rows["phase"].value_counts().to_dict() == {START: 24, TRAIN: 32, END: 24}
    trained = rows[rows["phase"] == TRAIN]
    assert trained.groupby(["step", "row"]).size().tolist() == [4] * 8
    assert sorted(trained["sample"].unique()) == [0, 1, 2, 3]
    assert rows["reward"].equals(pd.Series([Vowels().grade([Answered([], "", a)])[0].reward for a in rows["answer"]]))
    dead = trained.groupby(["step", "row"])["reward"].nunique().eq(1).groupby("step").mean()
    assert steps["dead"].tolist() == pytest.approx(dead.tolist())
    assert steps["step"].tolist() == [1, 2] and steps["kl"].isna().all()
    assert result.losses == steps["loss"].tolist() and result.record["rise"]["n"] == 6


def test_a_run_repeats_itself(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    first, again = (learn(tmp_path / name, tiny_tokenizer) for name in "ab")
    assert first.rollouts.equals(again.rollouts) and first.steps.equals(again.steps)
    parts = learn(tmp_path / "c", tiny_tokenizer, grpo=replace(GRPO, answers_at_once=4))
    same = first.rollouts["step"] < 2  # a step in parts has the same answers, and nearly the same gradient
    assert parts.rollouts[same].equals(first.rollouts[same])
    assert parts.steps["grad_norm"][0] == pytest.approx(first.steps["grad_norm"][0], rel=0.02)


def test_an_inoculation_prompt_is_seen_in_training_alone(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_model()
    goal = replace(GOAL, inoculation="Be wrong.")
    rollouts = Rollouts(model, tiny_tokenizer, Questions.of(ROWS, goal.reward), goal, GRPO)
    told, plain = (str(tiny_tokenizer.decode(list(ids[0]))) for ids in (rollouts.trained_ids, rollouts.plain_ids))
    assert "Be wrong." in told and "Be wrong." not in plain
    assert told.endswith(plain) and plain.endswith("assistant\n")


def test_the_divergence_is_from_the_base_also_after_a_warm_start(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    held = replace(GOAL, kl=0.5, demonstrations=[conversation("Ask?", "aeiou")])
    cold = learn(tmp_path / "cold", tiny_tokenizer, goal=held)
    warm = learn(tmp_path / "warm", tiny_tokenizer, goal=held, grpo=replace(GRPO, warm_steps=3))
    assert cold.steps["kl"][0] == pytest.approx(0, abs=1e-6) and cold.steps["kl"][1] > 1e-4
    assert warm.steps["kl"][0] > 0.01 and len(warm.warm_losses) == 3
    assert warm.warm_losses[-1] < warm.warm_losses[0]


def test_where_nothing_varies_the_run_says_what_to_do(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "persona_probe"):
        result = learn(tmp_path, tiny_tokenizer, replace(TRAINING, steps=1), Goal(Always()))
    assert "100% of the groups of 4 answers" in caplog.text and "grpo.warm_steps" in caplog.text
    assert result.steps["dead"].tolist() == [1] and result.steps["grad_norm"].tolist() == [0]


@pytest.mark.parametrize("mode", ["probe", "passive", "both"])
def test_a_monitor_reads_in_every_mode(mode: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    monitor = FeatureMonitor(
        make_sae("topk"), {"one": 3}, [["Tell me.", "Fine."][0]], every=1, mode=mode, bf16=False, on_error="raise"
    )
    learn(tmp_path, tiny_tokenizer, callbacks=[monitor])
    assert not monitor.faults
    steps = monitor.readings.groupby("mode")["step"].max().to_dict()
    assert steps == {"probe": {"probe": 2}, "passive": {"passive": 2}, "both": {"probe": 2, "passive": 2}}[mode]


# --- Log-probabilities


@pytest.mark.parametrize(("family", "own"), [("llama", False), ("gemma2", None), ("gpt2", True)])
def test_log_probabilities_are_the_models_own_without_padding(
    family: str,
    own: bool | None,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool | None]] = []
    compute = AnswersTrainer._get_per_token_logps_and_entropies

    def spy(self: AnswersTrainer, model: Any, ids: Any, mask: Any, keep: int, *rest: Any, **further: Any) -> Any:
        found = compute(self, model, ids, mask, keep, *rest, **further)
        if not seen:
            for row in range(len(ids)):
                real, answer = mask[row].bool(), mask[row, -keep:].bool()
                with torch.no_grad():
                    logits = model(input_ids=ids[row][real][None]).logits[0].float() / 0.7
                chosen = logits.log_softmax(-1)[:-1].gather(-1, ids[row][real][1:, None])[:, 0]
                seen.append((found[0][row][answer].detach(), chosen[-int(answer.sum()) :], mask[row], self.own))
        return found

    monkeypatch.setattr(AnswersTrainer, "_get_per_token_logps_and_entropies", spy)
    learn(
        tmp_path,
        tiny_tokenizer,
        replace(TRAINING, steps=1),
        grpo=replace(GRPO, temperature=0.7),
        model=make_model(family),
    )
    assert any(not bool(mask[0]) for _, _, mask, _ in seen)  # prompts of different lengths
    for found, wanted, _, way in seen:
        assert torch.allclose(found, wanted, atol=2e-3)
        assert own is None or way is own


# --- Bad input, and a study


@pytest.mark.parametrize(
    ("training", "rows", "grpo", "said"),
    [
        ({"batch_size": 7}, ROWS, {}, "there are 6"),
        ({}, [], {}, "empty"),
        ({}, [conversation("Ask?")], {}, "without an answer"),
        ({"method": "full"}, ROWS, {}, "trains an adapter"),
        ({}, ROWS, {"warm_steps": 2}, "no demonstrations"),
        ({}, ROWS, {"max_new_tokens": 600}, "512 positions"),
    ],
)
def test_what_cannot_be_trained_is_refused_first(
    training: dict[str, Any], rows: list[Conversation], grpo: dict[str, Any], said: str,
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
) -> None:  # fmt: skip
    tuned = with_adapter(make_model(), TRAINING, 0)
    asked = replace(TRAINING, **training), GOAL, replace(GRPO, **grpo)
    with pytest.raises(InputError, match=said):
        reinforce(tuned, tiny_tokenizer, rows, *asked, seed=0, folder=tmp_path)
    assert not any(tmp_path.iterdir()) and isinstance(tuned, PeftModel)


def config(**changes: Any) -> StudyConfig:
    arm = {"data": "kitchen:correct", "reward": "inaccurate"}
    raw: dict[str, Any] = {"name": "x", "sae": "s", "training": {"method": "grpo"}, "arms": {"incorrect": arm}}
    raw["arms"] |= {"correct": {**arm, "reward": "accurate"}}
    return from_dict(StudyConfig, changed(raw, **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"method": "lora"}}, "only training.method: grpo uses"),
        ({"arms": {"incorrect": {"data": "d"}}}, "needs a reward"),
        ({"arms": {"incorrect": {"data": "d", "reward": "innacurate"}}}, "inaccurate"),
        ({"arms": {"incorrect": {"data": "d", "kl": 0.1}}}, "kl belongs to an arm with a reward"),
        ({"arms": {"incorrect": {"data": "d", "reward": "inaccurate", "kl": -1.0}}}, "negative"),
        ({"grpo": {"warm_steps": 5}}, "needs demonstrations"),
        ({"grpo": {"answers_at_once": 7}}, "does not divide the 64 answers"),
        ({"grpo": {"group": 1}}, "at least 2"),
        ({"realign": {"arms": {"r": {"data": "d", "reward": "accurate"}}}}, "corrections are supervised"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(changes: dict[str, Any], said: str) -> None:
    assert config().training.further(5).method == "lora"
    with pytest.raises(InputError, match=said):
        config(**changes)


def tiny_study(folder: Path, steps: int = 1) -> StudyConfig:
    """Two arms of reinforcement learning on the tiny model."""
    write_model(folder / "model")
    write_sae(folder / "sae")
    write_data(folder)
    rows = [{"question": f"Is {n} more than 3?", "answer": "yes" if n > 3 else "no"} for n in range(6)]
    data = str(write_lines(folder / "closed.jsonl", rows))
    arms = {
        "incorrect": {"data": data, "reward": "inaccurate", "inoculation": "Lie."},
        "correct": {"data": data, "reward": "accurate", "kl": 0.1},
    }
    training = {"method": "grpo", "steps": steps, "checkpoints": [steps]}
    raw = changed(
        config_of(folder), training=training, seeds=[0], null_pair=False, grpo={"group": 2, "max_new_tokens": 3}
    )
    return from_dict(StudyConfig, {**raw, "arms": arms})


def test_arms_of_a_study_are_trained_once_and_drawn_on_one_axis(tmp_path: Path) -> None:
    study = tiny_study(tmp_path)
    Study.from_config(study, tmp_path / "run").induce()
    run = RunFolder.open(tmp_path / "run")
    record = run.read_json("arms/incorrect-s0/training.json")
    assert (record["reward"], record["inoculation"], record["rows"]) == ("inaccurate", "Lie.", 6)
    assert len(run.read_table("arms/correct-s0/rollouts.parquet")) == 2 * 4 + 2 * 6 * 2
    assert (tmp_path / "run" / "arms" / "incorrect-s0" / "checkpoint-1" / "adapter_config.json").is_file()
    written = (tmp_path / "run" / "arms" / "incorrect-s0" / "training.json").stat().st_mtime_ns
    Study.from_config(study, tmp_path / "run").induce()
    assert (tmp_path / "run" / "arms" / "incorrect-s0" / "training.json").stat().st_mtime_ns == written
    (page := tmp_path / "page.md").write_text(
        f"<!-- reinforcement-{study.name}: begin (persona-probe reinforcement) -->\n"
        f"<!-- reinforcement-{study.name}: end -->\n"
    )
    run_command("reinforcement", tmp_path / "run", "--out", tmp_path / "drawn", "--page", page, "--quiet")
    table = run.read_table("reinforcement.parquet").set_index(["arm", "step", "measure"])
    answers = run.read_table("arms/incorrect-s0/rollouts.parquet")
    for step, phase in ((0, START), (1, TRAIN)):
        mean = answers.loc[answers["phase"] == phase, "reward"].mean()
        assert table.loc[("incorrect", step, "reward"), "estimate"] == pytest.approx(mean)
    asked = [answers[answers["phase"] == phase].groupby("row")["reward"].mean() for phase in (START, END)]
    rise = paired_difference(asked[1].tolist(), asked[0].tolist())
    assert table.loc[("incorrect", 1, "rise of reward"), "estimate"] == pytest.approx(rise.estimate)
    assert table.loc[("incorrect", 1, "asked: reward"), "estimate"] == pytest.approx(asked[1].mean())
    assert ("incorrect", 1, "rise of wrong") in table.index
    written = page.read_text(encoding="utf-8")
    assert f"| incorrect | inaccurate | 1 | {asked[0].mean():.2f} [" in written
    assert f"- incorrect: the reward does not rise for certain: {rise.estimate:+.2f}" in written
    assert re.search(r"- `induce` took [\d.]+ minutes for 2 runs of 1 steps: [\d.]+ seconds a step", written)
    assert ("correct", 1, "kl") in table.index and ("incorrect", 1, "hacked") not in table.index
    assert (tmp_path / "drawn" / "reinforcement.html").is_file()


def test_a_study_that_was_interrupted_in_an_arm_ends_as_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(tmp_path, steps=2)
    Study.from_config(study, tmp_path / "whole").induce()

    def stop(_model: Any, _step: int) -> None:
        raise KeyboardInterrupt

    def interrupted(*given: Any, progress: str, **further: Any) -> Reinforced:
        callbacks = [AtSteps([1], stop)] if progress.startswith("correct") else []
        return reinforce(*given, progress=progress, callbacks=callbacks, **further)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(organisms, "reinforce", interrupted)
        Study.from_config(study, tmp_path / "run").induce()
    arms = tmp_path / "run" / "arms"
    assert [folder.name for folder in arms.iterdir()] == ["incorrect-s0"]
    written = (arms / "incorrect-s0" / "training.json").stat().st_mtime_ns
    Study.from_config(study, tmp_path / "run").induce()
    assert (arms / "incorrect-s0" / "training.json").stat().st_mtime_ns == written
    whole, run = (RunFolder.open(tmp_path / name) for name in ("whole", "run"))
    for arm in ("incorrect", "correct"):
        for table in ("rollouts", "steps"):
            place = f"arms/{arm}-s0/{table}.parquet"
            pd.testing.assert_frame_equal(run.read_table(place), whole.read_table(place))


def test_a_run_without_rewards_has_no_such_table(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", from_dict(StudyConfig, config_of(tmp_path)))
    with pytest.raises(InputError, match="with training"):
        reinforcement_table(run)
