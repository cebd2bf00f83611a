"""TRL's GRPOTrainer with log-probabilities that are the model's own, whatever scales its logits."""

import inspect
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback
from trl.trainer.grpo_trainer import GRPOTrainer

from persona_probe.models.layers import causal_model, output_head
from persona_probe.models.logits import NOT_THIS_WAY

log = logging.getLogger(__name__)

PADDING = 3
"""Columns put before the row that is compared."""
TokenLogprobs = tuple[Tensor, Tensor | None, Tensor | None]
"""Log-probability of each answer token, entropy (nats) at each, and a router's auxiliary loss; as TRL has them."""


class AnswersTrainer(GRPOTrainer):
    """`GRPOTrainer` on answers that `rollout_func` draws.

    TRL computes log-probabilities from hidden states and the head's weight, and knows some ways of scaling logits. It
    leaves positions to the model, which may count padding before a prompt (GPT-2). On one padded row of the first batch
    they are compared with the model's own logits; where they differ, the own are taken.
    """

    own: bool | None = None
    """Whether log-probabilities come from the model's own logits; None before the first batch."""

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"],
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **further: Any,
    ) -> TokenLogprobs:
        """Of the last `logits_to_keep` tokens; see `TokenLogprobs`."""
        if self.own is None:
            self.own = not self._trl_agrees(model, input_ids[:1], attention_mask[:1], logits_to_keep)
            if self.own:
                self._say_own(type(causal_model(self.accelerator.unwrap_model(model))).__name__)
        if not self.own:
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **further,
            )
        parts = [
            self._own_logps(
                model, input_ids[start : start + size], attention_mask[start : start + size], logits_to_keep
            )
            for size in (batch_size or len(input_ids),)
            for start in range(0, len(input_ids), size)
        ]
        logps, entropies = (torch.cat(one) for one in zip(*parts, strict=True))
        return (
            logps,
            entropies if compute_entropy else None,
            torch.zeros_like(logps[0, 0]) if compute_aux_loss else None,
        )

    def _say_own(self, name: str) -> None:
        router = ", without the router's auxiliary loss" if self.aux_loss_enabled else ""
        log.info("%s: log-probabilities come from the model's own logits%s", name, router)

    def _own_logps(
        self, model: Any, ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], keep: int
    ) -> tuple[Float[Tensor, "batch keep"], Float[Tensor, "batch keep"]]:
        places = {}
        if "position_ids" in inspect.signature(causal_model(self.accelerator.unwrap_model(model)).forward).parameters:
            places = {"position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0)}
        with self.accelerator.autocast():
            logits = model(input_ids=ids, attention_mask=mask, **places).logits[:, -keep - 1 : -1]
        logprobs = (logits.float() / self.temperature).log_softmax(dim=-1)
        chosen = logprobs.gather(-1, ids[:, -keep:, None]).squeeze(-1)
        return chosen, -(logprobs.exp() * logprobs).sum(dim=-1)

    def _trl_agrees(self, model: Any, ids: Tensor, mask: Tensor, keep: int) -> bool:
        inner = self.accelerator.unwrap_model(model)
        if isinstance(output_head(inner), TrainableTokensWrapper):
            return False  # it gives its weight while it is off, as it may be here, and not while it is on
        training = inner.training
        precise = not self.args.bf16 and next(inner.parameters()).dtype == torch.float32
        ids, mask = F.pad(ids, (PADDING, 0), value=int(ids[0, 0])), F.pad(mask, (PADDING, 0), value=0)
        try:
            inner.eval()  # dropout would make two passes differ
            with torch.no_grad():
                own, entropy = self._own_logps(model, ids, mask, keep)
                theirs, their_entropy, _ = super()._get_per_token_logps_and_entropies(
                    model, ids, mask, keep, compute_entropy=True
                )
        except NOT_THIS_WAY:
            return False
        finally:
            inner.train(training)
        real = mask[:, -keep:].bool()
        assert their_entropy is not None
        pairs = ((own, theirs), (entropy, their_entropy))
        return all(float(((a - b).abs() * real).max()) <= (1e-3 if precise else 0.1) for a, b in pairs)


def grpo_trainer(
    model: nn.Module,
    tokenizer: Any,
    prompts: Any,
    arguments: Any,
    reward: Callable[..., list[float | None]],
    rollout: Callable[..., dict[str, Any]],
    callbacks: Sequence[Any],
    kl: float,
) -> AnswersTrainer:
    """A trainer of a model that carries an adapter.

    Args:
        prompts: a `datasets.Dataset` with column `prompt`, and others that `reward` gets by name.
        kl: weight of the divergence from the base model, which is the model with its adapter off.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
        trainer = AnswersTrainer(
            model=model,  # pyright: ignore[reportArgumentType]
            reward_funcs=reward,
            args=arguments,
            train_dataset=prompts,
            processing_class=tokenizer,
            callbacks=list(callbacks),
            rollout_func=rollout,
        )
    # Given in the arguments, TRL would copy the adapter as it is now, which a warm start has trained, for a reference.
    trainer.beta = kl
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    return trainer
