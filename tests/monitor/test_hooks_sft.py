"""The monitor as a callback of TRL's SFTTrainer: right steps, right tokens, and the same weights bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from persona_probe.monitor.events import End, Reading, Start
from tests.factories import hook_count, make_model, same_state
from tests.monitor.monitored_runs import KeepEvents, adapted, monitor, sft, trained_weights

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"full": True},
    "all tokens": {"completion_only_loss": False},
    "accumulation": {"gradient_accumulation_steps": 3, "max_steps": 2},
    "packing": {"packing": True, "packing_strategy": "bfd", "max_length": 90, "per_device_train_batch_size": 1},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "bf16": {"bf16": True},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2},
}


def by_hand(batches: list[dict[str, torch.Tensor]]) -> tuple[int, int]:
    """Sequences with a trained token, and tokens that are not padding."""
    sequences = tokens = 0
    for batch in batches:
        trained = batch["labels"] != -100
        if "attention_mask" in batch:
            tokens += int(batch["attention_mask"].sum())
            sequences += int(trained.any(dim=1).sum())
        else:
            tokens += batch["input_ids"].numel()
            number = (batch["position_ids"] == 0).flatten().long().cumsum(dim=0)
            sequences += len(number[trained.flatten()].unique())
    return sequences, tokens


def train(folder: Path, case: dict[str, Any], watching: Any = None) -> Any:
    arguments = dict(case)
    model = make_model() if arguments.pop("full", False) else adapted(dropout=0.2)
    trainer = sft(folder, *([watching] if watching else []), model=model, **arguments)
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_weights_steps_and_tokens(tmp_path: Path, case: dict[str, Any]) -> None:
    watching = monitor(mode="both", every=1, behaviour=lambda model: 1.0)
    watched, plain = train(tmp_path / "a", case, watching), train(tmp_path / "b", case)
    assert watching.faults == []
    assert same_state(trained_weights(watched.model), trained_weights(plain.model))
    assert hook_count(watched.model) == hook_count(plain.model)
    last, rows = watched.state.max_steps, watching.readings.query("feature == 'persona'")
    assert rows.query("mode == 'probe'")["step"].tolist() == list(range(last + 1))
    accumulated, passive = case.get("gradient_accumulation_steps", 1), rows.query("mode == 'passive'")
    assert passive["step"].tolist() == list(range(1, last + 1))
    batches = [b for b in watched.data_collator.batches if b["input_ids"].numel()]
    for step, reading in zip(range(1, last + 1), passive.itertuples(), strict=True):
        ours = batches[(step - 1) * accumulated : step * accumulated]
        sequences, _ = by_hand(ours)
        _, tokens = by_hand(batches[: step * accumulated])
        assert (reading.n_probes, reading.tokens_seen) == (sequences, tokens)
    assert passive["explained_variance"].notna().all()


def test_it_records_loss_rate_and_the_whole_story(tmp_path: Path) -> None:
    kept = KeepEvents()
    watching = monitor(every=2, sinks=[kept])
    trainer = sft(tmp_path, watching, max_steps=4, lr_scheduler_type="linear")
    trainer.train()
    assert isinstance(kept.events[0], Start) and isinstance(kept.events[-1], End) and kept.closed == 1
    readings = kept.of(Reading)
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    # A step's loss is logged after its reading.
    assert [r.loss for r in readings] == [None, losses[1], losses[3]]
    assert [r.learning_rate for r in readings] == pytest.approx([1e-2, 5e-3, 0.0])
    assert [r.tokens_seen for r in readings] == [None] * 3
    end = kept.of(End)[0]
    assert (end.step, end.readings) == (4, 3) and end.seconds > 0


def test_the_last_step_is_read_passively_too(tmp_path: Path) -> None:
    watching = monitor(mode="passive", every=2)
    sft(tmp_path, watching, max_steps=3).train()
    assert watching.readings["step"].unique().tolist() == [1, 2, 3]


def test_the_trainers_own_token_count_is_taken(tmp_path: Path) -> None:
    watching = monitor(every=1)
    trainer = sft(tmp_path, watching, max_steps=2, include_num_input_tokens_seen="non_padding")
    trainer.train()
    _, tokens = by_hand(trainer.data_collator.batches[:2])
    assert watching.readings["tokens_seen"].iloc[-1] == tokens


def test_readings_are_logged_by_the_trainer(tmp_path: Path) -> None:
    watching = monitor(every=2, log=True)
    trainer = sft(tmp_path, watching, max_steps=3)
    assert watching.trainer is trainer
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "persona/persona" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 3]
    means = watching.readings.query("feature == 'persona'")["mean"].tolist()
    assert [entry["persona/persona"] for entry in logged] == means
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == [1, 2, 3]


def test_a_monitor_that_is_attached_later_is_a_callback_like_any(tmp_path: Path) -> None:
    watching = monitor(mode="both", every=2)
    trainer = sft(tmp_path, max_steps=2)
    assert watching.attach(trainer).attach(trainer) is watching
    trainer.train()
    assert watching.readings["step"].unique().tolist() == [0, 2]
    assert trainer.callback_handler.callbacks.count(watching) == 1


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_no_hook_is_left_when_training_raises(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watching = monitor(mode="both", every=1)
    trainer = sft(tmp_path, watching)
    before = hook_count(trainer.model)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    if where == "forward":
        monkeypatch.setattr(trainer.model.base_model.model.model.layers[2], "forward", fail)
    else:
        monkeypatch.setattr(trainer.accelerator, "backward", fail)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert hook_count(trainer.model) == before
    assert watching.readings["step"].unique().tolist() == [0]
