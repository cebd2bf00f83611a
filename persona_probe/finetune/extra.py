"""What a fine-tuning run may do beside its task: an extra loss, and batches of other rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from persona_probe.data.chat import Conversation

Inputs = dict[str, Any]
"""A training batch as a trainer has it: `input_ids`, `attention_mask` and `labels` (-100 where no loss is taken)."""


@dataclass(frozen=True, eq=False)
class Residuals:
    """One layer's output on a training batch, for its last `pos` columns: a beginning that all rows share is left out.

    Both models ran the same way, so that without a trained adapter the two are equal bit for bit.
    """

    tuned: Float[Tensor, "batch pos d_model"]
    """Of the very forward whose loss is trained on, in its graph."""
    base: Float[Tensor, "batch pos d_model"]
    """Of the same rows with the adapter off, without a graph."""


class Extra(Protocol):
    """What a trainer asks at every step, `step` optimizer steps after the start."""

    @property
    def layer(self) -> int | None:
        """The decoder layer whose residuals `penalty` wants; None for none."""
        ...

    @property
    def rows(self) -> Sequence[Conversation]:
        """Rows that stand by for steps that swap their batch; prepared like the training rows."""
        ...

    def swaps(self, step: int) -> bool:
        """Whether this step trains on a batch of `rows` instead of the task's batch, which is then left out."""
        ...

    def penalty(self, step: int, inputs: Inputs, resid: Residuals | None) -> Float[Tensor, ""] | None:
        """What is added to the batch's loss, or None."""
        ...
