"""A monitor that acts: at an alarm roll back, train on corrective rows, and go on, with a record of each time."""

import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation
from persona_probe.data.load import load_data
from persona_probe.data.tokens import Batch, batches
from persona_probe.errors import InputError
from persona_probe.models.adapters import trainable_parameters
from persona_probe.models.layers import autocast, causal_model
from persona_probe.models.load import tokenizer_of
from persona_probe.models.ranks import Ranks, is_sharded, unwrap
from persona_probe.monitor.actions.action import ActionContext, folder_for, request_stop
from persona_probe.monitor.actions.rollback import RollBack
from persona_probe.monitor.events import Alarm
from persona_probe.writing import make_folder, refused

log = logging.getLogger(__name__)

RECORD = "corrections.jsonl"
ROLLED_BACK, CLEAN, GAVE_UP = "rolled back and corrected", "clean again", "gave up"


@dataclass(frozen=True)
class PolicyEvent:
    """One line of the record."""

    event: str
    """`rolled back and corrected`, `clean again` (the first reading afterwards with every rule inside), or `gave up`
    (it was corrected `most` times; the weights are rolled back once more, and training stops)."""
    step: int
    rule: str = ""
    """That raised the alarm."""
    message: str = ""
    to_step: int | None = None
    """Step of the weights that were put back; None where no reading had been clean, so that none were."""
    rows: int = 0
    """Corrective rows that were trained on."""
    losses: tuple[float, ...] = ()
    """Mean loss on answer tokens at each corrective step, nats per token, before that step."""


@dataclass(frozen=True, eq=False)
class RollBackAndCorrect(RollBack):
    """Roll back as `RollBack` does, take a few steps on corrective rows, and let training go on.

    The corrective steps have an AdamW of their own, so that training's optimizer state stays that of the clean reading;
    training's gradients, learning rate schedule, data order and random numbers are left as they are. The model is in
    eval mode meanwhile: there is no dropout, and passive reading does not take the rows for training's. Several alarms
    at one step count as one. What the correction left is not clean by itself: the next reading with every rule inside
    is. After `most` corrections a further alarm rolls back and stops training.

    Every event is in `record`, and as a line of `corrections.jsonl` where there is a folder.

    Raises:
        InputError: an unknown choice, no rows, or numbers below 1.
    """

    rows: str | Sequence[Conversation] = ()
    """Corrective rows: a packaged set, a file, or conversations with answers."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """None takes the one that `load_model` gave with the model."""
    steps: int = 5
    """Corrective steps at each alarm."""
    batch_size: int = 8
    lr: float | None = None
    """Of the corrective steps; None takes training's peak rate."""
    most: int = 3
    """Corrections in a run."""
    max_length: int = 512
    """Tokens of a corrective row that are read."""
    seed: int = 0
    """Of the rows' order."""
    record: list[PolicyEvent] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.then != "continue":
            raise InputError("RollBackAndCorrect goes on after a correction: leave then= out, or use RollBack")
        if not self.rows:
            raise InputError("RollBackAndCorrect has no corrective rows: pass rows=, a packaged set or conversations")
        for name in ("steps", "batch_size", "most", "max_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of RollBackAndCorrect must be at least 1, not {getattr(self, name)}")
        if self.lr is not None and not self.lr > 0:
            raise InputError(f"lr of RollBackAndCorrect must be positive, not {self.lr}")

    @property
    def corrections(self) -> int:
        """How often it corrected in this run."""
        return sum(one.event == ROLLED_BACK for one in self.record)

    def clean(self, context: ActionContext) -> None:
        """Keep the present state; the first time after a correction, note that the model is clean again."""
        super().clean(context)
        if self.record and self.record[-1].event == ROLLED_BACK:
            self._note(PolicyEvent(CLEAN, context.step), context)

    def _do(self, alarm: Alarm, context: ActionContext) -> None:
        if self.record and self.record[-1].step == context.step and self.record[-1].event != CLEAN:
            return  # another rule's alarm at the same reading
        if is_sharded(context.model):
            raise InputError("RollBackAndCorrect cannot train a sharded model between steps: use RollBack")
        state = self._clean.of(context.model)
        told = {"step": context.step, "rule": alarm.rule, "message": alarm.message}
        told["to_step"] = None if state is None else state.step
        super()._do(alarm, context)
        if self.corrections >= self.most:
            log.warning("step %d: corrected %d times already, so training stops", context.step, self.most)
            self._note(PolicyEvent(GAVE_UP, **told), context)
            request_stop(context)
            return
        losses = self._correct(context)
        log.warning("step %d: %d corrective steps, loss %.3f to %.3f", context.step, len(losses), losses[0], losses[-1])
        self._note(PolicyEvent(ROLLED_BACK, **told, rows=self.steps * self.batch_size, losses=losses), context)

    def _correct(self, context: ActionContext) -> tuple[float, ...]:
        """Take the corrective steps; training's gradients and the modules' modes are put back."""
        model = unwrap(context.model)
        parameters = [one for one in trainable_parameters(model).values()]
        modes = {module: module.training for module in model.modules()}
        gradients = [one.grad for one in parameters]
        bf16 = bool(context.args is not None and context.args.bf16)
        optimizer = AdamW(parameters, lr=self._rate(context), weight_decay=0.0)
        losses = []
        model.eval()
        try:
            for batch in self._batches(model):
                optimizer.zero_grad(set_to_none=True)
                with torch.enable_grad(), autocast(model, bf16):
                    loss = answer_loss(model, batch)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                losses.append(float(loss.detach()))
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            for module, mode in modes.items():
                module.training = mode
        return tuple(losses)

    def _rate(self, context: ActionContext) -> float:
        if self.lr is not None:
            return self.lr
        if context.optimizer is None:
            raise InputError("RollBackAndCorrect knows no learning rate here: pass lr=")
        group: Mapping[str, Any] = context.optimizer.param_groups[0]
        return float(group.get("initial_lr", group["lr"]))

    def _batches(self, model: nn.Module) -> list[Batch]:
        """One batch a step: rows in a random order that goes on from correction to correction."""
        rows = load_data(self.rows) if isinstance(self.rows, str) else list(self.rows)
        wanted, first = self.steps * self.batch_size, self.corrections * self.steps * self.batch_size
        order: list[int] = []
        for turn in range((first + wanted) // len(rows) + 1):
            places = list(range(len(rows)))
            random.Random(f"{self.seed} {turn}").shuffle(places)
            order += places
        chosen = [rows[place] for place in order[first : first + wanted]]
        tokenizer, device = tokenizer_of(model, self.tokenizer), next(model.parameters()).device
        parts = [chosen[n : n + self.batch_size] for n in range(0, wanted, self.batch_size)]
        made = [next(batches(tokenizer, part, len(part), self.max_length)).to(device) for part in parts]
        if not all(bool(batch.response.any()) for batch in made):
            raise InputError("corrective rows have no answers to train on: give conversations that end with one")
        return made

    def _note(self, event: PolicyEvent, context: ActionContext) -> None:
        self.record.append(event)
        if not Ranks().first:
            return
        try:
            path = make_folder(folder_for(self, self.folder, context)) / RECORD
        except InputError:
            return  # a plain loop without a folder: the record is in memory
        with refused("write", path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(event), ensure_ascii=False) + "\n")


def answer_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Mean cross entropy of the answers' tokens, as the trainer computes it (nats per token)."""
    causal: Any = causal_model(model)
    out = type(causal).forward(causal, input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)
    trained = batch.response[:, 1:]
    return nn.functional.cross_entropy(out.logits[:, :-1][trained].float(), batch.ids[:, 1:][trained])
