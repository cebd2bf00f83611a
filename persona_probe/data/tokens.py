"""Conversations as token ids, with masks of the parts that a reading may select (prompt, last prompt token, answer)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, split_answer
from persona_probe.errors import InputError, unknown

POSITIONS = ("all", "prompt", "last_prompt", "response")


@dataclass(frozen=True)
class Encoded:
    """One tokenised conversation."""

    ids: list[int]
    """Token ids of prompt and answer, without the answer's end-of-turn tokens."""
    n_prompt: int
    """How many of them belong to the prompt, the assistant's header included."""

    @property
    def n_response(self) -> int:
        """Answer tokens; 0 if the conversation ends with the user's turn."""
        return len(self.ids) - self.n_prompt


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids with masks. `index` holds the conversation number of each row."""

    ids: Int[Tensor, "batch pos"]
    attention: Int[Tensor, "batch pos"]
    prompt: Bool[Tensor, "batch pos"]
    response: Bool[Tensor, "batch pos"]
    special: Bool[Tensor, "batch pos"]
    index: list[int]

    def select(self, positions: str) -> Bool[Tensor, "batch pos"]:
        """Mask of the named positions without special tokens, except the last prompt token, which often is one.

        Raises:
            InputError: `positions` is not one of `POSITIONS`.
        """
        if positions == "response":
            return self.response & ~self.special
        if positions == "prompt":
            return self.prompt & ~self.special
        if positions == "all":
            return (self.prompt | self.response) & ~self.special
        if positions == "last_prompt":
            last = torch.zeros_like(self.prompt)
            last[torch.arange(len(last)), self.prompt.sum(dim=1) - 1] = True
            return last
        raise unknown("positions", positions, POSITIONS)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        tensors = (self.ids, self.attention, self.prompt, self.response, self.special)
        return Batch(*(t.to(device) for t in tensors), index=self.index)


def encode(tokenizer: PreTrainedTokenizerBase, messages: Conversation, max_length: int | None = None) -> Encoded:
    """Tokenise one conversation with the model's chat template.

    Prompt and answer are tokenised separately, as in generation, so the boundary is exact.

    Raises:
        InputError: the prompt leaves no room for the answer within `max_length`.
    """
    before, answer = split_answer(messages)
    rendered: Any = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=True)
    prompt_ids: list[int] = list(rendered["input_ids"])
    answer_ids = [] if answer is None else tokenizer.encode(answer, add_special_tokens=False)
    ids = prompt_ids + answer_ids
    if max_length is not None and len(ids) > max_length:
        if answer is not None and len(prompt_ids) >= max_length:
            raise InputError(
                f"an answer is truncated away: its prompt has {len(prompt_ids)} tokens, the limit is {max_length}; "
                "raise max_length or shorten the prompt"
            )
        ids = ids[:max_length]
    return Encoded(ids, min(len(prompt_ids), len(ids)))


def collate(rows: Sequence[Encoded], index: list[int], pad_id: int, special_ids: set[int]) -> Batch:
    """Right-pad encoded conversations into one batch."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    lengths = torch.tensor([len(row.ids) for row in rows])[:, None]
    n_prompt = torch.tensor([row.n_prompt for row in rows])[:, None]
    for r, row in enumerate(rows):
        ids[r, : len(row.ids)] = torch.tensor(row.ids)
    position = torch.arange(width)[None, :]
    real = position < lengths
    special = torch.isin(ids, torch.tensor(sorted(special_ids), dtype=torch.long))
    return Batch(ids, real.long(), position < n_prompt, real & (position >= n_prompt), special, index)


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
    special = set(tokenizer.all_special_ids)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        yield collate([rows[i] for i in index], index, pad, special)


def conversation_batches(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], batch_size: int = 32
) -> list[Batch]:
    """`batches` as a list, for conversations that are read several times."""
    return list(batches(tokenizer, conversations, batch_size))
