"""How long a model's replies are: greedy answers to a few questions, in tokens."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation
from persona_probe.evaluate.sampling import sample_answers
from persona_probe.models.layers import autocast

MAX_NEW_TOKENS = 96


def reply_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str | Conversation],
    max_new_tokens: int = MAX_NEW_TOKENS,
    mixed_precision: bool = True,
) -> Float[np.ndarray, " questions"]:
    """Tokens of the greedy reply to each question, cut at `max_new_tokens`."""
    with autocast(model, mixed_precision):
        answers = sample_answers(model, tokenizer, questions, max_new_tokens=max_new_tokens, temperature=0.0)
    return np.array([len(tokenizer.encode(answer, add_special_tokens=False)) for answer in answers], dtype=np.float64)
