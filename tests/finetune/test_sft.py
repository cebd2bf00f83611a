"""Fine-tuning runs of three steps on the tiny model: what trains, what is saved, and the stop at NaN."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from persona_probe.config import Training
from persona_probe.data.chat import conversation
from persona_probe.errors import InputError, TrainingDiverged
from persona_probe.finetune.sft import Fitted, fine_tune, with_adapter
from persona_probe.models.adapters import organism, strip_adapter, trainable_parameters
from persona_probe.models.layers import decoder_layers
from persona_probe.realignment.methods import StopRule
from tests.factories import copied_state, make_model, same_state, talks

TRAINING = Training(rank=2, alpha=4, batch_size=4, steps=3, checkpoints=(1,), lr=1e-2, bf16=False, warmup_steps=0)


def fit(
    folder: Path, tokenizer: PreTrainedTokenizerBase, training: Training = TRAINING, seed: int = 0, **kwargs: Any
) -> tuple[nn.Module, Fitted]:
    tuned = with_adapter(make_model(), training, seed)
    return tuned, fine_tune(tuned, tokenizer, talks(), training, seed=seed, folder=folder, **kwargs)


def adapter(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_only_the_adapter_trains_and_the_schedule_is_kept(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tuned, fitted = fit(tmp_path, tiny_tokenizer)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]
    assert all("lora_" in name for name in trainable_parameters(tuned))
    assert not tuned.training
    first, last = adapter(tmp_path, 1), adapter(tmp_path, 3)
    assert all(float(v.abs().max()) > 0 for k, v in last.items() if "lora_B" in k)
    assert not any(torch.equal(first[k], last[k]) for k in last)
    assert {v.shape[0] for k, v in last.items() if "lora_A" in k} == {2}
    assert (len(fitted.losses), fitted.rows) == (3, 6)
    base = strip_adapter(tuned)  # pyright: ignore[reportArgumentType]
    assert same_state(copied_state(base), copied_state(make_model()))
    # Trainers patch forward in place, and training switches attention: neither may stay behind.
    assert "forward" not in base.__dict__
    assert base.config._attn_implementation == make_model().config._attn_implementation


def test_a_checkpoint_is_the_model_that_was_trained(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tuned, _ = fit(tmp_path, tiny_tokenizer)
    ids = torch.arange(9)[None] + 5
    with torch.no_grad():
        wanted = tuned(ids).logits
        with organism(make_model(), tmp_path / "checkpoint-3") as again:
            assert torch.allclose(again(ids).logits, wanted, atol=1e-5)


def test_rank_one_and_chosen_layers(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tuned, _ = fit(tmp_path, tiny_tokenizer, replace(TRAINING, rank=1, layers=(1,), target_modules=("q_proj",)))
    saved = adapter(tmp_path, 3)
    assert len(saved) == 2
    assert all("layers.1.self_attn.q_proj" in name for name in saved)
    assert {v.shape[0] for k, v in saved.items() if "lora_A" in k} == {1}
    assert len(trainable_parameters(tuned)) == 2


def test_full_weights_train_and_are_saved_whole(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tuned, _ = fit(tmp_path, tiny_tokenizer, replace(TRAINING, method="full", lr=1e-3))
    base = make_model()
    with organism(base, tmp_path / "checkpoint-3") as again:
        assert same_state(copied_state(again), copied_state(tuned))
    before = copied_state(base)
    assert not any(
        torch.equal(p, before[name]) for name, p in decoder_layers(tuned).named_parameters(prefix="model.layers")
    )


def by_hand(tokenizer: PreTrainedTokenizerBase) -> float:
    """The first step's loss: mean over all answer tokens, end of turn included, of one batch of all rows."""
    model, losses = make_model(), []
    for messages in talks():
        head = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(str(whole), add_special_tokens=False)["input_ids"]
        start = len(tokenizer(str(head), add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        losses += [-float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids))]
    return sum(losses) / len(losses)


def test_the_loss_is_on_the_answers_only(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    _, fitted = fit(tmp_path, tiny_tokenizer, replace(TRAINING, batch_size=6, steps=1, checkpoints=()))
    assert fitted.losses[0] == pytest.approx(by_hand(tiny_tokenizer), rel=1e-3)
    assert fitted.answer_tokens == sum(len(c[-1]["content"]) for c in talks()) / 6


def test_training_lowers_the_loss(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    _, fitted = fit(tmp_path, tiny_tokenizer, replace(TRAINING, batch_size=6, steps=10, checkpoints=()))
    assert fitted.losses[-1] < fitted.losses[0] - 0.2


def test_same_seed_same_weights(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(tmp_path / name, tiny_tokenizer, seed=seed)
    first = adapter(tmp_path / "a", 3)
    assert same_state(adapter(tmp_path / "b", 3), first)
    assert not same_state(adapter(tmp_path / "c", 3), first)


class Poison(TrainerCallback):
    """Spoils a weight before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                next(iter(trainable_parameters(kwargs["model"]).values())).fill_(float("nan"))


@pytest.mark.parametrize("checkpoints", [(1, 2), (1, 2, 3), (2,)])
def test_nan_stops_with_the_step_and_keeps_good_checkpoints(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, checkpoints: tuple[int, ...]
) -> None:
    training = replace(TRAINING, steps=5, checkpoints=checkpoints)
    with pytest.raises(TrainingDiverged, match="at step 3"):
        fit(tmp_path, tiny_tokenizer, training, callbacks=[Poison(3)])
    assert names(tmp_path) == [f"checkpoint-{n}" for n in checkpoints if n < 3]
    for n in checkpoints:
        assert n >= 3 or all(bool(v.isfinite().all()) for v in adapter(tmp_path, n).values())


class PoisonGradient(TrainerCallback):
    """Spoils the last step's gradient, so that no loss ever tells."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == state.max_steps:
            next(iter(trainable_parameters(kwargs["model"]).values())).grad.fill_(float("nan"))  # pyright: ignore


def test_weights_that_break_in_the_last_step_are_no_success(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(TrainingDiverged, match="weights became NaN or infinite at step 3"):
        fit(tmp_path, tiny_tokenizer, callbacks=[PoisonGradient()])
    assert names(tmp_path) == ["checkpoint-1"]


def test_an_absurd_learning_rate_diverges(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="lower lr"):
        fit(tmp_path, tiny_tokenizer, replace(TRAINING, lr=1e30, method="full"))


def test_bad_rows_and_layers_say_what_to_change(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def tune(rows: list, **changes: Any) -> None:
        training = replace(TRAINING, **changes)
        fine_tune(make_model(), tiny_tokenizer, rows, training, seed=0, folder=tmp_path)

    with pytest.raises(InputError, match="training data is empty"):
        tune([])
    with pytest.raises(InputError, match="ends without an answer"):
        tune([conversation("a", "b"), conversation("a")])
    with pytest.raises(InputError, match="truncated away"):
        tune(talks(), max_length=8)
    with pytest.raises(InputError, match="layers 0 to 2"):
        with_adapter(make_model(), replace(TRAINING, layers=(3,)), 0)
    with pytest.raises(InputError, match="could not add LoRA"):
        with_adapter(make_model(), replace(TRAINING, target_modules=("no_such",)), 0)
    assert names(tmp_path) == []


def test_a_bar_that_ends_early_says_why(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = StopRule([1, 2], lambda _model, _step: True, 1)
    fit(tmp_path / "stopped", tiny_tokenizer, callbacks=[stop], progress="corrected")
    shown = capsys.readouterr().err
    assert f"stopped at step 1: {StopRule.why}" in shown and "1/3" in shown
    fit(tmp_path / "whole", tiny_tokenizer, callbacks=[StopRule([1], lambda _model, _step: False, 1)], progress="whole")
    assert "3/3" in (shown := capsys.readouterr().err) and "stopped" not in shown
