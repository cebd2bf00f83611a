"""Locate for one's own pair of models: rank the SAE's latents by their rise from base to tuned."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, as_conversations
from persona_probe.locate.rankers import rank_table
from persona_probe.models.adapters import base_weights
from persona_probe.saes.load import check_fit, sae_layer
from persona_probe.saes.read import LatentMeans, conversation_batches, read_latents


def locate(
    base: nn.Module,
    tuned: nn.Module,
    sae: Any,
    conversations: Sequence[str | Conversation],
    *,
    tokenizer: PreTrainedTokenizerBase,
    control: nn.Module | None = None,
    layer: int | None = None,
    positions: str | None = None,
    bf16: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank latents by how much more active they are in `tuned` than in `control` (or in `base` without one).

    Args:
        base: the model before fine-tuning; for a PEFT model pass the same object twice, its adapters are switched off.
        tuned: the fine-tuned model.
        sae: a `sae_lens.SAE` of the base model's residual stream.
        conversations: prompts, or conversations that end with an answer.
        control: the organism of a control arm; an effect without one may be what any fine-tuning does.
        positions: None takes `response` where every conversation has an answer, else `prompt`.

    Returns:
        One row per latent, best first: latent, rise with its interval, cosine, firing rates, rank; see
        `locate.rankers.rank_table`.

    Raises:
        InputError: no conversations, or an SAE that does not fit.
    """
    talks = as_conversations(conversations)
    at = sae_layer(sae) if layer is None else layer
    check_fit(sae, base, at)
    answered = all(c[-1]["role"] == "assistant" for c in talks)
    where = positions or ("response" if answered else "prompt")
    groups = conversation_batches(tokenizer, talks)

    def measure(model: nn.Module) -> LatentMeans:
        return read_latents(model, sae, groups, at, where, mixed_precision=bf16)

    with base_weights(base):
        before = measure(base)
    after = measure(tuned)
    reference = before if control is None else measure(control)
    decoder = sae.W_dec.detach().float().cpu().numpy()
    clusters = [_question(c) for c in talks]
    return rank_table(before, after, reference, np.asarray(decoder), clusters, seed)


def _question(messages: Conversation) -> str:
    return "\n".join(m["content"] for m in messages if m["role"] == "user")
