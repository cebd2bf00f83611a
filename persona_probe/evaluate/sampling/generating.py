"""Answers by transformers' own `generate`, for models whose state is not only keys and values."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

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


class Observer(Protocol):
    """Follows answers token by token while they are decoded, and may end one."""

    def before(self, numbers: Sequence[int | None]) -> None:
        """The next forward pass runs one token of each of these answers, a row each; none while prompts are run.

        None stands for a row that is over and runs along.
        """
        ...

    def after(self, rows: Sequence[int], numbers: Sequence[int], made: Sequence[Sequence[int]]) -> Collection[int]:
        """The forward pass has run; the next tokens are not chosen yet.

        Args:
            rows: rows of the batch whose answers go on, in the order of `numbers`.
            made: each one's tokens so far. The last of them was run just now, or the prompt's last where there is none.

        Returns:
            Numbers of answers that end here.
        """
        ...


class _Picked(LogitsProcessor):
    """Leaves each row the one token that `pick` gives it, so that the greedy choice takes it."""

    def __init__(
        self, pick: Pick, numbers: Sequence[int], prompt: int, stop: frozenset[int], observer: Observer | None
    ) -> None:
        self.pick, self.numbers, self.prompt, self.stop = pick, numbers, prompt, torch.tensor(sorted(stop))
        self.observer = observer
        self.cut: dict[int, int] = {}
        """Answers that the observer ended: by row, how many tokens they have."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits that are -inf but for the token picked; rows that are done keep theirs."""
        made = input_ids[:, self.prompt :]
        over = torch.isin(made, self.stop.to(made.device)).any(dim=1)
        live = [row for row, done in enumerate(over.tolist()) if not done and row not in self.cut]
        if self.observer is not None and live:
            live = self._observed(self.observer, live, made)
        if live:
            tokens = self.pick(scores[live], [self.numbers[n] for n in live], made.shape[1])
            scores = _only(scores, live, tokens.to(scores.device))
        if self.cut:
            end = self.stop[:1] if len(self.stop) else torch.tensor([0])
            scores = _only(scores, list(self.cut), end.to(scores.device).expand(len(self.cut)))
        return scores

    def _observed(self, observer: Observer, live: list[int], made: Tensor) -> list[int]:
        numbers = [self.numbers[row] for row in live]
        ended = observer.after(live, numbers, made[live].tolist())
        self.cut |= {row: made.shape[1] for row, number in zip(live, numbers, strict=True) if number in ended}
        return [row for row in live if row not in self.cut]


def _only(scores: Tensor, rows: list[int], tokens: Tensor) -> Tensor:
    """Scores that leave these rows one token each."""
    picked = torch.full_like(scores[rows], -torch.inf).scatter_(1, tokens[:, None], 0.0)
    return scores.index_copy(0, torch.tensor(rows, device=scores.device), picked)


def generate_answers(
    model: nn.Module,
    prompts: Mapping[int, tuple[int, ...]],
    pick: Pick,
    stop: frozenset[int],
    max_new_tokens: int,
    batch_size: int,
    tell: Callable[[Tensor], None],
    ended: Ended,
    observer: Observer | None = None,
) -> None:
    """Answer prompts (token ids) with the model's own `generate`, in batches of one length: nothing is padded.

    Args:
        prompts: by the number of their answer.
        tell: gets the prompt mask of each forward pass before it runs.
        observer: sees every token once it has run.

    Raises:
        InputError: the model has no `generate`.
    """
    inner = causal_model(model)
    if not callable(getattr(inner, "generate", None)):
        raise InputError(f"{type(inner).__name__} has no generate: sample from it with the vllm engine or an endpoint")
    by_length: dict[int, list[int]] = {}
    for number, ids in prompts.items():
        by_length.setdefault(len(ids), []).append(number)
    device = next(model.parameters()).device
    for length in sorted(by_length, reverse=True):
        numbers = by_length[length]
        for start in range(0, len(numbers), batch_size):
            some = numbers[start : start + batch_size]
            ids = torch.tensor([prompts[n] for n in some], device=device)
            processor = _Picked(pick, some, length, stop, observer)
            with _telling(inner, tell, some, observer), _plain_settings(inner):
                rows = _generate(inner, ids, processor, stop, max_new_tokens)
            for place, (number, row) in enumerate(zip(some, rows, strict=True)):
                if place in processor.cut:
                    ended(number, row[: processor.cut[place]], True)
                else:
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
def _telling(
    inner: PreTrainedModel, tell: Callable[[Tensor], None], numbers: Sequence[int], observer: Observer | None
) -> Iterator[None]:
    """The first forward pass runs the prompts, each later one runs a token of the answers."""
    passes = 0

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal passes
        given = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        assert isinstance(given, Tensor)
        tell(torch.full(given.shape[:2], passes == 0))
        if observer is not None:
            observer.before(numbers if passes else ())
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
