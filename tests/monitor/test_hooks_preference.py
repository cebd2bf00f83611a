"""The monitor as a callback of TRL's DPOTrainer and GRPOTrainer."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.factories import hook_count, make_tokenizer, same_state
from tests.monitor.monitored_runs import QUIET, ROWS, Recorded, adapted, monitor, trained_weights

ARGUMENTS: dict[str, Any] = {**QUIET, "learning_rate": 1e-2, "bf16": False, "gradient_checkpointing": False}


def dpo(folder: Path, *callbacks: Any) -> Any:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    config = DPOConfig(output_dir=str(folder), per_device_train_batch_size=2, max_steps=3, **ARGUMENTS)
    rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " No."} for r in ROWS]
    trainer = DPOTrainer(
        adapted(),  # pyright: ignore[reportArgumentType]
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        callbacks=list(callbacks),
    )
    trainer.data_collator = Recorded(trainer.data_collator)
    return trainer


def lengths(completions: list[str], **_: Any) -> list[float | None]:
    return [float(len(set(c))) for c in completions]


def grpo(folder: Path, *callbacks: Any) -> Any:
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        max_steps=2,
        **ARGUMENTS,
    )
    return GRPOTrainer(
        adapted(),  # pyright: ignore[reportArgumentType]
        reward_funcs=lengths,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": r["prompt"]} for r in ROWS]),
        processing_class=make_tokenizer(),
        callbacks=list(callbacks),
    )


def test_dpo_reads_chosen_and_rejected_answers(tmp_path: Path) -> None:
    watching = monitor(mode="both", every=1)
    watched = dpo(tmp_path, watching)
    before = hook_count(watched.model)
    watched.train()
    plain = dpo(tmp_path)  # making a trainer sets the seed
    plain.train()
    assert watching.faults == [] and hook_count(watched.model) == before
    assert same_state(trained_weights(watched.model), trained_weights(plain.model))
    rows = watching.readings.query("feature == 'persona'")
    assert rows.query("mode == 'probe'")["step"].tolist() == [0, 1, 2, 3]
    passive, seen = rows.query("mode == 'passive'"), 0
    for reading, batch in zip(passive.itertuples(), watched.data_collator.batches, strict=False):
        # The reference pass (adapters off, no gradients) sees the same batch and does not count.
        seen += int(batch["attention_mask"].sum())
        assert (reading.n_probes, reading.tokens_seen) == (4, seen)
    assert passive["step"].tolist() == [1, 2, 3]


def test_grpo_reads_the_completions_it_trains_on(tmp_path: Path) -> None:
    watching = monitor(mode="both", every=1)
    watched = grpo(tmp_path, watching)
    trained: list[Any] = []
    loss = watched._compute_loss

    def spy(model: Any, inputs: Any) -> Any:
        trained.append({name: inputs[name].clone() for name in ("prompt_mask", "completion_mask")})
        return loss(model, inputs)

    watched._compute_loss = spy
    watched.train()
    plain = grpo(tmp_path)
    plain.train()
    assert watching.faults == []
    assert same_state(trained_weights(watched.model), trained_weights(plain.model))
    rows = watching.readings.query("feature == 'persona'")
    assert rows.query("mode == 'probe'")["step"].tolist() == [0, 1, 2]
    passive, seen = rows.query("mode == 'passive'"), 0
    assert passive["step"].tolist() == [1, 2] and len(trained) == 2
    for reading, inputs in zip(passive.itertuples(), trained, strict=True):
        seen += int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        assert reading.tokens_seen == seen
        assert reading.n_probes == int(inputs["completion_mask"].any(dim=1).sum())


@pytest.mark.parametrize("make", [dpo, grpo])
def test_probes_alone_leave_no_hook_in_between(tmp_path: Path, make: Any) -> None:
    counts: list[int] = []
    watching = monitor(every=1, on_reading=lambda step, snapshot, model: counts.append(hook_count(model)))
    trainer = make(tmp_path, watching)
    before = hook_count(trainer.model)
    trainer.train()
    assert counts == [before] * len(counts) and len(counts) >= 3
