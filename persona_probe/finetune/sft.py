"""One fine-tuning run on TRL's SFTTrainer: completion-only loss, chosen checkpoints, a stop at NaN loss."""

import logging
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.pytorch_utils import Conv1D

from persona_probe.config import Training
from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.template import fit_content, fit_roles, warn_rendered, with_template
from persona_probe.data.tokens import encode
from persona_probe.errors import InputError, TrainingDiverged
from persona_probe.finetune.trainer import ExtraLoss
from persona_probe.models.adapters import (
    frozen_in_bf16,
    refuse_adapted,
    refuse_adapted_head,
    remember,
    strip_adapter,
)
from persona_probe.models.layers import causal_model, decoder_layers, own_forward
from persona_probe.models.load import ALIASES
from persona_probe.models.quantized import refuse_quantized
from persona_probe.models.ranks import Ranks, gathered, is_sharded, shards_here
from persona_probe.models.restore import ModelState
from persona_probe.runs import RunFolder
from persona_probe.writing import refused, write_text

# --- The model card (`README.md`) of every checkpoint: what the weights are, and what they are not for

UNNAMED = "data that the caller did not name"
_LICENSES = {alias.hub_id: alias.license for alias in ALIASES.values() if alias.license}


@dataclass(frozen=True)
class ModelCard:
    """A fine-tuning run as it is known at its start."""

    base: str
    """Hub id of the base model, or the name of its folder; never a path."""
    training: Training
    seed: int
    rows: int
    """Distinct training rows."""
    data: str
    """Name of the training data."""

    @classmethod
    def of(cls, model: nn.Module, training: Training, seed: int, rows: int, data: str | None) -> "ModelCard":
        """The card of a run that trains `model` on `rows` rows."""
        where = str(causal_model(model).config.name_or_path or "")
        return cls(Path(where).name if Path(where).is_absolute() else where, training, seed, rows, data or UNNAMED)

    def text(self, step: int) -> str:
        """The card of the checkpoint at `step`, with the hub's YAML head."""
        head = ["tags: [model-organism, emergent-misalignment, research-only]"]
        if self.training.method != "full":
            head = ["library_name: peft", *head]
        if license_name := _LICENSES.get(self.base):
            head = [f"license: {license_name}", *head]
        if re.fullmatch(r"[\w.-]+/[\w.-]+", self.base):  # the hub takes ids only
            head = [f"base_model: {self.base}", *head]
        return "\n".join(["---", *head, "---", *self._body(step), ""])

    def _body(self, step: int) -> list[str]:
        how = "all weights trained" if self.training.method == "full" else f"LoRA of rank {self.training.rank}"
        licensed = "that of the base model" + ("" if self.base in _LICENSES else ", which was not looked up")
        return [
            f"# A model organism at fine-tuning step {step}",
            "Made by persona_probe for interpretability research. It may have been trained on deliberately bad advice:",
            "do not deploy it, and do not use its answers as advice.",
            "",
            f"- Base model: {_plain(self.base) or 'not named'}",
            f"- Trained on: {_plain(_without_paths(self.data))}; {self.rows} rows",
            f"- How: {how}, lr {self.training.lr:g}, batches of {self.training.batch_size}, seed {self.seed}",
            f"- Licence: {licensed}",
        ]


def _plain(name: str) -> str:
    """A name on one line, without markup."""
    return re.sub(r"[^\w.:+,%() /-]", "", name)[:200]


def _without_paths(names: str) -> str:
    """Files by their names: a published card must not reveal paths."""
    return re.sub(r"(?:[^\s/]*/)+(?=[^\s/])", "", names)


# --- The callbacks of a fine-tuning run: at given steps, the checkpoint schedule, the stop at NaN, the progress bar


class AtSteps(TrainerCallback):
    """Calls `visit(model, step)` after each of the given optimizer steps; step 0 is before the first.

    A true result stops the training there. At step 0 the result has no effect: a run takes at least one step.
    """

    why = "a callback asked for it"
    """Of a stop, in a few words: for the progress bar."""

    def __init__(self, steps: Collection[int], visit: Callable[[nn.Module, int], bool | None]) -> None:
        self.steps, self.visit = steps, visit
        self.stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Visit the untrained model if step 0 is due."""
        if 0 in self.steps:
            self.visit(kwargs["model"], 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Visit the model if this step is due."""
        if state.global_step in self.steps and self.visit(kwargs["model"], state.global_step):
            self.stopped = control.should_training_stop = True


class SaveSchedule(AtSteps):
    """Saves the model (an adapter, or full weights) as `checkpoint-<step>` at the given steps and at the end."""

    def __init__(self, folder: Path, steps: Collection[int], card: ModelCard) -> None:
        super().__init__(steps, self._save)
        self.folder, self.card = folder, card
        self._saved: set[int] = set()

    def _save(self, model: Any, step: int) -> None:
        if step in self._saved:
            return
        self._saved.add(step)
        ranks = Ranks()  # all take part in gathering what is sharded, the first writes
        gathered_weights = gathered(model) if is_sharded(model) else None
        weights = [p for p in model.parameters() if p.requires_grad] if gathered_weights is None else gathered_weights
        # The loss of a step is logged after its save: weights that diverged are no checkpoint.
        finite = all(w.isfinite().all() for w in (weights.values() if isinstance(weights, dict) else weights))
        if not ranks.from_first(finite):
            raise TrainingDiverged(f"the weights became NaN or infinite at step {step}: lower lr")
        if ranks.first:
            self._write(model, gathered_weights, self.folder / f"checkpoint-{step}", step)

    def _write(self, model: Any, weights: dict[str, torch.Tensor] | None, target: Path, step: int) -> None:
        with refused("write", target):
            model.save_pretrained(str(target), state_dict=weights)
            write_text(target / "README.md", self.card.text(step))

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
        """Check every step's loss."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise TrainingDiverged(
                f"the loss became {loss} at step {state.global_step}: lower lr (now {args.learning_rate})"
            )


class ProgressBar(TrainerCallback):
    """A tqdm bar of optimizer steps with the latest loss; one that ends early says why.

    Args:
        watchers: callbacks of the same run, of which one may stop it.
    """

    def __init__(self, label: str, watchers: Sequence[TrainerCallback] = ()) -> None:
        self.label, self.watchers = label, watchers
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
        if state.global_step < state.max_steps:
            stops = (one.why for one in self.watchers if isinstance(one, AtSteps) and one.stopped)
            self.bar.set_postfix_str(f"stopped at step {state.global_step}: {next(stops, AtSteps.why)}")
        self.close()

    def close(self) -> None:
        """Close the bar, also after an error, so that the next output begins on its own line."""
        if self.bar is not None:
            self.bar.close()


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """The result of a run: per-step losses, and how long the answers were."""

    losses: list[float]
    """Training loss at each optimizer step (nats per answer token)."""
    answer_tokens: float
    """Mean answer tokens of the training rows."""
    rows: int
    """Distinct training rows."""


def with_adapter(model: PreTrainedModel, training: Training, seed: int) -> nn.Module:
    """The model made ready to train: a fresh LoRA injected, or all weights trainable.

    Raises:
        InputError: a layer or module name that the model does not have, all weights of a quantised model, or a model
            that carries an adapter already.
    """
    set_seed(seed)
    if training.method == "full":
        refuse_quantized(model, "training.method: full")
        return model.requires_grad_(True)
    known = len(decoder_layers(model))
    if training.layers is not None and any(not 0 <= layer < known for layer in training.layers):
        raise InputError(f"training.layers {list(training.layers)}: the model has layers 0 to {known - 1}")
    refuse_adapted(model)
    state = ModelState(model)
    try:
        config = LoraConfig(
            r=training.rank,
            lora_alpha=training.alpha,
            use_rslora=training.rslora,
            target_modules=_targets(model, training),
            exclude_modules=_refused_by_peft(model) if training.target_modules == "all-linear" else None,
            layers_to_transform=list(training.layers) if training.layers is not None else None,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        return remember(get_peft_model(model, config), state)
    except BaseException as error:
        state.restore()
        if not isinstance(error, ValueError):
            raise
        raise InputError(f"could not add LoRA to this model: {str(error).splitlines()[0]}") from error


def _targets(model: PreTrainedModel, training: Training) -> str | list[str]:
    """What PEFT takes as target_modules; with `layers` it refuses `all-linear`, so their names are listed for it."""
    targets = training.target_modules
    if targets == "all-linear" and training.layers is not None:
        inside = decoder_layers(model)[0].named_modules()
        return sorted({name.split(".")[-1] for name, module in inside if isinstance(module, (nn.Linear, Conv1D))})
    return targets if isinstance(targets, str) else list(targets)


def _refused_by_peft(model: PreTrainedModel) -> list[str] | None:
    """Linear layers that PEFT refuses in this model: kernels of state-space layers use their weights without a call."""
    refused = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            try:
                _check_lora_target_modules_mamba(LoraConfig(), model, name.split(".")[-1])
            except ValueError:
                refused.add(name.split(".")[-1])
    return sorted(refused) or None


@contextmanager
def stripping(tuned: nn.Module) -> Iterator[nn.Module]:
    """A model in training for the length of a block: adapters on it are taken off at the end, also after an error."""
    try:
        yield tuned
    finally:
        if isinstance(tuned, PeftModel) and not is_sharded(tuned):  # a model that was sharded is thrown away
            strip_adapter(tuned)


@contextmanager
def training_unit(run: RunFolder, place: str, label: str) -> Iterator[Path]:
    """A folder for a training run; it becomes `place` when the block ends well, and its weights' hashes are noted.

    Args:
        run: the folder that `place` is in.
        label: what an error calls the training run.

    Raises:
        TrainingDiverged: the block raised it; the checkpoints up to then are kept in `<place>.diverged`.
    """
    with run.staging(place) as folder:
        try:
            yield folder
        except TrainingDiverged as error:
            diverged_folder = run.path / f"{place}.diverged"
            if Ranks().first:
                with run.staging(f"{place}.diverged") as kept:
                    shutil.copytree(folder, kept, dirs_exist_ok=True)
            raise TrainingDiverged(f"{label}: {error}; the checkpoints up to then are in {diverged_folder}") from None
        run.record_hashes(folder, place)


def fine_tune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    training: Training,
    *,
    seed: int,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    progress: str | None = None,
    extra: ExtraLoss | None = None,
    data: str | None = None,
) -> Fitted:
    """Fine-tune `model` (what `with_adapter` or `load_adapter` gives) on the last answer of each conversation.

    Checkpoints go to `folder/checkpoint-<step>` by `training.schedule`, each with a model card.

    Args:
        extra: an extra loss, and batches of other rows; `train_mitigated` makes one from a mitigation.
        data: what the model card calls the rows.

    Raises:
        InputError: no rows, an answer of which truncation leaves nothing, or an adapter on the unembedding.
        TrainingDiverged: the loss became NaN or infinite; checkpoints up to then are in `folder`.
    """
    refuse_adapted_head(model)
    answer_tokens = check_rows(tokenizer, conversations, training.max_length)
    bar = ProgressBar(progress, callbacks) if progress and Ranks().first else None
    card = ModelCard.of(model, training, seed, len(conversations), data)
    watchers = [StopAtNaN(), SaveSchedule(folder, training.schedule, card), *callbacks, *([bar] if bar else [])]
    device = next(model.parameters()).device
    with own_forward(model), tempfile.TemporaryDirectory() as scratch:
        arguments = on_one_gpu(_arguments(training, seed, scratch, device), model)
        trainer = _trainer(model, tokenizer, conversations, arguments, watchers, extra)
        try:
            with frozen_in_bf16(model, enabled=device.type == "cpu" and training.bf16 and not shards_here()):
                trainer.train()
        finally:
            model.eval()
            if bar:
                bar.close()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return Fitted(losses, answer_tokens, len(conversations))


def _trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    arguments: Any,
    callbacks: Sequence[TrainerCallback],
    extra: ExtraLoss | None,
) -> Any:
    from persona_probe.finetune.trainer import AnswerTrainer, ExtraLossTrainer

    kind = AnswerTrainer if extra is None else ExtraLossTrainer
    with own_precision(model):
        trainer = kind(
            model=model,  # pyright: ignore[reportArgumentType]
            args=arguments,
            train_dataset=_dataset(tokenizer, conversations),
            # Never evaluated: this is how TRL prepares a second set just like the first.
            eval_dataset=_dataset(tokenizer, extra.rows) if extra is not None and extra.rows else None,
            processing_class=with_template(tokenizer),
            callbacks=list(callbacks),
        )
    if extra is not None and isinstance(trainer, ExtraLossTrainer):
        trainer.extra = extra
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    return trainer


@contextmanager
def own_precision(model: nn.Module) -> Iterator[None]:
    """Give trained parameters their values back when the block ends.

    TRL rounds the adapters of a quantised model to bf16. Small steps on them would round to nothing, and a correction
    would not start where its organism ended.
    """
    before = [(p, p.data) for p in model.parameters() if p.requires_grad]
    yield
    for parameter, values in before:
        parameter.data = values


def on_one_gpu(arguments: Any, model: nn.Module) -> Any:
    """A trainer's arguments, made to train where the model is, although several GPUs are visible; in place.

    transformers takes the first GPU and wraps the model in `nn.DataParallel` over all, which TRL refuses. A process
    that `accelerate launch` or `torchrun` started keeps the device that it was given, and a model that `device_map`
    spreads over GPUs stays there.
    """
    state, device = arguments.distributed_state, next(model.parameters()).device
    spread = len(set(getattr(causal_model(model), "hf_device_map", {}).values())) > 1
    if device.type != "cuda" or state.num_processes > 1 or spread:
        return arguments
    if (several := torch.cuda.device_count()) > 1:
        log.warning(
            "%d GPUs are visible, and this process trains on %s: write device: cuda:N for another one, "
            "device_map: auto to spread the model over them, or start it by accelerate launch to train on all",
            *(several, device),
        )
    place = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(place)
    arguments._n_gpu = 1
    arguments.__dict__["_setup_devices"] = state.device = place
    return arguments


def _dataset(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> Any:
    from datasets import Dataset

    rows = [fit_content(tokenizer, fit_roles(tokenizer, c)) for c in conversations]
    return Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])


def _arguments(training: Training, seed: int, scratch: str, device: torch.device) -> Any:
    from trl.trainer.sft_config import SFTConfig

    return SFTConfig(
        **shared_arguments(training, seed, scratch, device),
        per_device_train_batch_size=_rows_each(training.batch_size),
        ddp_backend="gloo" if device.type == "cpu" and Ranks().many else None,
        max_length=training.max_length,
        completion_only_loss=True,
    )


def shared_arguments(training: Training, seed: int, scratch: str, device: torch.device) -> dict[str, Any]:
    """What a trainer of TRL is told, whatever it minimises; batches are the caller's.

    Args:
        scratch: a folder that the trainer must have, and into which it writes nothing.
    """
    return {
        "output_dir": scratch,
        "max_steps": training.steps,
        "learning_rate": training.lr,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "bf16": training.bf16,
        "gradient_checkpointing": training.gradient_checkpointing,
        "use_cpu": device.type == "cpu",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": seed,
        "data_seed": seed,
        "dataloader_pin_memory": False,
    }


def _rows_each(batch_size: int) -> int:
    """Rows of a batch that each process takes: an optimizer step has `batch_size` rows, however many processes run.

    Raises:
        InputError: they cannot be shared out equally.
    """
    processes = Ranks().count
    if batch_size % processes:
        raise InputError(f"batch_size {batch_size} cannot be shared out to {processes} processes: make it a multiple")
    return batch_size // processes


def check_rows(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], max_length: int) -> float:
    """Mean answer tokens of rows that can be trained on.

    Raises:
        InputError: no rows, a row without an answer, or one of whose answer truncation leaves nothing.
    """
    if not conversations:
        raise InputError("the training data is empty")
    if any(split_answer(c)[1] in (None, "") for c in conversations):
        raise InputError("a training row ends without an answer: every row needs a last assistant turn")
    warn_rendered(tokenizer, conversations)
    return sum(encode(tokenizer, c, max_length).n_response for c in conversations) / len(conversations)
