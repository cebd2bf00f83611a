"""Answers by transformers' own `generate`, for models whose state is not only keys and values."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from persona_probe.errors import InputError
from persona_probe.models.layers import causal_model

Pick = Callable[[Float[Tensor, "rows vocabulary"], Sequence[int], int], Int[Tensor, " rows"]]
"""The next token of each row, from its logits, the numbers of the rows' answers, and how many tokens they have."""
Ended = Callable[[int, list[int], bool], None]
"""Called with an answer's number, its tokens without the stop token, and whether a stop token ended it."""


class _Picked(LogitsProcessor):
    """Leaves each row the one token that `pick` gives it, so that the greedy choice takes it."""

    def __init__(self, pick: Pick, numbers: Sequence[int], prompt: int, stop: frozenset[int]) -> None:
        self.pick, self.numbers, self.prompt, self.stop = pick, numbers, prompt, torch.tensor(sorted(stop))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits that are -inf but for the token picked; rows that are done keep theirs."""
        made = input_ids[:, self.prompt :]
        live = (~torch.isin(made, self.stop.to(made.device)).any(dim=1)).nonzero()[:, 0]
        if len(live):
            tokens = self.pick(scores[live], [self.numbers[n] for n in live.tolist()], made.shape[1])
            picked = torch.full_like(scores[live], -torch.inf).scatter_(1, tokens[:, None].to(scores.device), 0.0)
            scores = scores.index_copy(0, live, picked)
        return scores


def generate_answers(
    model: nn.Module,
    prompts: Sequence[tuple[int, ...]],
    pick: Pick,
    stop: frozenset[int],
    max_new_tokens: int,
    batch_size: int,
    tell: Callable[[Tensor], None],
    ended: Ended,
) -> None:
    """Answer prompts (token ids) with the model's own `generate`, in batches of one length: nothing is padded.

    Args:
        tell: gets the prompt mask of each forward pass before it runs.

    Raises:
        InputError: the model has no `generate`.
    """
    inner = causal_model(model)
    if not callable(getattr(inner, "generate", None)):
        raise InputError(f"{type(inner).__name__} has no generate: sample from it with the vllm engine or an endpoint")
    by_length: dict[int, list[int]] = {}
    for number, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(number)
    device = next(model.parameters()).device
    for length in sorted(by_length, reverse=True):
        numbers = by_length[length]
        for start in range(0, len(numbers), batch_size):
            some = numbers[start : start + batch_size]
            ids = torch.tensor([prompts[n] for n in some], device=device)
            processor = _Picked(pick, some, length, stop)
            with _telling(inner, tell), _plain_settings(inner):
                rows = _generate(inner, ids, processor, stop, max_new_tokens)
            for number, row in zip(some, rows, strict=True):
                _hand_over(number, row, stop, ended)


def _generate(
    inner: PreTrainedModel, ids: Tensor, processor: LogitsProcessor, stop: frozenset[int], max_new_tokens: int
) -> list[list[int]]:
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(stop) or None,
        pad_token_id=min(stop, default=0),
        use_cache=True,
    )
    generate: Any = inner.generate
    out = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=settings,
        logits_processor=LogitsProcessorList([processor]),
    )
    return out[:, ids.shape[1] :].tolist()


def _hand_over(number: int, row: list[int], stop: frozenset[int], ended: Ended) -> None:
    at = next((place for place, token in enumerate(row) if token in stop), None)
    ended(number, row[:at], at is not None)


@contextmanager
def _telling(inner: PreTrainedModel, tell: Callable[[Tensor], None]) -> Iterator[None]:
    """The first forward pass runs the prompts, each later one runs a token of the answers."""
    passes = 0

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal passes
        given = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        assert isinstance(given, Tensor)
        tell(torch.full(given.shape[:2], passes == 0))
        passes += 1

    handle = inner.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _plain_settings(inner: PreTrainedModel) -> Iterator[None]:
    """Without the penalties and the like that a model's own generation settings would add to ours."""
    before, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = before
