"""Save a checkpoint at an alarm."""

from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import nn
from transformers import PreTrainedModel

from persona_probe.errors import InputError
from persona_probe.files import words
from persona_probe.models.ranks import Ranks, is_sharded, unwrap
from persona_probe.monitor.actions.action import Action, ActionContext, folder_for
from persona_probe.monitor.events import Alarm
from persona_probe.writing import whole_folder


@dataclass(frozen=True, eq=False)
class SaveCheckpoint(Action):
    """Save a checkpoint at the alarm.

    In a trainer it is the trainer's checkpoint, with the optimizer. It is written after the step, so it includes what
    other actions did to the weights, and `save_total_limit` applies. With `folder`, in plain loops, and when the
    trainer does not save (before its first step, and once it stops) the weights are written at once, to
    `<folder>/alarm-step-<N>`: by `save_pretrained` if the model has it, else as `model.safetensors`.
    """

    folder: Path | str | None = None
    """Where the weights are written at once; None takes the monitor's folder, else the trainer's `output_dir`."""

    def _do(self, alarm: Alarm, context: ActionContext) -> None:
        if self.folder is None and context.control is not None and _trainer_will_save(context):
            context.control.should_save = True
            return
        save_weights(context.model, folder_for(self, self.folder, context) / f"alarm-step-{alarm.step}")


def _trainer_will_save(context: ActionContext) -> bool:
    """Whether the trainer is past its first step, which resets `should_save`, and not at its end, which ignores it.

    At its last step transformers' own flow callback has asked to stop before any other callback is called.
    """
    state, control = context.state, context.control
    stopped = control is not None and control.should_training_stop
    return state is None or (state.global_step > 0 and not stopped)


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write `folder` whole or not at all; an adapter where the model is a PEFT model. The first process writes.

    Raises:
        InputError: the weights are sharded over processes, or the folder cannot be written.
    """
    if is_sharded(model):
        raise InputError("the weights are sharded over processes: save them in a CallBack, or use a trainer")
    if not Ranks().first:
        return
    try:
        with whole_folder(folder, "choose another folder") as scratch:
            _write(unwrap(model), scratch)
    except SafetensorError as error:
        raise InputError(f"could not write {folder} ({words(error)}): choose another folder") from error


def _write(model: nn.Module, folder: Path) -> None:
    if isinstance(model, PreTrainedModel | PeftModel):
        model.save_pretrained(str(folder))
    else:
        save_model(model, str(folder / "model.safetensors"))
