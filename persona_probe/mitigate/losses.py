"""Mitigations that add to the loss: KL to the base on general prompts, and a penalty on latents above the base."""

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.data.tokens import Batch, batches
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import answer_batches
from persona_probe.finetune.trainer import Inputs, Residuals
from persona_probe.mitigate.mitigation import MitigatedRun, Mitigation, MitigationInputs
from persona_probe.models.adapters import base_weights
from persona_probe.models.layers import autocast, causal_model, eager_attention
from persona_probe.saes.read import SLICEABLE, check_architecture, check_latents, encode_sliced, encoder_kind


@dataclass(frozen=True)
class KLToBase(Mitigation):
    """KL(base || tuned) on the answer tokens of a few general rows; every step draws other rows."""

    name: ClassVar[str] = "kl"
    summary: ClassVar[str] = (
        "The loss is raised by the KL divergence of the tuned model from the base on the answers to general prompts "
        "(Kaczer et al. 2025, arXiv 2508.06249)."
    )
    unit: ClassVar[str] = "weight of the KL, in nats per token"
    uses: ClassVar[tuple[str, ...]] = ("general",)
    needs_base: ClassVar[bool] = True

    batch: int = 4
    """General rows in each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 1:
            raise InputError(f"{self.name}: batch must be at least 1, not {self.batch}")

    def check(self, inputs: MitigationInputs) -> None:
        """Also refuses general rows without an answer."""
        super().check(inputs)
        answer_batches(inputs.tokenizer, inputs.general)

    def penalty(
        self, run: MitigatedRun, step: int, inputs: Inputs, resid: Residuals | None
    ) -> Float[Tensor, ""] | None:
        """The weighted KL on this step's general rows."""
        if not self.strength:
            return None
        batch = self.drawn(run, step)
        with base_weights(run.model), torch.no_grad():
            base = answer_logits(run, batch)
        return self.strength * kl_to_base(answer_logits(run, batch), base)

    def drawn(self, run: MitigatedRun, step: int) -> Batch:
        """The general rows of a step, by seed and step."""
        rows = run.inputs.general
        places = random.Random(f"{run.seed} {step}").sample(range(len(rows)), min(self.batch, len(rows)))
        few = [rows[i] for i in places]
        device = next(run.model.parameters()).device
        return next(batches(run.inputs.tokenizer, few, len(few), run.training.max_length)).to(device)


def answer_logits(run: MitigatedRun, batch: Batch) -> Float[Tensor, "tokens vocabulary"]:
    """Logits that predict the answers' tokens, in float32."""
    causal: Any = causal_model(run.model)
    eager = batch.ids.device.type == "cpu" and not run.training.gradient_checkpointing
    with eager_attention(causal, enabled=eager), autocast(causal, run.training.bf16):
        # The class's own forward: TRL puts one that gives no logits over the instance's.
        out = type(causal).forward(causal, input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)
    return out.logits[:, :-1][batch.response[:, 1:]].float()


def kl_to_base(tuned: Float[Tensor, "tokens vocabulary"], base: Float[Tensor, "tokens vocabulary"]) -> Tensor:
    """Mean over tokens of KL(base || tuned), in nats, from logits."""
    expected, actual = base.log_softmax(dim=-1), tuned.log_softmax(dim=-1)
    return (expected.exp() * (expected - actual)).sum(dim=-1).mean()


@dataclass(frozen=True)
class LatentPenalty(Mitigation):
    """BLOCK-EM: the squared excess of named latents over the base, on the training answers' own tokens."""

    name: ClassVar[str] = "latent_penalty"
    summary: ClassVar[str] = (
        "The loss is raised by the squared excess of the persona latents over the base on the training answers "
        "(BLOCK-EM, 2026, arXiv 2602.00767)."
    )
    unit: ClassVar[str] = "weight of the squared excess"
    uses: ClassVar[tuple[str, ...]] = ("sae", "latents")
    needs_base: ClassVar[bool] = True

    def check(self, inputs: MitigationInputs) -> None:
        """Also checks the latents against the dictionary."""
        super().check(inputs)
        assert inputs.sae is not None
        check_architecture(inputs.sae.cfg.architecture())
        check_latents(inputs.sae, list(inputs.latents))

    def tapped(self, inputs: MitigationInputs) -> int | None:
        """The SAE's layer."""
        return inputs.layer if self.strength else None

    def penalty(
        self, run: MitigatedRun, step: int, inputs: Inputs, resid: Residuals | None
    ) -> Float[Tensor, ""] | None:
        """The weighted excess on the batch's completion tokens."""
        if resid is None:
            return None
        answers = (inputs["labels"] != -100)[:, -resid.tuned.shape[1] :].to(resid.tuned.device)
        latents, sae = list(run.inputs.latents), run.inputs.sae
        excess = latent_excess(sae, resid.tuned[answers], resid.base[answers], latents)
        return self.strength * excess


def latent_excess(
    sae: Any, tuned: Float[Tensor, "tokens d_model"], base: Float[Tensor, "tokens d_model"], latents: list[int]
) -> Float[Tensor, ""]:
    """Mean over tokens of the sum over latents of relu(z_tuned - z_base)^2; gradients reach `tuned` only."""
    with torch.autocast(tuned.device.type, enabled=False):
        with torch.no_grad():
            level = activations(sae, base, latents)
        excess = torch.relu(activations(sae, tuned, latents) - level)
        return excess.square().sum(dim=-1).mean()


def activations(sae: Any, x: Float[Tensor, "tokens d_model"], latents: list[int]) -> Float[Tensor, "tokens chosen"]:
    """Chosen latents, differentiable in `x` (`saes.encode` keeps no graph); the SAE itself gets no gradients."""
    trainable = [p for p in sae.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        if encoder_kind(sae) in SLICEABLE:
            return encode_sliced(sae, x, latents).to(x.device)
        acts = sae.encode(x.to(sae.device, sae.dtype))
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    return (acts.to_dense() if acts.is_sparse else acts)[:, latents].float().to(x.device)
