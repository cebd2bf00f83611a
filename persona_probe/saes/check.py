"""How good an SAE is on given chat text: explained variance, L0, dead latents, loss recovered when spliced in."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation
from persona_probe.evaluate.answers import answer_batches, answer_logprobs
from persona_probe.models.taps import Tap
from persona_probe.saes.encode import FitMoments, encode_with_fit
from persona_probe.saes.load import check_fit
from persona_probe.saes.stream import residual_stream


class SpliceTap(Tap):
    """Replaces a layer's output by the SAE's reconstruction, or by its mean, at every position but the first.

    The first token is a special one with an outsized norm that SAEs are not trained on (SAELens' own evaluations
    leave it out too).
    """

    def __init__(self, model: nn.Module, layer: int, sae: Any | None, mean: Tensor | None = None) -> None:
        super().__init__(model, layer)
        self.sae, self.mean = sae, mean

    def on_output(self, resid: Tensor) -> Tensor:
        if self.sae is None:
            assert self.mean is not None
            new = self.mean.to(resid).expand_as(resid).clone()
        else:
            flat = resid.float().flatten(0, 1)
            new = self.sae.decode(self.sae.encode(flat)).to(resid.dtype).reshape(resid.shape)
        new[:, 0] = resid[:, 0]
        return new


def check_quality(
    sae: Any,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    layer: int,
    *,
    positions: str = "all",
) -> dict[str, float | int | str]:
    """Quality of `sae` at `layer` on `conversations` that end with answers.

    Returns:
        explained_variance, l0, dead_share (latents that fire on no token here), tokens, loss (nats per answer token)
        plain / spliced / mean_ablated, and loss_recovered = (mean_ablated - spliced) / (mean_ablated - plain).

    Raises:
        InputError: the SAE does not fit the model.
    """
    check_fit(sae, model, layer)
    resid = residual_stream(model, tokenizer, conversations, layer, positions=positions)
    fit = FitMoments()
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    for chunk in resid.split(8192):
        fired |= (encode_with_fit(sae, chunk, fit) > 0).any(dim=0).cpu()
    losses = splice_losses(sae, model, tokenizer, conversations, layer, resid.mean(dim=0))
    span = losses["mean_ablated"] - losses["plain"]
    return {
        "explained_variance": fit.explained_variance,
        "l0": fit.l0,
        "dead_share": float((~fired).float().mean()),
        "loss_recovered": (losses["mean_ablated"] - losses["spliced"]) / span,
        **{f"loss_{k}": v for k, v in losses.items()},
        "tokens": fit.n,
        "conversations": len(conversations),
        "residual_norm": fit.residual_norm,
    }


def splice_losses(
    sae: Any,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    layer: int,
    mean: Tensor,
) -> dict[str, float]:
    """Mean answer loss (nats per token, answers weighted equally): plain, SAE spliced in, layer mean-ablated."""
    answered = [c for c in conversations if c[-1]["role"] == "assistant" and c[-1]["content"]]
    groups = answer_batches(tokenizer, answered)
    losses = {"plain": -float(np.mean(answer_logprobs(model, groups)))}
    with SpliceTap(model, layer, sae):
        losses["spliced"] = -float(np.mean(answer_logprobs(model, groups)))
    with SpliceTap(model, layer, None, mean):
        losses["mean_ablated"] = -float(np.mean(answer_logprobs(model, groups)))
    return losses
