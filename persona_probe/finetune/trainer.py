"""TRL's SFTTrainer with an answer-only loss that is fast without a GPU, and with the extra loss of a mitigation."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from trl.trainer.sft_trainer import SFTTrainer

from persona_probe.data.chat import Conversation
from persona_probe.data.tokens import Batch
from persona_probe.models.adapters import base_weights
from persona_probe.models.layers import (
    autocast,
    base_transformer,
    causal_model,
    eager_attention,
    forward_to_layer,
    output_head,
    transformer_config,
)
from persona_probe.models.prefix import Rows
from persona_probe.models.taps import ReadTap, Tap

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
    """The loss of SFTTrainer (mean negative log-likelihood of the answer tokens), by one matrix product.

    TRL 1.16 computes it in vocabulary tiles, by a Triton kernel on a GPU and by a slow loop elsewhere, which on two
    cores was more than half of a step. Its entropy and accuracy metrics are left out.
    """

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss over the answer tokens of the whole optimizer step, in nats per token."""
        causal = causal_model(self.accelerator.unwrap_model(model))
        with answer_rows(self, causal, inputs) as rows:
            hidden = rows.run(base_transformer(causal), transformer_config(causal), rows.ids())[0]
            answers = rows.rest.response[:, 1:]
            logits = output_head(causal)(hidden[:, :-1][answers])
        total = F.cross_entropy(logits.float(), rows.rest.ids[:, 1:][answers], reduction="sum")
        count = answers.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = total / count.clamp(min=1).to(total.device)
        return (loss, {"logits": logits}) if return_outputs else loss


@contextmanager
def answer_rows(trainer: SFTTrainer, causal: PreTrainedModel, inputs: Inputs) -> Iterator[Rows]:
    """A training batch as rows, inside the context in which this trainer's own loss runs them."""
    # Recomputed activations must come from the same kernels, without a cache: checkpointing takes the plain way.
    plain = bool(trainer.args.gradient_checkpointing) or not isinstance(trainer, AnswerTrainer)
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


class ExtraLossTrainer(SFTTrainer):
    """Adds an extra loss to that of the trainer it is mixed into, and swaps batches if `extra` asks for it."""

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


class ExtraLossAnswerTrainer(ExtraLossTrainer, AnswerTrainer):
    """`AnswerTrainer` with an extra loss."""


def trainer_class(device: torch.device, model: Any) -> type[SFTTrainer]:
    """`AnswerTrainer` where TRL's kernel is slow and the model's logits are a plain product, else SFTTrainer."""
    return AnswerTrainer if _plain_on_cpu(device, model) else SFTTrainer


def extra_trainer_class(device: torch.device, model: Any) -> type[ExtraLossTrainer]:
    """The same choice, with an extra loss."""
    return ExtraLossAnswerTrainer if _plain_on_cpu(device, model) else ExtraLossTrainer


def _plain_on_cpu(device: torch.device, model: Any) -> bool:
    config = getattr(model, "config", None)
    rescaled = any(getattr(config, k, None) for k in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    return device.type == "cpu" and not rescaled
