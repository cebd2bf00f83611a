"""What watches every fine-tuning run: the checkpoint schedule, the stop at NaN, the progress bar."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from persona_probe.errors import InputError, TrainingDiverged
from persona_probe.finetune.model_card import ModelCard


class SaveSchedule(TrainerCallback):
    """Saves the model (an adapter, or full weights) as `checkpoint-<step>` at the wanted steps and at the end."""

    def __init__(self, folder: Path, steps: Sequence[int], card: ModelCard) -> None:
        self.folder, self.steps, self.card = folder, set(steps), card

    def _save(self, model: PreTrainedModel | PeftModel, step: int) -> None:
        target = self.folder / f"checkpoint-{step}"
        if target.exists():
            return
        # The loss of a step is logged after its save: weights that diverged are no checkpoint.
        if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
            raise TrainingDiverged(f"the weights became NaN or infinite at step {step}: lower lr")
        try:
            model.save_pretrained(str(target))
            (target / "README.md").write_text(self.card.text(step), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            first = str(error).splitlines()[0]
            raise InputError(f"could not write {target} ({first}): free space, or choose another --out") from error

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save where the schedule says so."""
        if state.global_step in self.steps:
            self._save(kwargs["model"], state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the last step, also when a stop rule ended the run early."""
        self._save(kwargs["model"], state.global_step)


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
            raise TrainingDiverged(
                f"the loss became {loss} at step {state.global_step}: lower lr (now {args.learning_rate})"
            )


class ProgressBar(TrainerCallback):
    """A tqdm bar of optimizer steps with the latest loss."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self.bar = tqdm(total=state.max_steps, desc=self.label)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Advance to the step just logged."""
        self.bar.update(state.global_step - self.bar.n)
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.2f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar, also after an error: what is said next then begins on its own line."""
        if self.bar is not None:
            self.bar.close()
