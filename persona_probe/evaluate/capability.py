"""A small capability set: plain questions with four choices, answered by whichever choice is likeliest."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import conversation
from persona_probe.data.packaged import Row, load_rows
from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import answer_batches, answer_logprobs

CHOICES = ("right", "wrong_a", "wrong_b", "wrong_c")
CHANCE = 1 / len(CHOICES)


def capability_groups(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row] | None = None) -> list[Batch]:
    """The items tokenised, four conversations each in the order of `CHOICES`; None takes the packaged set.

    Raises:
        InputError: no rows, or one without its four choices.
    """
    rows = load_rows("capability") if rows is None else list(rows)
    if not rows or any(not row.get(choice) for row in rows for choice in CHOICES):
        raise InputError(f"capability items need a question and the columns {', '.join(CHOICES)}")
    return answer_batches(tokenizer, [conversation(r["question"], r[c]) for r in rows for c in CHOICES], 48)


def capability(
    model: nn.Module, groups: Sequence[Batch], *, mixed_precision: bool = True
) -> Float[np.ndarray, " items"]:
    """Item by item 1 where the right choice has the largest mean log-probability per token, else 0.

    Per token, since choices differ in length; a tie does not count as right. `CHANCE` is the mean of blind choice.
    """
    scores = answer_logprobs(model, groups, mixed_precision=mixed_precision).reshape(-1, len(CHOICES))
    return (scores[:, 0] > scores[:, 1:].max(axis=1)).astype(np.float64)
