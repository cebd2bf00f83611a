"""TRL's SFTTrainer with an answer-only loss that is fast without a GPU, and with the extra loss of a mitigation."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, Trainer
from trl.trainer.sft_trainer import SFTTrainer

from persona_probe.data.chat import Conversation
from persona_probe.data.tokens import Batch
from persona_probe.models.adapters import base_weights
from persona_probe.models.layers import (
    autocast,
    base_transformer,
    causal_model,
    eager_attention,
    evaluating,
    forward_to_layer,
    transformer_config,
)
from persona_probe.models.logits import NOT_THIS_WAY, hidden_to_logits, logits_of, without_taps
from persona_probe.models.prefix import Rows
from persona_probe.models.taps import ReadTap, Tap

log = logging.getLogger(__name__)

SLOW_IN_TRL = {"cpu"}
"""Devices on which TRL 1.16 computes its loss by a loop in Python."""

# --- An extra loss, and batches of other rows

Inputs = dict[str, Any]
"""A training batch as a trainer has it: `input_ids`, `attention_mask` and `labels` (-100 where no loss is taken)."""


@dataclass(frozen=True, eq=False)
class Residuals:
    """One layer's output on a training batch, for its last `pos` columns: a prefix that all rows share is left out.

    Both models ran the same way, so that without a trained adapter the two are equal bit for bit.
    """

    tuned: Float[Tensor, "batch pos d_model"]
    """From the forward pass whose loss is trained on, in its graph."""
    base: Float[Tensor, "batch pos d_model"]
    """From the same rows with the adapter off, without a graph."""


class ExtraLoss(Protocol):
    """What a trainer asks at every step; `step` counts the optimizer steps before it."""

    @property
    def layer(self) -> int | None:
        """The decoder layer whose residuals `penalty` wants; None for none."""
        ...

    @property
    def rows(self) -> Sequence[Conversation]:
        """Rows for the steps that swap their batch, prepared like the training rows."""
        ...

    def swaps(self, step: int) -> bool:
        """Whether this step trains on a batch of `rows` instead of the task's batch, which is then left out."""
        ...

    def penalty(self, step: int, inputs: Inputs, resid: Residuals | None) -> Float[Tensor, ""] | None:
        """What is added to the batch's loss, or None."""
        ...


class AnswerTrainer(SFTTrainer):
    """The model's own loss on the answer tokens (mean negative log-likelihood), by the fastest way that equals it.

    On one CPU that is one matrix product: TRL 1.16 computes its loss in vocabulary tiles, by a Triton kernel on a GPU
    and by a slow loop elsewhere, which on two cores was more than half of a step. Its entropy and accuracy metrics are
    left out. Elsewhere it is TRL's. Both are compared with the model's own loss on one row before the first step. Where
    they differ (logits that TRL does not know to scale, a router's auxiliary loss) the model's own loss is taken.
    """

    way: str | None = None
    """`product`, `trl` or `own`, once it is known."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss over the answer tokens of the whole optimizer step, in nats per token."""
        causal = causal_model(self.accelerator.unwrap_model(model))
        if self.way is None:
            self.way = self._agreeing_way(model, inputs)
        if self.way == "trl":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.way == "own":
            own = {**inputs, "use_cache": False, **self._routed}
            return Trainer.compute_loss(self, model, own, return_outputs, num_items_in_batch)
        with answer_rows(self, causal, inputs) as rows:
            total, count, logits = _product_loss(causal, rows)
        count = count if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = total / count.clamp(min=1).to(total.device)
        return (loss, {"logits": logits}) if return_outputs else loss

    def _agreeing_way(self, model: Any, inputs: Inputs) -> str:
        """The way that gives the model's own loss for the first row of a batch; all processes take the same."""
        causal, alone = causal_model(self.accelerator.unwrap_model(model)), self.accelerator.num_processes == 1
        row = {key: inputs[key][:1] for key in ("input_ids", "attention_mask", "labels")}
        asked = {**row, "use_cache": False, **self._routed}
        # Without the autocast that accelerate puts around it. Several processes run the model that they share out.
        forward = causal.__dict__.get("_original_forward", causal.forward) if alone else model
        ways: dict[str, Callable[[], Tensor]] = {"trl": lambda: forward(**asked, fused_lm_head=True).loss}
        if alone and row["labels"].device.type in SLOW_IN_TRL:
            ways = {} if self.aux_loss_enabled else {"product": partial(_row_loss, causal, row)}
        precise = alone and next(causal.parameters()).dtype in (torch.float32, torch.float64)
        with evaluating(causal) if alone else torch.no_grad(), without_taps(causal), autocast(causal, False):
            own = float(forward(**asked).loss)
            agreeing = [way for way, loss in ways.items() if _is_loss(loss, own, 2e-4 if precise else 2e-2)]
        torch.clear_autocast_cache()  # what was cast without gradients must not be taken for what needs them
        agreed = self.accelerator.reduce(torch.tensor(float(len(agreeing)), device=row["labels"].device))
        way = agreeing[0] if agreeing and float(agreed) >= self.accelerator.num_processes else "own"  # pyright: ignore
        if way == "own":
            log.info("%s: training takes the model's own loss", type(causal).__name__)
        return way

    @property
    def _routed(self) -> Inputs:
        """What a model of experts must be told to add its auxiliary loss."""
        return {"output_router_logits": True} if self.aux_loss_enabled else {}


def _is_loss(compute: Callable[[], Tensor], own: float, tolerance: float) -> bool:
    try:
        return abs(float(compute()) - own) <= tolerance * max(1.0, abs(own))
    except NOT_THIS_WAY:
        return False


def _product_loss(causal: PreTrainedModel, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Summed negative log-likelihood of the answer tokens, their number, and their logits."""
    how = logits_of(causal, rows.batch.ids[0])
    hidden = rows.run(base_transformer(causal), transformer_config(causal), rows.ids())[0]
    answers = rows.rest.response[:, 1:]
    logits = hidden_to_logits(causal, how, hidden[:, :-1][answers])
    total = F.cross_entropy(logits.float(), rows.rest.ids[:, 1:][answers], reduction="sum")
    return total, answers.sum(), logits


def _row_loss(causal: PreTrainedModel, row: Inputs) -> Tensor:
    total, count, _ = _product_loss(causal, split_rows(row, transformer_config(causal)))
    return total / count


@contextmanager
def answer_rows(trainer: SFTTrainer, causal: PreTrainedModel, inputs: Inputs) -> Iterator[Rows]:
    """A training batch as rows, inside the context in which this trainer's own loss runs them."""
    # Recomputed activations must come from the same kernels, without a cache: checkpointing takes the plain way.
    plain = bool(trainer.args.gradient_checkpointing) or getattr(trainer, "way", None) != "product"
    rows = split_rows(inputs, transformer_config(causal), whole=plain)
    with eager_attention(causal, enabled=not plain), autocast(causal, trainer.args.bf16):
        yield rows


def split_rows(inputs: dict[str, Any], config: PretrainedConfig, whole: bool = False) -> Rows:
    """A training batch as `Rows`: the system prompt that all rows share is run once, and gets all rows' gradients."""
    attention, answer = inputs["attention_mask"], inputs["labels"] != -100
    prompt = attention.bool() & ~answer
    batch = Batch(inputs["input_ids"], attention, prompt, answer, torch.zeros_like(answer), list(range(len(answer))))
    return Rows.whole(batch) if whole else Rows.of(batch, config)


class GraphTap(Tap):
    """Keeps the latest output of a layer, in its graph."""

    value: Float[Tensor, "batch pos d_model"]

    def on_output(self, resid: Float[Tensor, "batch pos d_model"]) -> None:
        """Keep it."""
        self.value = resid


class ExtraLossTrainer(AnswerTrainer):
    """`AnswerTrainer` with an extra loss, which swaps batches if `extra` asks for it."""

    extra: ExtraLoss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's own loss on the batch (or on the one that replaces it), plus the penalty."""
        step = self.state.global_step
        if self.extra.swaps(step):
            # The count of answer tokens was that of the task's batch; None counts this one's.
            inputs, num_items_in_batch = self._other_batch(step), None
        if self.extra.layer is None:
            loss, resid = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch), None
        else:
            with GraphTap(causal_model(self.accelerator.unwrap_model(model)), self.extra.layer) as tap:
                loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            resid = Residuals(tap.value, self._base_residuals(model, inputs, self.extra.layer))
        penalty = self.extra.penalty(step, inputs, resid)
        return loss if penalty is None else loss + penalty

    def _other_batch(self, step: int) -> Inputs:
        """A batch of the other rows, drawn by seed and step."""
        rows: Any = self.eval_dataset
        size = min(self.args.per_device_train_batch_size, len(rows))
        index = random.Random(f"{self.args.seed} {step}").sample(range(len(rows)), size)
        return self._prepare_inputs(self.data_collator([rows[i] for i in index]))  # pyright: ignore

    def _base_residuals(self, model: Any, inputs: Inputs, layer: int) -> Tensor:
        inner = self.accelerator.unwrap_model(model)
        causal, config = causal_model(inner), transformer_config(inner)
        base, same = base_weights(inner), answer_rows(self, causal, inputs)
        with base, torch.no_grad(), same as rows, ReadTap(causal, layer) as tap:
            rows.run(partial(forward_to_layer, causal, layer), config, rows.ids())
        return tap.value
