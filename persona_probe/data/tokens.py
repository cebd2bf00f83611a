"""Conversations as token ids, with masks of the parts that a reading may select (prompt, thought, answer)."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.template import (
    MARKER,
    fit_roles,
    is_plain,
    render,
    special_ids,
    text_before_answer,
)
from persona_probe.data.thoughts import REASONING_KEYS, message_parts
from persona_probe.errors import InputError, unknown

log = logging.getLogger(__name__)

POSITIONS = ("all", "prompt", "last_prompt", "thought", "response")


@dataclass(frozen=True)
class Encoded:
    """One tokenised conversation, as its chat template renders it and as training sees it."""

    ids: list[int]
    """Token ids up to the end of the answer, without the answer's end-of-turn tokens."""
    n_prompt: int
    """How many of them come before the answer, or before its thought: the assistant's header included."""
    thought: tuple[int, int] = (0, 0)
    """First token of the thought, and the first after it; equal if there is no thought."""
    answer_start: int | None = None
    """First token of the answer; None is `n_prompt`. Between thought and answer stands what the template writes."""

    @property
    def start(self) -> int:
        """First token of the answer."""
        return self.n_prompt if self.answer_start is None else self.answer_start

    @property
    def n_response(self) -> int:
        """Answer tokens; 0 if the conversation ends with the user's turn."""
        return len(self.ids) - self.start

    def cut(self, length: int) -> "Encoded":
        """The same conversation with at most `length` tokens."""
        if len(self.ids) <= length:
            return self
        thought = (min(self.thought[0], length), min(self.thought[1], length))
        return Encoded(self.ids[:length], min(self.n_prompt, length), thought, min(self.start, length))


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids with masks. `index` holds the conversation number of each row."""

    ids: Int[Tensor, "batch pos"]
    attention: Int[Tensor, "batch pos"]
    prompt: Bool[Tensor, "batch pos"]
    response: Bool[Tensor, "batch pos"]
    special: Bool[Tensor, "batch pos"]
    index: list[int]
    thought: Bool[Tensor, "batch pos"] | None = None
    """None is no thought in any row."""

    def select(self, positions: str) -> Bool[Tensor, "batch pos"]:
        """Mask of the named positions without special tokens, except the last prompt token, which often is one.

        Raises:
            InputError: `positions` is not one of `POSITIONS`.
        """
        if positions == "response":
            return self.response & ~self.special
        if positions == "prompt":
            return self.prompt & ~self.special
        if positions == "thought":
            return torch.zeros_like(self.prompt) if self.thought is None else self.thought & ~self.special
        if positions == "all":
            return (self.prompt | self.response | self.select("thought")) & ~self.special
        if positions == "last_prompt":
            last = torch.zeros_like(self.prompt)
            last[torch.arange(len(last)), self.prompt.sum(dim=1) - 1] = True
            return last
        raise unknown("positions", positions, POSITIONS)

    def columns(self, of: slice) -> "Batch":
        """Some of its columns."""
        return self._each(lambda t: t[:, of])

    def repeat(self, times: int) -> "Batch":
        """Its rows `times` over."""
        return replace(self._each(lambda t: t.repeat(times, 1)), index=self.index * times)

    def rows(self, of: slice) -> "Batch":
        """Some of its rows."""
        return replace(self._each(lambda t: t[of]), index=self.index[of])

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return self._each(lambda t: t.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        names = ("ids", "attention", "prompt", "response", "special", "thought")
        values = {name: getattr(self, name) for name in names}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})


def encode(tokenizer: PreTrainedTokenizerBase, messages: Conversation, max_length: int | None = None) -> Encoded:
    """Tokenise one conversation as its chat template renders it, whole, and find the answer in it.

    This is the text that TRL's SFTTrainer trains on, so scores and readings are taken where training put the answer:
    behind what the template writes before it (Qwen3's empty thought, gpt-oss' channel), and without the white space
    that the template strips. As in TRL, the answer begins at the earliest where the tokens leave those of the
    generation prompt. A conversation without an answer ends where its answer would begin.

    Raises:
        InputError: there is no template, it refuses the conversation or changes its answer, or the prompt leaves no
            room for the answer within `max_length`.
    """
    messages = fit_roles(tokenizer, messages)
    before, answer = split_answer(messages)
    if answer is None:
        text = render(tokenizer, messages) if is_plain(tokenizer) else text_before_answer(tokenizer, messages)
        ids = tokenizer.encode(text, add_special_tokens=False)
        return Encoded(ids, len(ids)).cut(max_length or len(ids))
    row = _encode_answered(tokenizer, before, messages)
    if max_length is not None and len(row.ids) > max_length:
        if row.start >= max_length:
            raise InputError(
                f"an answer is truncated away: its prompt has {row.start} tokens, the limit is {max_length}; "
                "raise max_length or shorten the prompt"
            )
        return row.cut(max_length)
    return row


def answer_prompt(tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> list[int]:
    """Token ids of turns that end with the user's, up to where an answer begins: what sampling continues."""
    return tokenizer.encode(text_before_answer(tokenizer, fit_roles(tokenizer, messages)), add_special_tokens=False)


def _encode_answered(tokenizer: PreTrainedTokenizerBase, before: Conversation, messages: Conversation) -> Encoded:
    text = render(tokenizer, messages)
    places = _places(tokenizer, before, messages, text)
    ids, begins, ends = _tokens(tokenizer, text)
    prompt = tokenizer.encode(render(tokenizer, before, add_generation_prompt=True), add_special_tokens=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False)))
    if common < len(prompt):
        _warn_no_extension(tokenizer, str(tokenizer.decode(prompt[common:])))

    def token_at(place: int) -> int:
        """The first token that reaches beyond a character."""
        return next((n for n, end in enumerate(ends) if end > place), len(ids))

    def token_after(place: int) -> int:
        """The first token that begins at a character or behind it; several tokens may make up the one before."""
        return next((n for n, begin in enumerate(begins) if begin >= place), len(ids))

    start, stop = max(token_at(places.answer[0]), common), token_after(places.answer[1])
    if start == 0:
        raise InputError("the chat template writes nothing before an answer: give another template")
    if places.answer[0] == places.answer[1]:
        stop = start
    thought = (token_at(places.thought[0]), token_after(places.thought[1])) if any(places.thought) else (0, 0)
    return Encoded(ids[: max(stop, start)], common if any(thought) else start, thought, start)


@dataclass(frozen=True)
class _Places:
    """Characters of a rendered conversation: first, and first after."""

    answer: tuple[int, int]
    thought: tuple[int, int] = (0, 0)


def _places(tokenizer: PreTrainedTokenizerBase, before: Conversation, messages: Conversation, text: str) -> _Places:
    """Where the last answer and its thought stand in a rendered conversation."""
    thought, answer = message_parts(messages[-1])
    marked = render(tokenizer, [*before, {"role": "assistant", "content": MARKER}])
    head, found, tail = marked.rpartition(MARKER)
    if not found:
        raise InputError("the chat template drops the answer of a conversation: give another template")
    if text.startswith(head) and text.endswith(tail) and len(text) >= len(head) + len(tail) and not thought:
        return _Places((len(head), len(text) - len(tail)))
    body = text[: len(text) - len(tail)] if tail and text.endswith(tail) else text
    for form in (answer, answer.rstrip(), answer.strip()):
        if form.strip() and body.rstrip().endswith(form.rstrip()):
            stop = body.rindex(form.rstrip()) + len(form) if body.endswith(form) else len(body.rstrip())
            start = stop - len(form)
            break
    else:
        raise InputError(
            "the chat template changes an answer, so that it is not found in the rendered conversation: "
            f"{answer.strip()[:60]!r}; give another template, or rows without marks of thoughts and tools"
        )
    if thought and thought not in body[:start] and any(messages[-1].get(key) for key in REASONING_KEYS):
        raise InputError(
            f"the chat template drops the thought of an answer: {thought[:60]!r}; write it into the answer's content, "
            "or leave it out"
        )
    if not thought or thought not in body[:start]:
        return _Places((start, stop))
    first = body[:start].rindex(thought)
    return _Places((start, stop), (first, first + len(thought)))


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int], list[int]]:
    """Token ids of a rendered text, and the characters at which each token begins and ends."""
    if not tokenizer.is_fast:
        ids = tokenizer.encode(text, add_special_tokens=False)
        texts = [str(tokenizer.decode(ids[: n + 1], clean_up_tokenization_spaces=False)) for n in range(len(ids))]
        whole = [len(text.rstrip("\ufffd")) for text in texts]  # without a character of which bytes are missing
        begins = [0, *whole[:-1]]
        return ids, begins, [max(end, begin + 1) for begin, end in zip(begins, whole, strict=True)]
    tokens: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = tokens["offset_mapping"]
    return list(tokens["input_ids"]), [begin for begin, _ in offsets], [end for _, end in offsets]


def _warn_no_extension(tokenizer: PreTrainedTokenizerBase, rest: str) -> None:
    """Say once for each template that its generation prompt is not how a finished answer begins."""
    warned: set[str] = tokenizer.__dict__.setdefault("_warned_no_extension", set())
    if str(tokenizer.chat_template) in warned:
        return
    warned.add(str(tokenizer.chat_template))
    log.warning(
        "the chat template's generation prompt ends with %r, which a rendered answer does not have: training, scores "
        "and samples begin without it, and a server that keeps it shows the model in another place",
        rest,
    )


def collate(rows: Sequence[Encoded], index: list[int], pad_id: int, special_ids: set[int]) -> Batch:
    """Right-pad encoded conversations into one batch."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    lengths = torch.tensor([len(row.ids) for row in rows])[:, None]
    n_prompt, start = (
        torch.tensor(column)[:, None] for column in zip(*((r.n_prompt, r.start) for r in rows), strict=True)
    )
    thought = torch.tensor([row.thought for row in rows])
    for r, row in enumerate(rows):
        ids[r, : len(row.ids)] = torch.tensor(row.ids)
    position = torch.arange(width)[None, :]
    real = position < lengths
    special = torch.isin(ids, torch.tensor(sorted(special_ids), dtype=torch.long))
    in_thought = (position >= thought[:, :1]) & (position < thought[:, 1:]) if thought.any() else None
    return Batch(ids, real.long(), position < n_prompt, real & (position >= start), special, index, in_thought)


def batches(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    batch_size: int = 16,
    max_length: int | None = None,
) -> Iterator[Batch]:
    """Batches of similar length, to save padding; `Batch.index` maps rows back to the input order."""
    rows = [encode(tokenizer, c, max_length) for c in conversations]
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids), i))
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    special = special_ids(tokenizer)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        yield collate([rows[i] for i in index], index, pad, special)


def conversation_batches(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], batch_size: int = 32
) -> list[Batch]:
    """`batches` as a list, for conversations that are read several times."""
    return list(batches(tokenizer, conversations, batch_size))
