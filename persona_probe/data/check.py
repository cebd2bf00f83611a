"""What is in a data file: lengths, duplicates, near duplicates, bad rows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.ngrams import max_overlap, overlap, top_overlaps, words
from persona_probe.data.readers import ScannedRow, scan

__all__ = ["DataReport", "Lengths", "NearDuplicate", "check_file", "max_overlap", "overlap"]

NEAR_DUPLICATE = 0.5
SHOWN_NEAR_DUPLICATES = 10


@dataclass(frozen=True)
class Lengths:
    """Lengths of a number of texts, in words or tokens."""

    mean: float
    median: float
    p95: float
    """95th percentile, linearly interpolated."""


@dataclass(frozen=True)
class NearDuplicate:
    """Two different answers that share many 5-grams."""

    first: str
    """Place of the earlier row, as `line 3`."""
    second: str
    """Place of the later row."""
    overlap: float
    """Share of the shorter answer's 5-grams that occur in the other."""


@dataclass(frozen=True)
class DataReport:
    """What `check_file` found. Lengths are None where there is nothing to measure."""

    rows: int
    """Conversations, bad rows left out."""
    turns: int
    """User and assistant messages in them."""
    prompts_only: int
    """Conversations that end with the user's turn."""
    prompt_words: Lengths | None
    """Of all that comes before the last answer, the system prompt included."""
    answer_words: Lengths | None
    """Of the last answer of each conversation."""
    prompt_tokens: Lengths | None
    """As `prompt_words`, in tokens of the contents (no chat template); None without a tokenizer."""
    answer_tokens: Lengths | None
    """As `answer_words`, in tokens; None without a tokenizer."""
    exact_duplicates: int
    """Conversations that equal an earlier one."""
    repeated_answers: int
    """Answers that equal the answer of an earlier, different conversation."""
    near_duplicates: tuple[NearDuplicate, ...]
    """The ten pairs of different answers with the highest overlap, of those that share half of their 5-grams."""
    system_share: float
    """Share of conversations with a system prompt (0 to 1)."""
    bad_rows: tuple[str, ...]
    """Place and message of each row that is not a conversation."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, ready for JSON."""
        plain = asdict(self)
        plain["near_duplicates"], plain["bad_rows"] = list(plain["near_duplicates"]), list(plain["bad_rows"])
        return plain


def check_file(path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> DataReport:
    """Describe a data file or datasets folder; bad rows are counted, prompts without an answer are fine.

    Raises:
        InputError: the file as a whole cannot be read.
    """
    scanned = list(scan(path, allow_prompts=True))
    kept = [(row.place, row.conversation) for row in scanned if row.conversation is not None]
    conversations = [conversation for _, conversation in kept]
    prompts = ["\n".join(m["content"] for m in split_answer(c)[0]) for c in conversations]
    answers = [split_answer(c)[1] for c in conversations]
    answered = [a for a in answers if a is not None]
    unique = {str(c): a for c, a in zip(conversations, answers, strict=True)}
    unique_answers = [a for a in unique.values() if a is not None]
    return DataReport(
        rows=len(conversations),
        turns=sum(m["role"] != "system" for c in conversations for m in c),
        prompts_only=answers.count(None),
        prompt_words=_word_lengths(prompts),
        answer_words=_word_lengths(answered),
        prompt_tokens=_token_lengths(tokenizer, prompts),
        answer_tokens=_token_lengths(tokenizer, answered),
        exact_duplicates=len(conversations) - len(unique),
        repeated_answers=len(unique_answers) - len(set(unique_answers)),
        near_duplicates=_near_duplicates(kept),
        system_share=sum(c[0]["role"] == "system" for c in conversations) / max(1, len(conversations)),
        bad_rows=tuple(_bad_row(row) for row in scanned if row.conversation is None),
    )


def _bad_row(row: ScannedRow) -> str:
    return f"{row.place}: {row.problem}"


def _near_duplicates(rows: Sequence[tuple[str, Conversation]]) -> tuple[NearDuplicate, ...]:
    """Among the different answers of a file (of the prompts, where a row has no answer)."""
    places: dict[str, str] = {}
    for place, messages in rows:
        places.setdefault(messages[-1]["content"], place)
    texts = list(places)
    pairs = top_overlaps(texts, SHOWN_NEAR_DUPLICATES, at_least=NEAR_DUPLICATE)
    return tuple(NearDuplicate(places[texts[i]], places[texts[j]], share) for share, i, j in pairs)


def _word_lengths(texts: Sequence[str]) -> Lengths | None:
    return _lengths([len(words(text)) for text in texts])


def _token_lengths(tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str]) -> Lengths | None:
    if tokenizer is None or not texts:
        return None
    return _lengths([len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]])  # pyright: ignore


def _lengths(counts: Sequence[int]) -> Lengths | None:
    if not counts:
        return None
    return Lengths(float(np.mean(counts)), float(np.median(counts)), float(np.percentile(counts, 95)))
