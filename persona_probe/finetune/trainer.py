"""TRL's SFTTrainer with an answer-only loss that is fast without a GPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trl.trainer.sft_trainer import SFTTrainer

from persona_probe.models.layers import autocast, base_transformer, causal_model, output_head


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
        labels = inputs["labels"]
        with autocast(causal, self.args.bf16):
            hidden = base_transformer(causal)(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            )[0]
            answers = labels[:, 1:] != -100
            logits = output_head(causal)(hidden[:, :-1][answers])
        total = F.cross_entropy(logits.float(), labels[:, 1:][answers], reduction="sum")
        count = answers.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = total / count.clamp(min=1).to(total.device)
        return (loss, {"logits": logits}) if return_outputs else loss


def trainer_class(device: torch.device, model: Any) -> type[SFTTrainer]:
    """`AnswerTrainer` where TRL's kernel is slow and the model's logits are a plain product, else SFTTrainer."""
    config = getattr(model, "config", None)
    rescaled = any(getattr(config, k, None) for k in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    return AnswerTrainer if device.type == "cpu" and not rescaled else SFTTrainer
