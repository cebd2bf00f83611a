"""The passages on which latents fire most: a bounded store for each latent, and their texts."""

import heapq
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_probe.locate.feature_card import Example

TOP_EXAMPLES = 5
BEFORE, AFTER = 120, 40
"""Tokens that a passage keeps on the two sides of its maximum."""


@dataclass(frozen=True)
class Passage:
    """A part of one conversation as a latent sees it; the template's special tokens are left out."""

    source: str
    """The packaged set or the file that it is from."""
    ids: Int[Tensor, " pos"]
    """Tokens of prompt and answer."""
    values: Float[Tensor, " pos"]
    """The latent's activation on each of them."""
    cut_before: bool = False
    cut_after: bool = False


class TopPassages:
    """Of every latent the `TOP_EXAMPLES` passages with the highest activation, whatever the amount of text.

    They are kept apart by origin, so that a large packaged text leaves room for the user's own.
    """

    def __init__(self, n_latents: int) -> None:
        self.n_latents = n_latents
        self._heaps: dict[tuple[str, int], list[tuple[float, int, Passage]]] = {}

    def add(
        self,
        origin: str,
        source: str,
        number: int,
        ids: Int[Tensor, " pos"],
        values: Float[Tensor, "pos latents"],
    ) -> None:
        """Offer one conversation; `number` is its place in the text, and of two equal ones the earlier stays."""
        if not len(ids):
            return
        for column, peak in enumerate(values.amax(dim=0).tolist()):
            heap = self._heaps.setdefault((origin, column), [])
            key = (peak, -number)
            if peak <= 0 or (len(heap) == TOP_EXAMPLES and key <= heap[0][:2]):
                continue
            heapq.heappush(heap, (*key, window(source, ids, values[:, column])))
            if len(heap) > TOP_EXAMPLES:
                heapq.heappop(heap)

    def best(self, column: int) -> list[Passage]:
        """A latent's passages, the strongest first; of two equal ones that which comes first in the text."""
        held = [entry for (_, c), heap in self._heaps.items() if c == column for entry in heap]
        return [passage for *_, passage in sorted(held, key=lambda entry: entry[:2], reverse=True)]

    def silent_origins(self, column: int) -> list[str]:
        """Origins without a passage on which this latent fires."""
        return [origin for (origin, c), heap in self._heaps.items() if c == column and not heap]


def window(source: str, ids: Int[Tensor, " pos"], values: Float[Tensor, " pos"]) -> Passage:
    """The tokens around the maximum, copied out of their batch."""
    peak = int(values.argmax())
    start, stop = max(0, peak - BEFORE), peak + AFTER + 1
    return Passage(source, ids[start:stop].clone(), values[start:stop].clone(), start > 0, stop < len(ids))


def example(tokenizer: PreTrainedTokenizerBase, passage: Passage) -> Example:
    """A passage in text."""
    values = tuple(round(v, 3) for v in passage.values.tolist())
    return Example(
        source=passage.source,
        tokens=tuple(str(tokenizer.decode([i])) for i in passage.ids.tolist()),
        values=values,
        maximum=max(values),
        peak=int(passage.values.argmax()),
        cut_before=passage.cut_before,
        cut_after=passage.cut_after,
    )
