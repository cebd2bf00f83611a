"""TRL's SFTTrainer with an answer-only loss that is fast without a GPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig
from trl.trainer.sft_trainer import SFTTrainer

from persona_probe.data.tokens import Batch
from persona_probe.models.layers import (
    autocast,
    base_transformer,
    causal_model,
    eager_attention,
    output_head,
    transformer_config,
)
from persona_probe.models.prefix import Rows


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
        # Recomputed activations must come from the same kernels, without a cache: checkpointing takes the plain way.
        plain = bool(self.args.gradient_checkpointing)
        rows = split_rows(inputs, transformer_config(causal), whole=plain)
        with eager_attention(causal, enabled=not plain), autocast(causal, self.args.bf16):
            hidden = rows.run(base_transformer(causal), transformer_config(causal), rows.ids())[0]
            answers = rows.rest.response[:, 1:]
            logits = output_head(causal)(hidden[:, :-1][answers])
        total = F.cross_entropy(logits.float(), rows.rest.ids[:, 1:][answers], reduction="sum")
        count = answers.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = total / count.clamp(min=1).to(total.device)
        return (loss, {"logits": logits}) if return_outputs else loss


def split_rows(inputs: dict[str, Any], config: PretrainedConfig, whole: bool = False) -> Rows:
    """A training batch as `Rows`: the system prompt that all rows share is run once, and gets all rows' gradients."""
    attention, answer = inputs["attention_mask"], inputs["labels"] != -100
    prompt = attention.bool() & ~answer
    batch = Batch(inputs["input_ids"], attention, prompt, answer, torch.zeros_like(answer), list(range(len(answer))))
    return Rows.whole(batch) if whole else Rows.of(batch, config)


def trainer_class(device: torch.device, model: Any) -> type[SFTTrainer]:
    """`AnswerTrainer` where TRL's kernel is slow and the model's logits are a plain product, else SFTTrainer."""
    config = getattr(model, "config", None)
    rescaled = any(getattr(config, k, None) for k in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    return AnswerTrainer if device.type == "cpu" and not rescaled else SFTTrainer
