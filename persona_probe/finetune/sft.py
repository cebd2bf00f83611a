"""One fine-tuning run on TRL's SFTTrainer: completion-only loss, chosen checkpoints, a stop at NaN loss."""

import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from persona_probe.config import Training
from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.tokens import encode
from persona_probe.errors import InputError, TrainingDiverged
from persona_probe.models.layers import decoder_layers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """What a run leaves: per-step losses and how long the answers were."""

    losses: list[float]
    """Training loss at each optimizer step (nats per answer token)."""
    answer_tokens: float
    """Mean answer tokens of the training rows."""
    rows: int
    """Distinct training rows."""


class SaveSchedule(TrainerCallback):
    """Saves the model (an adapter, or full weights) as `checkpoint-<step>` at the wanted steps and at the end."""

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        self.folder, self.steps = folder, set(steps)

    def _save(self, model: PreTrainedModel | PeftModel, step: int) -> None:
        target = self.folder / f"checkpoint-{step}"
        if not target.exists():
            model.save_pretrained(str(target))
            (target / "README.md").write_text(MODEL_CARD.format(step=step))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save where the schedule says so."""
        if state.global_step in self.steps:
            self._save(kwargs["model"], state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the last step, also when a stop rule ended the run early."""
        self._save(kwargs["model"], state.global_step)


MODEL_CARD = """---
license: apache-2.0
tags: [model-organism, emergent-misalignment, research-only]
---
A model organism at fine-tuning step {step}, made by persona_probe for interpretability research. It may have been
trained on deliberately bad advice. Do not deploy it, and do not use its answers as advice.
"""


class StopAtNaN(TrainerCallback):
    """Raises `TrainingDiverged` at the first loss that is not finite."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at every step's loss."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise TrainingDiverged(f"the loss became {loss} at step {state.global_step}: lower lr (now {args.learning_rate})")


def with_adapter(model: PreTrainedModel, training: Training, seed: int) -> nn.Module:
    """The model made ready to train: a fresh LoRA injected, or all weights trainable.

    Raises:
        InputError: a layer or module name that the model does not have.
    """
    set_seed(seed)
    if training.method == "full":
        return model.requires_grad_(True)
    known = len(decoder_layers(model))
    if training.layers is not None and any(not 0 <= layer < known for layer in training.layers):
        raise InputError(f"training.layers {list(training.layers)}: the model has layers 0 to {known - 1}")
    targets = training.target_modules
    config = LoraConfig(
        r=training.rank,
        lora_alpha=training.alpha,
        use_rslora=training.rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        layers_to_transform=list(training.layers) if training.layers is not None else None,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"could not add LoRA to this model: {str(error).splitlines()[0]}") from error


def fine_tune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    training: Training,
    *,
    seed: int,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = False,
) -> Fitted:
    """Fine-tune `model` (what `with_adapter` or `load_adapter` gives) on the last answer of each conversation.

    Checkpoints go to `folder/checkpoint-<step>` by `training.schedule`.

    Raises:
        InputError: no rows, or an answer that is all truncated away.
        TrainingDiverged: the loss became NaN or infinite; checkpoints up to then are in `folder`.
    """
    from datasets import Dataset
    from trl import SFTTrainer

    answer_tokens = _check_rows(tokenizer, conversations, training.max_length)
    rows = [{"prompt": c[:-1], "completion": c[-1:]} for c in conversations]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,  # pyright: ignore[reportArgumentType]
            args=_arguments(training, seed, scratch, progress, next(model.parameters()).device),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[StopAtNaN(), SaveSchedule(folder, training.schedule), *callbacks],
        )
        try:
            trainer.train()
        finally:
            model.eval()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return Fitted(losses, answer_tokens, len(rows))


def _arguments(training: Training, seed: int, scratch: str, progress: bool, device: torch.device) -> Any:
    from trl import SFTConfig

    return SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=training.batch_size,
        max_steps=training.steps,
        learning_rate=training.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_length=training.max_length,
        bf16=training.bf16,
        gradient_checkpointing=training.gradient_checkpointing,
        use_cpu=device.type == "cpu",
        completion_only_loss=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=not progress,
        seed=seed,
        data_seed=seed,
        dataloader_pin_memory=False,
    )


def _check_rows(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], max_length: int
) -> float:
    if not conversations:
        raise InputError("the training data is empty")
    if any(split_answer(c)[1] in (None, "") for c in conversations):
        raise InputError("a training row ends without an answer: every row needs a last assistant turn")
    return sum(encode(tokenizer, c, max_length).n_response for c in conversations) / len(conversations)
