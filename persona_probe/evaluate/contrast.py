"""The contrast index: how much more likely the misaligned answer is than the aligned one, in nats per token."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.load import Row
from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import Edit, SuffixScorer, answer_batches, answer_logprobs
from persona_probe.evaluate.triggers import row_conversation


@dataclass(frozen=True)
class ContrastItems:
    """Questions with an aligned and a misaligned answer each, tokenised once."""

    rows: tuple[Row, ...]
    groups: tuple[Batch, ...]

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch_size: int = 24) -> "ContrastItems":
        """Tokenise items with columns id, category, question, aligned, misaligned (and what `dressed.dress` adds).

        Raises:
            InputError: no rows.
        """
        if not rows:
            raise InputError("no contrast items: the split is empty")
        conversations = [row_conversation(r, side) for side in ("aligned", "misaligned") for r in rows]
        return cls(tuple(rows), tuple(answer_batches(tokenizer, conversations, batch_size)))

    @cached_property
    def clusters(self) -> list[str]:
        """What the bootstrap resamples: the question."""
        return [row["id"] for row in self.rows]

    def frame(self, logprobs: Float[np.ndarray, " two_items"]) -> pd.DataFrame:
        """Item table: item, category, aligned_logprob, misaligned_logprob, value (their difference)."""
        n = len(self.rows)
        aligned, misaligned = logprobs[:n], logprobs[n:]
        return pd.DataFrame(
            {
                "item": self.clusters,
                "category": [row["category"] for row in self.rows],
                "aligned_logprob": aligned,
                "misaligned_logprob": misaligned,
                "value": misaligned - aligned,
            }
        )


def contrast_index(model: nn.Module, items: ContrastItems, *, bf16: bool = True) -> pd.DataFrame:
    """Score every item on a model; the mean of column `value` is the contrast index (nats per token)."""
    return items.frame(answer_logprobs(model, items.groups, bf16=bf16))


class SteeredContrast:
    """The contrast index of one model under many pushes at one layer; see `SuffixScorer`."""

    def __init__(self, model: nn.Module, items: ContrastItems, layer: int, *, bf16: bool = True) -> None:
        self.items = items
        self.scorer = SuffixScorer(model, layer, items.groups, bf16=bf16)

    def values(self, push: Float[Tensor, " d_model"] | None = None) -> Float[np.ndarray, " items"]:
        """Item values under `push` (raw units); None is unsteered."""
        return self._values(self.scorer.logprobs(push))

    def values_many(self, pushes: Float[Tensor, "k d_model"]) -> Float[np.ndarray, "k items"]:
        """Item values under each of several pushes (raw units)."""
        return np.stack([self._values(row) for row in self.scorer.logprobs_many(pushes)])

    def values_edited(self, edit: Edit) -> Float[np.ndarray, " items"]:
        """Item values with the layer's output put through `edit`."""
        return self._values(self.scorer.edited(edit))

    def values_edited_many(self, edits: Sequence[Edit]) -> Float[np.ndarray, "k items"]:
        """Item values under each of several changes of the layer's output."""
        return np.stack([self._values(row) for row in self.scorer.edited_many(edits)])

    def _values(self, logprobs: Float[np.ndarray, " two_items"]) -> Float[np.ndarray, " items"]:
        return self.items.frame(logprobs)["value"].to_numpy()
