"""Log-probabilities of given answers: full forward, or only the layers above a captured residual stream."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.tokens import Batch, batches
from persona_probe.errors import InputError
from persona_probe.models.layers import (
    autocast,
    base_transformer,
    causal_model,
    evaluating,
    layer_list_name,
    output_head,
    run_to_layer,
)
from persona_probe.models.taps import ReadTap, SteerTap

TOKENS_AT_ONCE = 256
"""Answer tokens whose logits are held at once: their memory is this many times the vocabulary."""


def answer_batches(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], batch_size: int = 24
) -> list[Batch]:
    """Tokenised batches of conversations that all end with an answer.

    Raises:
        InputError: a conversation without an answer.
    """
    for number, messages in enumerate(conversations):
        if not split_answer(messages)[1]:
            raise InputError(f"conversation {number} ends without an answer: give the answer to be scored")
    return list(batches(tokenizer, conversations, batch_size))


def _predictors(batch: Batch) -> Tensor:
    """Positions whose next token is an answer token: (batch, pos) mask."""
    mask = torch.zeros_like(batch.response)
    mask[:, :-1] = batch.response[:, 1:]
    return mask


def _logits(model: nn.Module, hidden: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
    causal = causal_model(model)
    logits = output_head(causal)(hidden).float()
    # Cohere multiplies its logits, Granite divides them, Gemma 2 caps them.
    if scale := getattr(causal.config, "logit_scale", None):
        logits = logits * scale
    if divisor := getattr(causal.config, "logits_scaling", None):
        logits = logits / divisor
    cap = getattr(causal.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _score(model: nn.Module, hidden: Float[Tensor, "batch pos d_model"], batch: Batch) -> Float[Tensor, " batch"]:
    """Mean log-probability of each row's answer tokens, in nats per token; a few tokens' logits at a time."""
    at = _predictors(batch)
    targets = batch.ids[:, 1:][at[:, :-1]]
    parts = []
    for states, wanted in zip(hidden[at].split(TOKENS_AT_ONCE), targets.split(TOKENS_AT_ONCE), strict=True):
        logits = _logits(model, states)
        parts.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(dim=1))
    picked = torch.cat(parts)
    row = at.nonzero()[:, 0]
    total = torch.zeros(len(batch.ids), device=picked.device).index_add_(0, row, picked)
    return total / at.sum(dim=1)


def answer_logprobs(
    model: nn.Module, groups: Sequence[Batch], *, mixed_precision: bool = True
) -> Float[np.ndarray, " conversations"]:
    """Mean log-probability of every conversation's answer (nats per token), in the conversations' order."""
    out = np.zeros(sum(len(b.index) for b in groups))
    device = next(model.parameters()).device
    with evaluating(model), autocast(model, mixed_precision):
        for group in groups:
            batch = group.to(device)
            hidden = base_transformer(model)(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)[0]
            out[batch.index] = _score(model, hidden, batch).cpu().numpy()
    return out


def suffix_of(model: nn.Module, layer: int) -> nn.Module:
    """The model's transformer with only the layers above `layer`, sharing their weights; feed it `inputs_embeds`."""
    whole = base_transformer(model)
    name = layer_list_name(whole)
    view = copy.copy(whole)
    view._modules = dict(whole._modules)
    view._modules[name] = nn.ModuleList(list(getattr(whole, name))[layer + 1 :])
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = len(getattr(view, name))  # pyright: ignore
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[layer + 1 :]  # pyright: ignore
    view.config = config  # pyright: ignore
    return view


@dataclass(frozen=True)
class Captured:
    """The residual stream after a layer, for one batch."""

    resid: Float[Tensor, "batch pos d_model"]
    batch: Batch


class SuffixScorer:
    """Scores the same answers under many pushes at one layer, running only the layers above it each time.

    The residual stream after `layer` is captured once. At construction the unpushed result is compared with full
    forwards; where a model cannot run by its suffix, `exact` is False and every score uses full forwards with a hook.

    Args:
        model: base model, or a PEFT model (its adapters as they are now set).
        groups: what `answer_batches` gives.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: int,
        groups: Sequence[Batch],
        *,
        mixed_precision: bool = True,
        tolerance: float = 1e-3,
    ) -> None:
        self.model, self.layer, self.mixed_precision = model, layer, mixed_precision
        device = next(model.parameters()).device
        self.groups = [g.to(device) for g in groups]
        self.n = sum(len(g.index) for g in groups)
        self.unpushed = answer_logprobs(model, self.groups, mixed_precision=mixed_precision)
        self.captured = [self._capture(g) for g in self.groups]
        self.suffix = suffix_of(model, layer)
        self.exact = self._agrees(tolerance)

    def _capture(self, batch: Batch) -> Captured:
        with evaluating(self.model), autocast(self.model, self.mixed_precision), ReadTap(self.model, self.layer) as tap:
            run_to_layer(self.model, self.layer, batch.ids, batch.attention)
        return Captured(tap.value, batch)

    def _agrees(self, tolerance: float) -> bool:
        try:
            again = self._by_suffix(None)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False
        return bool(np.abs(again - self.unpushed).max() <= tolerance)

    def logprobs(self, push: Float[Tensor, " d_model"] | None = None) -> Float[np.ndarray, " conversations"]:
        """Mean answer log-probabilities with `push` (raw units) added after the layer, at all positions."""
        if self.exact:
            return self._by_suffix(push)
        if push is None:
            return self.unpushed
        with SteerTap(self.model, self.layer, push):
            return answer_logprobs(self.model, self.groups, mixed_precision=self.mixed_precision)

    def _by_suffix(self, push: Tensor | None) -> np.ndarray:
        out = np.zeros(self.n)
        with evaluating(self.model), autocast(self.model, self.mixed_precision):
            for item in self.captured:
                resid = item.resid if push is None else item.resid + push.to(item.resid)
                hidden = self.suffix(inputs_embeds=resid, attention_mask=item.batch.attention, use_cache=False)[0]
                out[item.batch.index] = _score(self.model, hidden, item.batch).cpu().numpy()
        return out
