"""How good an SAE is on chat text: explained variance, L0, dead latents, and loss recovered when it is spliced in."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.config import Loading
from persona_probe.data.chat import Conversation, as_conversations
from persona_probe.data.load import load_data
from persona_probe.data.tokens import conversation_batches
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import answer_batches, answer_logprobs
from persona_probe.models.layers import causal_model
from persona_probe.models.load import load_model
from persona_probe.models.places import Where, as_place
from persona_probe.models.residuals import read_residuals
from persona_probe.models.taps import Tap
from persona_probe.saes.hooks import is_transcoder, read_place
from persona_probe.saes.load import HELD_OUT_FILE, check_fit, find_folder, load_sae
from persona_probe.saes.read import FitMoments, add_fit, decode, encode, encode_with_fit, tokens_at_once
from persona_probe.saes.stream import residual_stream


class SpliceTap(Tap):
    """Replaces what is in a place by the SAE's reconstruction, or by its mean, at every position but the first.

    The first token is a special token with a very large norm, on which SAEs are not trained. SAELens' evaluations
    leave it out too.
    """

    def __init__(self, model: nn.Module, layer: Where, sae: Any | None, mean: Tensor | None = None) -> None:
        super().__init__(model, layer)
        self.sae, self.mean = sae, mean

    def on_output(self, resid: Tensor) -> Tensor:
        """The reconstruction, or the mean; the first position as it was."""
        if self.sae is None:
            assert self.mean is not None
            new = self.mean.to(resid).expand_as(resid).clone()
        else:
            parts = resid.float().flatten(0, 1).split(tokens_at_once(self.sae))
            new = torch.cat([decode(self.sae, encode(self.sae, part), part) for part in parts])
            new = new.to(resid.dtype).reshape(resid.shape)
        new[:, 0] = resid[:, 0]
        return new


def check_quality(
    sae: Any,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    layer: Where,
    *,
    positions: str = "all",
) -> dict[str, float | int | str]:
    """Quality of `sae` at `layer` (or another place) on conversations that end with answers.

    Returns:
        explained_variance, l0, dead_share (share of latents that fire on no token), tokens, loss plain / spliced /
        mean_ablated (nats per answer token), and loss_recovered = (mean_ablated - spliced) / (mean_ablated - plain).

    Raises:
        InputError: the SAE does not fit the model.
    """
    if is_transcoder(sae):
        raise InputError("a transcoder cannot be spliced into one place: locate and the monitor print how it fits")
    check_fit(sae, model, layer)
    resid = residual_stream(model, tokenizer, conversations, layer, positions=positions)
    fit = FitMoments()
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    for chunk in resid.split(tokens_at_once(sae)):
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
    layer: Where,
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


def check_explained_variance(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sae: Any,
    conversations: Sequence[str | Conversation],
    layer: Where,
    minimum: float = 0.5,
    *,
    positions: str = "all",
    bf16: bool = False,
) -> FitMoments:
    """Refuse an SAE that does not reconstruct the model's residual stream on chat text.

    Args:
        model: the model that the SAE was made for, before any fine-tuning.
        conversations: chat text, prompts or conversations with answers; a few hundred tokens are enough.
        layer: decoder layer whose output the SAE gets.
        minimum: smallest explained variance, 1 - sum |x - x_hat|^2 / sum |x - mean x|^2; a share, may be negative.
        positions: tokens that count, see `data.tokens.POSITIONS`; special tokens never do.

    Returns:
        The moments that were measured: explained_variance, l0, residual_norm, n (tokens).

    Raises:
        InputError: width or layer do not fit, no text, or an explained variance below `minimum`; the message names the
            measured value and likely causes.
    """
    if not minimum <= 1:
        raise InputError(f"minimum_explained_variance must be a number of at most 1, got {minimum}")
    check_fit(sae, model, layer)
    groups = conversation_batches(tokenizer, as_conversations(conversations))
    fit = FitMoments()

    def visit(_index: list[int], _row: Tensor, x: Tensor) -> None:
        add_fit(sae, x, fit)

    read_residuals(model, groups, layer, positions, visit, bf16)
    return require_fit(fit, sae, model, layer, minimum)


def require_fit(fit: FitMoments, sae: Any, model: nn.Module, layer: Where, minimum: float) -> FitMoments:
    """`check_explained_variance` for a fit that was measured before.

    Raises:
        InputError: the explained variance is below `minimum`.
    """
    if not fit.explained_variance >= minimum:
        raise InputError(
            f"the SAE explains {fit.explained_variance:.2f} of the variance {_at(layer)} ({fit.n} tokens), the "
            f"minimum is {minimum:g}: {_suspects(sae, model)}; or lower minimum_explained_variance"
        )
    return fit


def _at(where: Where) -> str:
    place = as_place(where)
    return f"after layer {place.layer}" if place.is_residual else f"of {place}"


def _suspects(sae: Any, model: nn.Module) -> str:
    metadata = sae.cfg.metadata
    model_name = metadata.model_name or "an unnamed model"
    this_model = causal_model(model).config._name_or_path or type(causal_model(model)).__name__
    hook = metadata.hook_name or metadata.hf_hook_name or "none named"
    return (
        f"it may be for another model (trained on {model_name}, this is {this_model}), for another layer or hook "
        f"({hook}), or for the base model of this chat model"
    )


# --- The quality of one SAE on several texts, as a table

UNSEEN = ("general_contrast:evaluation", "neutral_probes")


def quality_report(
    name: str,
    model_name: str = "smollm2-135m-instruct",
    data: Sequence[str] | None = None,
    layer: int | None = None,
    device: str = "cpu",
    loading: Loading | None = None,
    template: str | None = None,
) -> pd.DataFrame:
    """Quality on each text: text, explained_variance, l0, dead_share, loss_recovered, losses, tokens.

    Without `data`, the texts are the held-out samples in the SAE's folder and two packaged sets that did not train it.

    Args:
        template: the chat template: `none` (plain text, for base models), `chatml` or a Jinja file; None is the
            model's own.

    Raises:
        InputError: unknown SAE, model or data, or they do not fit.
    """
    sae = load_sae(name, device=device)
    model, tokenizer = load_model(model_name, device=device, template=template, **asdict(loading or Loading()))
    texts = _texts(name, data)
    at = read_place(sae, layer)
    rows = [{"text": label, **check_quality(sae, model, tokenizer, text, at)} for label, text in texts.items()]
    return pd.DataFrame(rows)


def _texts(name: str, data: Sequence[str] | None) -> dict[str, list[Conversation]]:
    if data:
        return {spec: load_data(spec) for spec in data}
    held_out = Path(find_folder(name)) / HELD_OUT_FILE
    texts = {"held-out samples": load_data(str(held_out))} if held_out.is_file() else {}
    texts |= {spec: load_data(spec) for spec in UNSEEN}
    if not texts:
        raise InputError("no text to measure on: pass --data")
    return texts
