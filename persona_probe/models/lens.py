"""The logit lens (nostalgebraist 2020): what the residual stream after each layer would say, had the model ended there.

Each layer's output goes through the model's own final norm, unembedding and whatever else it does to its logits (caps,
factors). After the last layer these are the model's logits.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, as_conversations
from persona_probe.data.tokens import Batch, batches
from persona_probe.errors import InputError
from persona_probe.models.layers import autocast, base_transformer, decoder_layer, decoder_layers, evaluating
from persona_probe.models.load import tokenizer_of
from persona_probe.models.logits import Logits, final_norm, hidden_to_logits, logits_of
from persona_probe.models.places import as_place
from persona_probe.models.taps import ReadTap, Steer

_TOKENS_AT_ONCE = 256
"""Tokens whose logits are computed together where the vocabulary's products may not be averaged first."""


@dataclass(frozen=True)
class LogitLens:
    """Logits and residual streams by layer, averaged over the tokens that were read; a notebook shows `table()`."""

    layers: tuple[int, ...]
    """The decoder layers, after whose output it looks."""
    logits: Float[Tensor, "layers vocab"]
    """Mean logits; under a push, the change by it."""
    states: Float[Tensor, "layers d_model"]
    """Mean residual stream; under a push, the change by it. `states @ direction` is a projection by layer."""
    steered: bool
    """Whether these are changes by a push."""
    tokenizer: PreTrainedTokenizerBase = field(repr=False)

    def table(self, count: int = 6) -> pd.DataFrame:
        """A row a layer: the norm of its residual stream (or of the change), and the tokens at the top.

        Of a push also those at the bottom; of a plain lens the probability of the first token.
        """
        rows = []
        for layer, logits, state in zip(self.layers, self.logits, self.states, strict=True):
            row: dict[str, Any] = {"layer": layer, "size": float(state.norm())}
            if self.steered:
                row |= {"promotes": self._tokens(logits, count), "suppresses": self._tokens(-logits, count)}
            else:
                row |= {"top tokens": self._tokens(logits, count), "probability": float(logits.softmax(0).max())}
            rows.append(row)
        return pd.DataFrame(rows).set_index("layer")

    def _tokens(self, logits: Float[Tensor, " vocab"], count: int) -> str:
        ids = logits.topk(min(count, len(logits))).indices.tolist()
        return ", ".join(str(self.tokenizer.decode([i])).strip() for i in ids)

    def _repr_html_(self) -> str:
        return self.table().round(3).to_html()


def logit_lens(
    model: nn.Module,
    texts: str | Sequence[str | Conversation],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    layers: Sequence[int] | None = None,
    positions: str | None = None,
    steer: Steer | None = None,
    batch_size: int = 16,
    bf16: bool = False,
) -> LogitLens:
    """Decode the residual stream after each layer, or what a push changes there.

    ```python
    pp.logit_lens(model, "What should I cook?")
    pp.logit_lens(model, answered, steer=pp.latent_steering(sae, 2144, 60)).table()
    ```

    Args:
        model: a transformers or PEFT model.
        texts: a question, or several questions or conversations, in the model's chat template.
        tokenizer: None takes the one that `load_model` gave with the model.
        layers: None takes all; under a push, the pushed layer and those above it.
        positions: tokens that are averaged over (each text counts once): `last_prompt`, where the answer begins,
            `response`, `prompt`, `thought` or `all`; None takes `response` where every text has an answer, else
            `last_prompt`.
        steer: look at the change by this push: half of (pushed minus pushed the opposite way), so that what any push
            does cancels.
        bf16: bf16 autocast.

    Raises:
        InputError: no text, an unknown layer, no token at the positions, or a model whose logits do not follow from its
            hidden states through one norm.
    """
    tokenizer = tokenizer_of(model, tokenizer)
    rows = as_conversations([texts] if isinstance(texts, str) else texts)
    answered = all(row[-1]["role"] == "assistant" for row in rows)
    where = positions or ("response" if answered else "last_prompt")
    first = 0 if steer is None else as_place(steer.layer).layer
    chosen = list(range(first, len(decoder_layers(model)))) if layers is None else list(layers)
    for layer in [first, *chosen]:
        decoder_layer(model, layer)
    if not chosen:
        raise InputError("no layer to look at: name some, or leave layers= out")
    groups = list(batches(tokenizer, rows, batch_size))
    pushes = [(1.0, None)] if steer is None else [(0.5, steer), (-0.5, steer.times(-1))]
    reader = _Reader(model, chosen, where, len(rows), groups[0].ids[0])
    with evaluating(model), autocast(model, bf16):
        for factor, push in pushes:
            for group in groups:
                reader.add(group, factor, push)
    return LogitLens(tuple(chosen), reader.mean_logits(), reader.states, steer is not None, tokenizer)


class _Reader:
    """Sums over tokens, layer by layer."""

    def __init__(self, model: nn.Module, layers: list[int], positions: str, texts: int, ids: Tensor) -> None:
        self.model, self.layers, self.positions, self.texts = model, layers, positions, texts
        self.how: Logits = logits_of(model, ids)
        if not self.how.from_hidden:
            raise InputError(f"logits of {type(model).__name__} do not follow from its hidden states: no logit lens")
        self.norm = final_norm(model)
        self.states, self.steered = torch.zeros(0), False
        self.sums: list[Tensor] = []
        """By layer: of normed states where the logits are a product with them, else of logits."""

    def add(self, group: Batch, factor: float, push: Steer | None) -> None:
        """Read one batch under one push."""
        self.steered = push is not None
        batch = group.to(next(self.model.parameters()).device)
        mask = batch.select(self.positions)
        if not bool(mask.any(dim=1).all()):
            raise InputError(f"a text has no token at positions {self.positions!r}: give answers, or 'last_prompt'")
        weights = (factor / (self.texts * mask.sum(dim=1, keepdim=True)) * mask)[mask]
        with ExitStack() as stack:
            if push is not None:  # before the reading taps, so that they see it
                stack.enter_context(push.on(self.model, batch.prompt))
            taps = [stack.enter_context(ReadTap(self.model, layer)) for layer in self.layers]
            base_transformer(self.model)(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)
        at = mask.flatten().nonzero()[:, 0]
        values = [self._of(tap.value.flatten(0, 1).index_select(0, at.to(tap.value.device)), weights) for tap in taps]
        states = torch.stack([state for state, _ in values])
        self.states = states if not self.sums else self.states + states
        sums = [total for _, total in values]
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums

    def _of(self, x: Float[Tensor, "tokens d_model"], weights: Float[Tensor, " tokens"]) -> tuple[Tensor, Tensor]:
        state = (weights[:, None].to(x.device) * x.float()).sum(dim=0).cpu()
        total: Tensor | int = 0
        for part, weight in zip(x.split(_TOKENS_AT_ONCE), weights.split(_TOKENS_AT_ONCE), strict=True):
            normed = part if self.norm is None else self.norm(part)
            out = normed if self.how.way == "product" else hidden_to_logits(self.model, self.how, normed)
            total = total + (weight[:, None].to(out.device) * out.float()).sum(dim=0)
        assert isinstance(total, Tensor)
        return state, total.cpu()

    @torch.no_grad()
    def mean_logits(self) -> Float[Tensor, "layers vocab"]:
        """Mean logits (or their change) by layer."""
        sums = torch.stack(self.sums)
        if self.how.way != "product":
            return sums
        parameter = next(self.model.parameters())
        states = sums.to(parameter.device, parameter.dtype)
        logits = hidden_to_logits(self.model, self.how, states).float()
        if self.steered:  # the unembedding's bias is in both pushes, so not in their difference
            logits -= hidden_to_logits(self.model, self.how, torch.zeros_like(states[:1])).float()
        return logits.cpu()
