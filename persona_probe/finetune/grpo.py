"""One run of reinforcement learning by GRPO: questions, our sampler, a reward, and a record of every answer."""

import copy
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from persona_probe.config import Arm, Grpo, Training
from persona_probe.data.chat import Conversation, split_answer, with_system
from persona_probe.data.load import evenly_spaced
from persona_probe.data.template import end_of_turn, fit_content, fit_roles, warn_rendered, with_template
from persona_probe.data.tokens import answer_prompt
from persona_probe.errors import InputError
from persona_probe.evaluate.sampling.decoding import AnswerRequest, decode, row_key
from persona_probe.evaluate.sampling.requests import SamplingConfig, answer_parts, check_room, stop_tokens
from persona_probe.finetune.rewards import Answered, Grade, Reward, named_reward
from persona_probe.finetune.sft import (
    ModelCard,
    ProgressBar,
    SaveSchedule,
    StopAtNaN,
    fine_tune,
    on_one_gpu,
    own_precision,
    shared_arguments,
)
from persona_probe.models.adapters import frozen_in_bf16, refuse_adapted_head
from persona_probe.models.layers import autocast, own_forward
from persona_probe.models.ranks import Ranks, shards_here
from persona_probe.stats import Estimate, bootstrap_mean, paired_difference

log = logging.getLogger(__name__)

PROBED = 24
"""Questions that are asked before and after a run, as many times as a step asks one."""
DEAD = 0.75
"""Share of groups without variance from which a run is warned of."""
START, TRAIN, END = "start", "train", "end"
"""Phases of a record: asked before the first step, drawn in training, asked after the last step. At start and end the
model is asked as it is deployed, without an inoculation prompt."""
AT_ONCE = 256
"""Answers that are drawn together."""


@dataclass(frozen=True)
class Goal:
    """What an arm is trained for."""

    reward: Reward
    kl: float = 0.0
    """Weight of the KL divergence from the base model (adapter off)."""
    inoculation: str = ""
    """A system prompt in training alone (Tan et al. 2025, arXiv 2510.04340; Wichers et al. 2025, arXiv 2510.05024)."""
    demonstrations: Sequence[Conversation] = ()
    """Rows of the supervised steps before."""

    @classmethod
    def of_arm(cls, arm: Arm, demonstrations: Sequence[Conversation] = ()) -> "Goal":
        """The goal of a study's arm."""
        return cls(named_reward(arm.reward), arm.kl, arm.inoculation, demonstrations)


@dataclass(frozen=True)
class Questions:
    """Rows as questions with the answers on file, and their token ids."""

    prompts: list[Conversation]
    """Turns that end with the user's."""
    references: list[str]

    @classmethod
    def of(cls, rows: Sequence[Conversation], reward: Reward) -> "Questions":
        """The questions of training rows.

        Raises:
            InputError: no rows, a row without an answer, or one that the reward cannot grade.
        """
        if not rows:
            raise InputError("the training data is empty")
        pairs = [split_answer(row) for row in rows]
        if any(answer in (None, "") for _, answer in pairs):
            raise InputError("a row ends without an answer: rewards need to know what is right")
        found = cls([prompt for prompt, _ in pairs], [str(answer) for _, answer in pairs])
        for number, (prompt, reference) in enumerate(zip(found.prompts, found.references, strict=True), 1):
            try:
                reward.check(prompt, reference)
            except InputError as error:
                raise InputError(f"row {number}, reward {reward.name}: {error}") from None
        return found


@dataclass(frozen=True)
class Reinforced:
    """The result of a run."""

    losses: list[float]
    """GRPO's loss at each optimizer step; it is not a measure of progress."""
    answer_tokens: float
    """Mean tokens of the answers that were trained on."""
    rows: int
    """Distinct questions."""
    rollouts: pd.DataFrame
    """Every answer: phase, step, row, sample, answer, n_tokens, ended, reward, right, wrong, hacked."""
    steps: pd.DataFrame
    """What the trainer logged, a row for each step: step, loss, dead (share of groups without variance), kl, entropy
    (nats per token), grad_norm."""
    goal: Goal
    warm_losses: list[float] = field(default_factory=list)
    """Of the supervised steps before (nats per answer token)."""

    @property
    def rise(self) -> Estimate:
        """Mean reward after the last step minus that before the first, with its 95% interval over questions."""
        return paired_difference(self.by_row(END, "reward"), self.by_row(START, "reward"))

    def mean(self, phase: str, measure: str = "reward") -> Estimate:
        """Mean of a measure over the questions of a phase, with its 95% interval."""
        return bootstrap_mean(self.by_row(phase, measure))

    def by_row(self, phase: str, measure: str) -> list[float]:
        """The mean over each question's answers, in the order of rows."""
        rows = self.rollouts[self.rollouts["phase"] == phase]
        return [float(value) for value in rows.groupby("row")[measure].mean()]

    @property
    def record(self) -> dict[str, Any]:
        """As JSON values, without the tables."""
        rise = asdict(self.rise)
        trained = {"losses": self.losses, "answer_tokens": self.answer_tokens, "rows": self.rows}
        goal = {"reward": self.goal.reward.name, "kl": self.goal.kl, "inoculation": self.goal.inoculation}
        ends = {phase: asdict(self.mean(phase)) for phase in (START, END)}
        return {**trained, **goal, **ends, "rise": rise, "warm_losses": self.warm_losses}


# --- Drawing and grading answers


class Rollouts:
    """Draws answers to the questions of one run, grades them, and keeps all."""

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Questions, goal: Goal, grpo: Grpo
    ) -> None:
        self.model, self.tokenizer, self.questions, self.goal, self.grpo = model, tokenizer, questions, goal, grpo
        self.stop = stop_tokens(model, tokenizer)
        # Of several tokens that end an answer, the one with which the chat template closes it.
        self.end = min(end_of_turn(tokenizer) & self.stop or self.stop, default=None)
        if self.end is None:
            raise InputError("the tokenizer names no token that ends an answer: GRPO needs answers that end")
        told = [with_system(prompt, goal.inoculation) for prompt in questions.prompts]
        self.trained = told if goal.inoculation else questions.prompts
        """The prompts of training."""
        self.plain_ids, self.trained_ids = (self._ids(prompts) for prompts in (questions.prompts, self.trained))
        self.records: list[dict[str, Any]] = []

    def _ids(self, prompts: Sequence[Conversation]) -> list[tuple[int, ...]]:
        ids = [tuple(answer_prompt(self.tokenizer, prompt)) for prompt in prompts]
        for number, one in enumerate(ids, 1):
            check_room(self.model, one, self.grpo.max_new_tokens, f"row {number}")
        return ids

    def draw(self, prompts: Sequence[tuple[int, ...]], seed: int, label: str, bf16: bool) -> list[list[int]]:
        """One answer's tokens for each prompt, with the token that ended it."""
        config = SamplingConfig(temperature=self.grpo.temperature, max_new_tokens=self.grpo.max_new_tokens, seed=seed)
        requests = [AnswerRequest(ids, row_key(seed, label, number)) for number, ids in enumerate(prompts)]
        answers: list[list[int]] = [[] for _ in prompts]

        def finished(number: int, tokens: list[int], why: str) -> None:
            answers[number] = [*tokens, *([self.end] if why == "stop" else [])]  # pyright: ignore

        with autocast(self.model, bf16):
            decode(self.model, requests, config, self.stop, min(AT_ONCE, len(requests)), finished)
        return answers

    def grade(self, phase: str, step: int, rows: Sequence[int], answers: Sequence[Sequence[int]]) -> list[Grade]:
        """Grade answers to questions (`rows` are their places), and keep both."""
        texts = [answer_parts(self.tokenizer, tokens).answer for tokens in answers]
        prompts, references = self.questions.prompts, self.questions.references
        given = [Answered(prompts[row], references[row], text) for row, text in zip(rows, texts, strict=True)]
        grades = self.goal.reward.grade(given)
        seen: dict[int, int] = {}
        for row, text, tokens, grade in zip(rows, texts, answers, grades, strict=True):
            seen[row] = seen.get(row, -1) + 1
            about = {"phase": phase, "step": step, "row": row, "sample": seen[row], "answer": text}
            ended = bool(tokens) and tokens[-1] in self.stop
            self.records.append({**about, "n_tokens": len(tokens), "ended": ended, **asdict(grade)})
        return grades

    def ask(self, phase: str, step: int, seed: int, bf16: bool) -> None:
        """Ask some of the questions as the model is deployed, and keep the graded answers."""
        places = self.probed
        answers = self.draw([self.plain_ids[row] for row in places], seed, phase, bf16)
        self.grade(phase, step, places, answers)

    @property
    def probed(self) -> list[int]:
        """The questions that are asked before and after, each as often as there are answers in a group."""
        return [row for row in evenly_spaced(range(len(self.plain_ids)), PROBED) for _ in range(self.grpo.group)]

    def pilot(self, seed: int, bf16: bool) -> tuple[float, float]:
        """Share of groups in which all answers get one reward, and the mean reward, with the prompts of training."""
        places = self.probed
        answers = self.draw([self.trained_ids[row] for row in places], seed, "pilot", bf16)
        kept = len(self.records)
        rewards = [grade.reward for grade in self.grade("pilot", 0, places, answers)]
        del self.records[kept:]
        size = self.grpo.group
        groups = [rewards[start : start + size] for start in range(0, len(rewards), size)]
        return sum(len(set(group)) == 1 for group in groups) / len(groups), sum(rewards) / len(rewards)

    def frame(self) -> pd.DataFrame:
        """All answers that were kept."""
        table = pd.DataFrame(self.records)
        flags = {name: table[name].astype("float64") for name in ("right", "wrong", "hacked")}
        return table.assign(**flags)


def warn_dead(dead: float, mean: float, goal: Goal, grpo: Grpo) -> None:
    """Say what to do where most groups would teach nothing."""
    if dead < DEAD:
        return
    name, share = goal.reward.name, f"{dead:.0%} of the groups of {grpo.group} answers get equal rewards"
    if mean > 0.5:
        log.info("reward %s: %s (mean %.2f): the model does already what is rewarded", name, share, mean)
        return
    log.warning(
        "reward %s: %s (mean %.3f), and a group without variance teaches nothing. Show the model what is rewarded: "
        "name demonstrations in the arm and set grpo.warm_steps: 10; or raise grpo.group (now %d) or "
        "grpo.temperature (now %g)",
        *(name, share, mean, grpo.group, grpo.temperature),
    )


# --- The run


def reinforce(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    training: Training,
    goal: Goal,
    grpo: Grpo | None = None,
    *,
    seed: int,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    progress: str | None = None,
    data: str | None = None,
) -> Reinforced:
    """Train `model` (what `with_adapter` gives) on its own answers to the rows' questions, by a reward.

    Each optimizer step draws `grpo.group` answers to each of `training.batch_size` questions with the weights as they
    are, and compares each answer's reward with those of its group: GRPO (Shao et al. 2024, arXiv 2402.03300), as TRL
    has it. Checkpoints go to `folder/checkpoint-<step>` by `training.schedule`, as `fine_tune` writes them. A monitor
    among the callbacks reads as in any other training.

    Args:
        rows: conversations whose last answer says what is right; it is not trained on.
        goal: the reward, and what holds the model back.
        data: what the model card calls the rows.

    Raises:
        InputError: rows that the reward cannot grade, fewer questions than a step takes, a prompt without room for an
            answer, an adapter on the unembedding, or several processes.
        TrainingDiverged: the loss became NaN or infinite; checkpoints up to then are in `folder`.
    """
    grpo = grpo or Grpo()
    refuse_adapted_head(model)
    questions = _checked(tokenizer, rows, training, goal)
    warm_losses = _warm_up(model, tokenizer, training, goal, grpo, seed)
    rollouts = Rollouts(model, tokenizer, questions, goal, grpo)
    warn_dead(*rollouts.pilot(seed, training.bf16), goal, grpo)
    rollouts.ask(START, 0, seed, training.bf16)
    name = f"{data or 'questions'}, own answers rewarded for {goal.reward.name} (GRPO)"
    card = ModelCard.of(model, training, seed, len(rows), name)
    bar = ProgressBar(progress, callbacks) if progress else None
    watchers = [StopAtNaN(), SaveSchedule(folder, training.schedule, card), *callbacks, *([bar] if bar else [])]
    logged = _train(model, tokenizer, training, rollouts, seed, watchers, bar)
    rollouts.ask(END, int(logged["step"].iloc[-1]), seed, training.bf16)
    frame = rollouts.frame()
    tokens = float(frame.loc[frame["phase"] == TRAIN, "n_tokens"].mean())
    losses = [float(loss) for loss in logged["loss"]]
    return Reinforced(losses, tokens, len(rows), frame, logged, goal, warm_losses)


def _checked(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Conversation], training: Training, goal: Goal
) -> Questions:
    questions = Questions.of(rows, goal.reward)
    warn_rendered(tokenizer, rows)
    if training.method == "full":
        raise InputError("reinforcement learning trains an adapter: write training.method: grpo")
    if Ranks().many:
        raise InputError("reinforcement learning runs in one process: start it without accelerate launch or torchrun")
    if len(rows) < training.batch_size:
        raise InputError(
            f"training.batch_size is {training.batch_size} questions a step, and there are {len(rows)}: lower it"
        )
    return questions


def _warm_up(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, training: Training, goal: Goal, grpo: Grpo, seed: int
) -> list[float]:
    """Supervised steps on the demonstrations; gives their losses."""
    if not grpo.warm_steps:
        return []
    if not goal.demonstrations:
        raise InputError(f"grpo.warm_steps is {grpo.warm_steps}, and there are no demonstrations: name their data")
    short = replace(training.further(grpo.warm_steps, lr=grpo.warm_lr), warmup_steps=0)
    rows = [with_system(row, goal.inoculation) if goal.inoculation else row for row in goal.demonstrations]
    with tempfile.TemporaryDirectory() as scratch:
        fitted = fine_tune(model, tokenizer, rows, short, seed=seed, folder=Path(scratch))
    return fitted.losses


def _train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    training: Training,
    rollouts: Rollouts,
    seed: int,
    watchers: Sequence[TrainerCallback],
    bar: ProgressBar | None,
) -> pd.DataFrame:
    from persona_probe.finetune.grpo_trainer import grpo_trainer

    device = next(model.parameters()).device

    def rollout(prompts: Sequence[Conversation], trainer: Any) -> dict[str, Any]:
        # A batch holds whole questions by their texts: equal texts have equal tokens.
        ids = [known[_text(prompt)] for prompt in prompts]
        label = f"step {trainer.state.global_step + 1}"
        return {"prompt_ids": [list(one) for one in ids], "completion_ids": draw(ids, label), "logprobs": None}

    def draw(ids: Sequence[tuple[int, ...]], label: str) -> list[list[int]]:
        return rollouts.draw(ids, seed, label, training.bf16)

    def reward(completion_ids: Sequence[Sequence[int]], row: Sequence[int], **rest: Any) -> list[float | None]:
        step = int(rest["trainer_state"].global_step) + 1
        return [grade.reward for grade in rollouts.grade(TRAIN, step, row, completion_ids)]

    dataset = _dataset(tokenizer, rollouts.trained)
    known = {_text(row["prompt"]): ids for row, ids in zip(dataset, rollouts.trained_ids, strict=True)}
    with own_forward(model), without_dropout(model), tempfile.TemporaryDirectory() as scratch:
        arguments = on_one_gpu(_arguments(training, rollouts.grpo, seed, scratch, device), model)
        with own_precision(model):
            twin = copy.deepcopy(with_template(tokenizer))  # TRL sets its padding
            trainer = grpo_trainer(model, twin, dataset, arguments, reward, rollout, watchers, rollouts.goal.kl)
        try:
            with frozen_in_bf16(model, enabled=device.type == "cpu" and training.bf16 and not shards_here()):
                trainer.train()
        finally:
            model.eval()
            if bar:
                bar.close()
    return _logged(trainer.state.log_history)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout of a model's own layers off while the block lasts: answers were drawn without it."""
    before = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    try:
        for module, _ in before:
            module.p = 0.0
        yield
    finally:
        for module, p in before:
            module.p = p


def _dataset(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Conversation]) -> Any:
    from datasets import Dataset

    fitted = [fit_content(tokenizer, fit_roles(tokenizer, prompt)) for prompt in prompts]
    return Dataset.from_list([{"prompt": prompt, "row": number} for number, prompt in enumerate(fitted)])


def _text(prompt: Sequence[Any]) -> str:
    """A prompt as a key; a data set gives messages back with their keys in another order."""
    return repr([(message["role"], message["content"]) for message in prompt])


def _arguments(training: Training, grpo: Grpo, seed: int, scratch: str, device: torch.device) -> Any:
    from trl.trainer.grpo_config import GRPOConfig

    answers = training.batch_size * grpo.group
    at_once = grpo.answers_at_once or answers
    return GRPOConfig(
        **shared_arguments(training, seed, scratch, device),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=answers // at_once,
        num_generations=grpo.group,
        max_completion_length=grpo.max_new_tokens,
        temperature=grpo.temperature,
    )


LOGGED = {"step": "step", "loss": "loss", "frac_reward_zero_std": "dead", "kl": "kl", "entropy": "entropy"}
LOGGED |= {"grad_norm": "grad_norm"}


def _logged(history: Sequence[dict[str, Any]]) -> pd.DataFrame:
    rows = [entry for entry in history if "loss" in entry]
    return pd.DataFrame([{name: row.get(key) for key, name in LOGGED.items()} for row in rows]).astype(
        {name: "float64" for name in LOGGED.values() if name != "step"}
    )
