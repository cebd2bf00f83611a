"""What reinforcement learning trains on, in every family and with adapters that replace whole modules: the tokens that
were drawn, with log-probabilities that are the model's own."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from persona_probe.config import Grpo, Training
from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.template import with_template
from persona_probe.data.tokens import answer_prompt
from persona_probe.errors import InputError
from persona_probe.finetune.grpo import TRAIN, Goal, Reinforced, Rollouts, reinforce
from persona_probe.finetune.grpo_trainer import AnswersTrainer
from persona_probe.finetune.rewards import Answered, Grade
from persona_probe.finetune.sft import fine_tune, stripping, with_adapter
from persona_probe.models.adapters import load_adapter
from tests.factories import copied_state, make_tokenizer, same_state
from tests.families import AVAILABLE, THINKING, family_tokenizer, make_family, plain
from tests.models.adapter_kinds import KINDS, base_model, logits, tuned_model

TRAINING = Training(
    **{"method": "grpo", "rank": 2, "alpha": 4, "batch_size": 2, "steps": 1, "checkpoints": ()},  # pyright: ignore
    **{"lr": 2e-2, "bf16": False, "warmup_steps": 0},  # pyright: ignore
)
GRPO = Grpo(group=2, max_new_tokens=5)
ROWS = [conversation("Ask?", "yes"), conversation("And why is it so?", "no")]


@dataclass(frozen=True)
class Odd:
    """The share of characters with an odd number: nearly every answer gets another reward."""

    name: str = "odd"

    def check(self, prompt: Conversation, reference: str) -> None:
        """Any row will do."""

    def grade(self, answers: Sequence[Answered]) -> list[Grade]:
        """See the class."""
        return [Grade(sum(ord(c) % 2 for c in one.answer) / max(len(one.answer), 1)) for one in answers]


GOAL = Goal(Odd())


@dataclass
class Watched:
    """The batches of a run: token ids with their mask, and by how much log-probabilities are off."""

    base: nn.Module | None = None
    """What the model is with its adapter off."""
    batches: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    off: list[bool] = field(default_factory=list)
    """Whether the adapter was off."""

    def compare(self, inner: Any, ids: Tensor, mask: Tensor, keep: int, given: Tensor) -> None:
        """What a trainer takes for log-probabilities with the model's own, each row alone and whole."""
        off = any(isinstance(m, BaseTunerLayer) and m.disable_adapters for m in inner.modules())
        self.batches.append((ids, mask, keep))
        self.off.append(off)
        training, model = inner.training, inner if self.base is None or not off else self.base
        inner.eval()
        for row in range(len(ids)):
            real, answer = mask[row].bool(), mask[row, -keep:].bool()
            with torch.no_grad():
                own: Any = model(input_ids=ids[row][real][None], use_cache=False)
            logprobs = own.logits[0].float().log_softmax(-1)[:-1].gather(-1, ids[row][real][1:, None])[:, 0]
            wanted = logprobs[-int(answer.sum()) :]
            self.errors.append(float((given[row][answer].detach() - wanted).abs().max()))
        inner.train(training)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    seen, compute = Watched(), AnswersTrainer._get_per_token_logps_and_entropies

    def spy(self: AnswersTrainer, model: Any, ids: Any, mask: Any, keep: int, *rest: Any, **further: Any) -> Any:
        found = compute(self, model, ids, mask, keep, *rest, **further)
        seen.compare(self.accelerator.unwrap_model(model), ids, mask, keep, found[0])
        return found

    monkeypatch.setattr(AnswersTrainer, "_get_per_token_logps_and_entropies", spy)
    return seen


def learn(model: Any, tokenizer: Any, folder: Path, training: Training = TRAINING, kl: float = 0.0) -> Reinforced:
    goal = replace(GOAL, kl=kl)
    return reinforce(model, tokenizer, ROWS, training, goal, GRPO, seed=0, folder=folder)


# --- Families, those with reasoning templates among them


@pytest.mark.parametrize("name", AVAILABLE)
def test_the_tokens_that_were_drawn_are_trained_on_with_the_model_s_own_log_probabilities(
    name: str, watched: Watched, tmp_path: Path
) -> None:
    model, raw = make_family(name)
    tokenizer = plain(name, raw)
    with stripping(with_adapter(model, TRAINING, 0)) as tuned:
        result = learn(tuned, tokenizer, tmp_path)
    assert watched.errors and max(watched.errors) < 2e-3
    prompts = {tuple(answer_prompt(tokenizer, row[:-1])) for row in ROWS}
    lengths = result.rollouts.loc[result.rollouts["phase"] == TRAIN, "n_tokens"]
    ids, mask, keep = watched.batches[0]
    found = [(tuple(i[:-keep][m[:-keep] == 1].tolist()), int(m[-keep:].sum())) for i, m in zip(ids, mask, strict=True)]
    assert {prompt for prompt, _ in found} == prompts, (
        "what sampling continues, with an empty thought where there is one"
    )
    assert sorted(length for _, length in found) == sorted(lengths)


@pytest.mark.parametrize("name", THINKING)
def test_a_thought_is_trained_on_and_the_answer_after_it_is_graded(
    name: str, watched: Watched, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, tokenizer = make_family(name)[0], with_template(family_tokenizer(name), enable_thinking=True)
    script = tokenizer.encode(THINKING[name], add_special_tokens=False)
    silent = tokenizer.encode("Hm, well. So", add_special_tokens=False)  # a thought that never ends

    def draw(_: Rollouts, prompts: Sequence[Any], *_rest: Any) -> list[list[int]]:
        return [script if number % 2 == 0 else silent for number in range(len(prompts))]

    monkeypatch.setattr(Rollouts, "draw", draw)
    with stripping(with_adapter(model, TRAINING, 0)) as tuned:
        result = reinforce(
            tuned, tokenizer, ROWS, TRAINING, GOAL, replace(GRPO, max_new_tokens=99), seed=0, folder=tmp_path
        )
    assert max(watched.errors) < 2e-3
    ids, mask, keep = watched.batches[0]
    trained = {tuple(i[-keep:][m[-keep:] == 1].tolist()) for i, m in zip(ids, mask, strict=True)}
    assert trained == {tuple(script), tuple(silent)}
    ended = result.rollouts[result.rollouts["ended"]]
    assert set(ended["answer"]) == {"Try."} and set(ended["reward"]) == {0.25}, "the thought is not graded"


# --- Adapters that replace whole modules, or train single tokens

WHOLE = [kind for kind in KINDS if kind.startswith("saved")]


@pytest.mark.parametrize("kind", [*WHOLE, "embeddings tied", "token indices tied"])
def test_all_that_an_adapter_has_is_trained_and_the_divergence_is_from_the_base(
    kind: str, watched: Watched, tmp_path: Path
) -> None:
    base = base_model(kind)
    before, watched.base = copied_state(base), base_model(kind)
    tuned = peft.get_peft_model(base, KINDS[kind]())
    fresh = {name: p.detach().clone() for name, p in tuned.named_parameters() if p.requires_grad}
    assert kind not in WHOLE or any("modules_to_save" in name for name in fresh)
    training = replace(TRAINING, steps=3, checkpoints=(3,))
    with stripping(tuned):
        result = learn(tuned, make_tokenizer(), tmp_path, training, kl=0.1)
        own = logits(tuned)
        still = [name for name, p in tuned.named_parameters() if name in fresh and torch.equal(p, fresh[name])]
        assert not still, still
    assert watched.errors and max(watched.errors) < 2e-3
    assert watched.off.count(True) == watched.off.count(False) == 3
    assert result.steps["kl"][0] == pytest.approx(0, abs=1e-6) and result.steps["kl"][2] > 1e-4
    assert same_state(before, copied_state(base))
    assert not torch.allclose(logits(base), own, atol=1e-2)
    again = load_adapter(base_model(kind), tmp_path / "checkpoint-3")
    assert torch.allclose(logits(again), own, atol=1e-5)


def test_an_adapter_on_the_unembedding_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    for make in (
        lambda: with_adapter(base_model(), replace(TRAINING, target_modules=("q_proj", "lm_head")), 0),
        lambda: tuned_model("head tied"),
    ):
        with pytest.raises(InputError, match="modules_to_save"):
            learn(make(), tokenizer, tmp_path)
        with pytest.raises(InputError, match="lm_head"):
            fine_tune(make(), tokenizer, ROWS, replace(TRAINING, method="lora"), seed=0, folder=tmp_path)
    assert not any(tmp_path.iterdir())
