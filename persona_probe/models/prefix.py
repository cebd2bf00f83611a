"""Compute the beginning that all prompts of a batch share only once; it is mostly the template's system prompt."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import DynamicCache, PretrainedConfig

from persona_probe.data.tokens import Batch

T = TypeVar("T")

SHORTEST = 4
"""A shorter beginning, in tokens, is not worth a separate forward pass."""
CACHED_LAYERS = {"full_attention", "sliding_attention"}


class SuffixCache(DynamicCache):
    """Keys and values of a model's upper layers only; the layers keep counting their index from the bottom."""

    def __init__(self, config: PretrainedConfig, first_layer: int = 0) -> None:
        super().__init__(config=config)
        self.first_layer = first_layer

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store under the layer's place in this cache."""
        return super().update(key_states, value_states, layer_idx - self.first_layer, *args, **kwargs)


def shared_length(batch: Batch, config: PretrainedConfig) -> int:
    """How many leading tokens are the same in every row, without any row's last prompt token.

    Zero if sharing saves nothing, or if a layer keeps other state than keys and values.
    """
    attends = getattr(config, "num_attention_heads", None) is not None
    if len(batch.ids) < 2 or not attends or not set(getattr(config, "layer_types", None) or ()) <= CACHED_LAYERS:
        return 0
    most = int(batch.prompt.sum(dim=1).min()) - 1
    same = (batch.ids == batch.ids[:1]).all(dim=0)[: max(most, 0)]
    length = int(same.long().cumprod(dim=0).sum())
    return length if length >= SHORTEST else 0


def without_prefix(batch: Batch, length: int) -> Batch:
    """The batch's columns after the first `length`."""
    return batch.columns(slice(length, None))


def repeat(batch: Batch, times: int) -> Batch:
    """The batch's rows `times` over."""
    return batch.repeat(times)


@dataclass(frozen=True)
class Rows:
    """A batch in two parts: a shared beginning (one row), and what follows it in each row."""

    batch: Batch
    shared: int
    rest: Batch

    @classmethod
    def of(cls, batch: Batch, config: PretrainedConfig) -> "Rows":
        """Split a batch for a model of this configuration."""
        shared = shared_length(batch, config)
        return cls(batch, shared, without_prefix(batch, shared))

    @classmethod
    def whole(cls, batch: Batch) -> "Rows":
        """The batch in one part, for readings that need the beginning's activations."""
        return cls(batch, 0, batch)

    def to(self, device: torch.device | str) -> "Rows":
        """The same rows on another device."""
        return Rows(self.batch.to(device), self.shared, self.rest.to(device))

    def repeated(self, times: int) -> "Rows":
        """The same rows several times, one whole batch after the other; each repetition has its own beginning."""
        return Rows(repeat(self.batch, times), self.shared, repeat(self.rest, times))

    def ids(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Model inputs of the beginning and of the rest, as token ids."""
        return {"input_ids": self.batch.ids[:1, : self.shared]}, {"input_ids": self.rest.ids}

    def run(
        self,
        forward: Callable[..., T],
        config: PretrainedConfig,
        inputs: tuple[dict[str, Any], dict[str, Any]],
        first_layer: int = 0,
    ) -> T:
        """Call `forward` for the beginning, then for the rest with the beginning's keys and values.

        Returns:
            What the second call returns.

        Args:
            forward: a transformer without its head, or its layers from `first_layer` on.
            inputs: `input_ids` or `inputs_embeds` of the two parts; the beginning may have a row for each repetition.
        """
        beginning, rest = inputs
        if self.shared == 0:
            with _running(self, False):
                return forward(**rest, attention_mask=self.batch.attention, use_cache=False)
        cache = SuffixCache(config, first_layer)
        with _running(self, True):
            forward(**beginning, past_key_values=cache, use_cache=True)
        several = next(iter(beginning.values())).shape[0]
        cache.batch_repeat_interleave(len(self.batch.ids) // several)
        with _running(self, False):
            return forward(**rest, attention_mask=self.batch.attention, past_key_values=cache, use_cache=True)


# --- Hooks are told what a forward runs: its inputs hold no labels, and of a shared beginning one row


@dataclass(frozen=True)
class Running:
    """What `Rows.run` is running."""

    rows: Rows
    beginning: bool
    """The shared beginning, and not what follows it."""


_now: ContextVar[Running | None] = ContextVar("rows that are run", default=None)


def running() -> Running | None:
    """The rows whose forward this is; None in a forward that `Rows.run` did not start."""
    return _now.get()


@contextmanager
def _running(rows: Rows, beginning: bool) -> Iterator[None]:
    before = _now.set(Running(rows, beginning))
    try:
        yield
    finally:
        _now.reset(before)
