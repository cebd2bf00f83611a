"""One fine-tuning run with a mitigation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerCallback

from persona_probe.config import Training
from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError
from persona_probe.finetune.sft import Fitted, fine_tune
from persona_probe.finetune.trainer import Inputs, Residuals
from persona_probe.mitigate.mitigation import MitigatedFit, MitigatedRun, Mitigation, MitigationInputs
from persona_probe.models.adapters import is_adapted


def train_mitigated(
    tuned: nn.Module,
    inputs: MitigationInputs,
    rows: Sequence[Conversation],
    training: Training,
    mitigation: Mitigation,
    *,
    seed: int,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    progress: str | None = None,
) -> MitigatedFit:
    """Fine-tune `tuned` (what `with_adapter` or `load_adapter` gives) on `rows`, with the mitigation.

    Checkpoints go to `folder` as `fine_tune` writes them, a correction's to `folder/corrective`. What a mitigation
    does at inference is not in the weights: evaluate inside `with mitigation.at_evaluation(tuned, inputs):`.

    Args:
        callbacks: such as a `FeatureMonitor`; a correction after the run is a second run to them.

    Raises:
        InputError: the mitigation lacks an input or an adapter to switch off, or bad rows.
        TrainingDiverged: the loss became NaN or infinite.
    """
    mitigation.check(inputs)
    if mitigation.needs_base and not is_adapted(tuned):
        raise InputError(
            f"{mitigation.name} compares with the base by switching the adapter off, and full fine-tuning has none: "
            "take training.method 'lora'"
        )
    settings = mitigation.training(training)
    run = MitigatedRun(tuned, inputs, settings, seed)
    training_rows, watchers = mitigation.rows(rows, run), [*mitigation.callbacks(run), *callbacks]
    with mitigation.forwards(tuned, inputs):
        fitted = fine_tune(
            tuned,
            inputs.tokenizer,
            training_rows,
            settings,
            seed=seed,
            folder=folder,
            callbacks=watchers,
            progress=progress,
            extra=MitigationLoss(mitigation, run),
        )
    return _joined(run, fitted, mitigation.after(run, folder, callbacks, progress))


def _joined(run: MitigatedRun, fitted: Fitted, later: Fitted | None) -> MitigatedFit:
    return MitigatedFit(
        losses=fitted.losses + (later.losses if later else []),
        answer_tokens=fitted.answer_tokens,
        rows=fitted.rows + (later.rows if later else 0),
        penalties=run.penalties,
        corrected=run.corrected,
        readings=run.readings,
    )


@dataclass(frozen=True, eq=False)
class MitigationLoss:
    """A mitigation, as the trainer asks it (`finetune.extra.ExtraLoss`)."""

    mitigation: Mitigation
    run: MitigatedRun

    @property
    def layer(self) -> int | None:
        """The layer whose residuals the penalty wants."""
        return self.mitigation.tapped(self.run.inputs)

    @property
    def rows(self) -> Sequence[Conversation]:
        """Rows for steps that swap their batch."""
        return self.mitigation.extra_rows(self.run.inputs)

    def swaps(self, step: int) -> bool:
        """Whether this step takes another batch; noted where it does."""
        swapped = self.mitigation.corrects(self.run)
        if swapped:
            self.run.corrected.append(step + 1)
        return swapped

    def penalty(self, step: int, inputs: Inputs, resid: Residuals | None) -> Float[Tensor, ""] | None:
        """The extra loss of a step, noted."""
        extra = self.mitigation.penalty(self.run, step, inputs, resid)
        if extra is not None:
            self.run.penalties.append(float(extra.detach()))
        return extra
