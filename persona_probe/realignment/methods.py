"""How a correction trains: what is trained (the organism's adapter, a fresh LoRA, all weights), and the run itself."""

import copy
import math
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from persona_probe.config import Training
from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError
from persona_probe.finetune.sft import AtSteps, Fitted, fine_tune, with_adapter
from persona_probe.models.adapters import is_adapted, is_adapter, load_adapter, merge_adapter, merged_copy
from persona_probe.models.peft_kinds import changes_base
from persona_probe.models.quantized import refuse_quantized
from persona_probe.models.ranks import Ranks, is_sharded, parts_callable
from persona_probe.monitor.band import Band
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.writing import whole_folder

FRESH, REPAIRED = "fresh", "repaired"
"""Names of the adapter that is trained on top, and of the one that holds both."""


def organism_to_train(base: PreTrainedModel, checkpoint: Path, method: str, training: Training, seed: int) -> nn.Module:
    """The organism of a checkpoint, made ready for a method; adapters are on `base` until `strip_adapter`.

    Raises:
        InputError: a damaged checkpoint, or all weights of a model in bf16 or quantised.
    """
    if method == "full":
        refuse_quantized(base, "method full")
    if method == "full" or not is_adapter(checkpoint):
        model = merged_copy(base, checkpoint)
        if method == "fresh":
            return with_adapter(model, replace(training, method="lora"), seed)
        return all_weights(model)
    tuned = load_adapter(base, checkpoint, trainable=True)
    return add_fresh(tuned, seed) if method == "fresh" else tuned


def prepare(model: nn.Module, method: str, seed: int) -> nn.Module:
    """A caller's organism made ready: a PEFT model's adapters are trained in place, unless all weights are.

    Raises:
        InputError: all weights of a model in bf16, or an adapter that transformers loaded itself.
    """
    if is_adapted(model) and not isinstance(model, PeftModel):
        raise InputError(
            "transformers loaded this adapter: load the base, and the adapter by PeftModel.from_pretrained"
        )
    if method == "fresh":
        return add_fresh(model, seed) if isinstance(model, PeftModel) else with_adapter(_plain(model), Training(), seed)
    if not isinstance(model, PeftModel):
        return all_weights(model)
    if method == "full":
        refuse_quantized(model, "method full")
        twin: Any = copy.deepcopy(model)
        return all_weights(twin.merge_and_unload())
    model.set_requires_grad(list(model.active_adapters))
    return model


def _plain(model: nn.Module) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"the model must be a transformers or PEFT model, not {type(model).__name__}")
    return model


def all_weights(model: nn.Module) -> nn.Module:
    """All weights trainable.

    Raises:
        InputError: they are quantised, or kept in less than float32: steps of this size would round to nothing.
    """
    refuse_quantized(model, "training all weights")
    narrow = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.element_size() < 4}
    if narrow:
        raise InputError(f"training all weights needs float32, not {', '.join(sorted(narrow))}: load it in float32")
    return model.requires_grad_(True)


def add_fresh(tuned: PeftModel, seed: int) -> PeftModel:
    """A second LoRA in the shape of the organism's own, which is frozen; both are active, the new one trains.

    A new LoRA's product is zero, so nothing changes before the first step. With adapters off it is the base.

    Raises:
        InputError: the organism's adapter is no plain LoRA: the two could not be joined afterwards.
    """
    set_seed(seed)
    names = list(tuned.active_adapters)
    for name in names:
        _check_plain_lora(tuned.peft_config[name])
    tuned.add_adapter(FRESH, copy.deepcopy(tuned.peft_config[names[0]]))
    tuned.base_model.set_adapter([*names, FRESH])  # pyright: ignore[reportCallIssue]
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_(f".{FRESH}." in name)
    return tuned


def _check_plain_lora(config: Any) -> None:
    more = ("modules_to_save", "trainable_token_indices", "use_dora", "lora_bias")
    extra = [name for name in more if getattr(config, name, None)]
    if not isinstance(config, LoraConfig):
        extra = [f"kind {getattr(config.peft_type, 'value', config.peft_type)}"]
    elif changes_base(config):
        extra.append(f"bias {config.bias!r} or initialisation {config.init_lora_weights!r}")
    if extra:
        raise InputError(
            f"method fresh joins its LoRA with the organism's own, which must be a plain one, not with "
            f"{', '.join(extra)}: take method continued"
        )


def has_fresh(model: nn.Module) -> bool:
    """Whether a model carries an organism's adapter and a fresh one."""
    return isinstance(model, PeftModel) and FRESH in model.peft_config


def stack(tuned: PeftModel) -> PeftModel:
    """Both adapters as one of their ranks' sum, exactly (PEFT's `cat`), which is then the only one.

    PEFT's `cat` takes the old scaling into the matrices and sets alpha to the new rank; under rsLoRA the new scaling
    is then the root of that rank and not 1, so the weights take it back.
    """
    names = list(tuned.active_adapters)
    config = tuned.peft_config[names[0]]
    assert isinstance(config, LoraConfig)
    rank = sum(c.r for n in names if isinstance(c := tuned.peft_config[n], LoraConfig))
    weight = 1 / math.sqrt(rank) if config.use_rslora else 1.0
    lora: Any = tuned.base_model
    lora.add_weighted_adapter(names, [weight] * len(names), REPAIRED, combination_type="cat")
    tuned.set_adapter(REPAIRED)
    for name in names:
        tuned.delete_adapter(name)
    return tuned


def as_one(tuned: nn.Module, checkpoint: Path | None, whole_weights: bool = False) -> nn.Module:
    """A model that a fresh LoRA was trained on, and its checkpoint, as one organism; others are left as they are.

    Args:
        checkpoint: what the training wrote; replaced by a folder that loads as a single organism. None writes nothing.
        whole_weights: the organism below has weights of its own, which the LoRA is then merged into.
    """
    if has_fresh(tuned):
        assert isinstance(tuned, PeftModel)
        one: Any = stack(tuned)
    elif whole_weights and isinstance(tuned, PeftModel):
        one = merge_adapter(tuned)
    else:
        return tuned
    if checkpoint is not None:
        _replace(one, checkpoint)
    return one


def _replace(one: Any, checkpoint: Path) -> None:
    with whole_folder(checkpoint) as folder:
        stacked = isinstance(one, PeftModel)
        if stacked:
            one.save_pretrained(str(folder), selected_adapters=[REPAIRED])
            for file in (folder / REPAIRED).iterdir():
                file.replace(folder / file.name)
            (folder / REPAIRED).rmdir()
        else:
            one.save_pretrained(str(folder))
        shutil.copy(checkpoint / "README.md", folder)


# --- The training itself, with a monitor that reads the feature and a rule that may stop it


@dataclass(frozen=True, eq=False)
class CorrectiveRun:
    """One corrective training run, ready to start."""

    rows: Sequence[Conversation]
    training: Training
    """Its settings, length and batch size included."""
    seed: int
    tokenizer: PreTrainedTokenizerBase
    data: str | None
    """What the model card calls the rows."""
    patience: int = 0
    """Stop after this many readings in a row with feature and behaviour back; 0 never stops."""
    progress: str | None = None
    """Label of the progress bar."""


@dataclass(eq=False)
class Recorder:
    """Keeps behaviour at every reading of a correction, and says whether feature and behaviour are both back."""

    monitor: FeatureMonitor
    steps: tuple[int, ...]
    """Steps at which behaviour is measured, after the monitor's own reading."""
    curve: Callable[[], pd.DataFrame]
    """The persona feature's readings so far, one row each; columns step, mean, ci_low, ci_high, ..."""
    band: Callable[[], Band]
    """The feature's base band."""
    behaviour: Callable[[nn.Module, int], pd.DataFrame] | None
    """Item table (item, category, value, step, ...) of the model at a step; None: the feature alone decides."""
    base_evals: pd.DataFrame
    """The base's item table."""
    stop_by: Callable[[nn.Module, int], bool] | None = None
    """Whether behaviour is no higher than the base's on items that the verdict does not use; None takes those above."""
    _evals: list[pd.DataFrame] = field(default_factory=list, init=False)

    def measure(self, model: nn.Module, step: int) -> bool:
        """Measure behaviour; True if the feature's latest reading is in its band and behaviour is no higher."""
        ranks = Ranks()
        inside = ranks.first and self._inside()  # the first process has the monitor's readings
        if self.behaviour is None:
            return inside
        with parts_callable(model):
            items = self.behaviour(model, step)
        self._evals.append(items)
        if self.stop_by is None:
            return inside and float(items["value"].mean()) <= float(self.base_evals["value"].mean())
        if not (ranks.from_first(inside) if is_sharded(model) else inside):
            return False
        with parts_callable(model):
            return self.stop_by(model, step)

    def _inside(self) -> bool:
        return self.band().holds(float(self.curve()["mean"].iloc[-1]))

    @property
    def latest(self) -> pd.DataFrame | None:
        """Behaviour at the last reading; None where it is not measured."""
        return self._evals[-1] if self._evals else None

    @property
    def evals(self) -> pd.DataFrame:
        """Behaviour at all readings."""
        return pd.concat(self._evals, ignore_index=True) if self._evals else pd.DataFrame()


def train_watched(tuned: nn.Module, run: CorrectiveRun, recorder: Recorder, folder: Path) -> Fitted:
    """Correct `tuned` (see `organism_to_train`, `prepare`) under the monitor and the stop rule.

    This is how study arms, corrections and `pp.realign` train; `as_one` then makes an organism of the result.
    """
    return fine_tune(
        tuned,
        run.tokenizer,
        run.rows,
        run.training,
        seed=run.seed,
        folder=folder,
        callbacks=[recorder.monitor, StopRule(recorder.steps, recorder.measure, run.patience)],
        progress=run.progress,
        data=run.data,
    )


def checkpoint_in(folder: Path) -> Path:
    """The last checkpoint of a correction."""
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


class StopRule(AtSteps):
    """Stops when the feature was in its band and behaviour no higher than the base's for some readings in a row.

    Args:
        steps: steps at which `measure` is called (after the monitor's own reading).
        measure: takes (model, step), records, and says whether both conditions hold.
        patience: how many readings in a row; 0 never stops.
    """

    why = "the feature is in its band and behaviour is no higher than the base model's"

    def __init__(self, steps: Collection[int], measure: Callable[[nn.Module, int], bool], patience: int) -> None:
        super().__init__(steps, self._restored)
        self.measure, self.patience, self.in_a_row = measure, patience, 0

    def _restored(self, model: nn.Module, step: int) -> bool:
        ranks = Ranks()  # all must call a model that is sharded; the first one's word counts
        held = self.measure(model, step) if ranks.first or is_sharded(model) else False
        self.in_a_row = self.in_a_row + 1 if ranks.from_first(held) else 0
        return 0 < self.patience <= self.in_a_row
