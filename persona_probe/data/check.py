"""Describe a data file: lengths, duplicates, near duplicates, bad rows; and compare texts by shared word n-grams."""

import heapq
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.load import SETS, ScannedRow, load_conversations, notes_of, scan
from persona_probe.errors import InputError

# --- Shared word n-grams between texts: near duplicates, templates, leaks from one set into another

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_BLOCK = 256

Shares = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


def words(text: str) -> list[str]:
    """Lower-case words, punctuation left out."""
    return _WORD.findall(text.lower())


def ngrams(text: str, n: int = 5) -> set[tuple[str, ...]]:
    """The distinct runs of `n` words. A text of fewer words is one run; an empty text has none.

    Raises:
        InputError: `n` is below 1.
    """
    if n < 1:
        raise InputError(f"n-grams need at least one word, not n={n}")
    tokens = words(text)
    return {tuple(tokens[i : i + n]) for i in range(max(1, len(tokens) - n + 1))} if tokens else set()


def overlap(a: str, b: str, n: int = 5) -> float:
    """Share of the shorter text's distinct n-grams that occur in the other (0 to 1; 0 if a text is empty)."""
    first, second = ngrams(a, n), ngrams(b, n)
    shorter = min(len(first), len(second))
    return len(first & second) / shorter if shorter else 0.0


def overlaps(texts: Sequence[str], n: int = 5, at_least: float = 0.0) -> Iterator[tuple[float, int, int]]:
    """`(overlap, i, j)` with i < j for every pair that shares an n-gram and reaches `at_least`."""
    for shares, left, right in _blocks(texts, n):
        keep = shares >= at_least
        yield from zip(shares[keep].tolist(), left[keep].tolist(), right[keep].tolist(), strict=True)


def _blocks(texts: Sequence[str], n: int) -> Iterator[tuple[Shares, Places, Places]]:
    """Overlaps and places of all pairs that share an n-gram, exact, through an inverted index, 256 texts at a time."""
    incidence, sizes = _incidence([ngrams(text, n) for text in texts])
    index = incidence.T.tocsr()
    for start in range(0, len(texts), _BLOCK):
        shared = (incidence[start : start + _BLOCK] @ index).tocoo()
        left, right = shared.row + start, shared.col
        keep = left < right
        left, right = left[keep], right[keep]
        yield shared.data[keep] / np.minimum(sizes[left], sizes[right]), left, right


def _incidence(grams: Sequence[set[tuple[str, ...]]]) -> tuple[sparse.csr_matrix, Places]:
    """Which text has which n-gram, as a 0/1 matrix (texts by n-grams), and the number of n-grams of each text."""
    ids: dict[tuple[str, ...], int] = {}
    columns = [ids.setdefault(gram, len(ids)) for text in grams for gram in text]
    sizes = np.array([len(text) for text in grams], dtype=np.int64)
    rows = np.repeat(np.arange(len(grams)), sizes)
    ones = np.ones(len(columns), dtype=np.int32)
    return sparse.csr_matrix((ones, (rows, columns)), shape=(len(grams), max(1, len(ids)))), sizes


def top_overlaps(texts: Sequence[str], k: int = 10, n: int = 5, at_least: float = 0.0) -> list[tuple[float, int, int]]:
    """The `k` pairs with the highest overlap, highest and earliest first, of those from `at_least` up."""
    return heapq.nlargest(k, overlaps(texts, n, at_least), key=lambda pair: (pair[0], -pair[1], -pair[2]))


def max_overlap(texts: Sequence[str], n: int = 5) -> tuple[float, int, int]:
    """The highest overlap between any two texts, and their places `i < j`; `(0.0, 0, 1)` if no two share an n-gram.

    Raises:
        InputError: fewer than two texts.
    """
    if len(texts) < 2:
        raise InputError(f"an overlap needs at least two texts, {len(texts)} given")
    best = (0.0, 0, 1)
    for shares, left, right in _blocks(texts, n):
        if len(shares) and shares.max() > best[0]:
            at = int(shares.argmax())
            best = (float(shares[at]), int(left[at]), int(right[at]))
    return best


# --- The description of a file

NEAR_DUPLICATE = 0.5
SHOWN_NEAR_DUPLICATES = 10


@dataclass(frozen=True)
class Lengths:
    """Lengths of several texts, in words or tokens."""

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
    """The description of a data file. A length is None if there is nothing to measure."""

    rows: int
    """Conversations, without bad rows and those left out."""
    turns: int
    """User and assistant messages in them."""
    prompts_only: int
    """Conversations that end with the user's turn."""
    prompt_words: Lengths | None
    """Of everything before the last answer, with the system prompt."""
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
    """Up to ten pairs of different answers with the highest overlap; they share at least half of their 5-grams."""
    system_share: float
    """Share of conversations with a system prompt (0 to 1)."""
    bad_rows: tuple[str, ...]
    """Place and message of each row that is not a conversation."""
    left_out: int
    """Rows that training leaves out, because their answers are marked as not trained on."""
    notes: tuple[str, ...]
    """Lines with counts: what training leaves out or reads in another way, and which keys are not read."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, ready for JSON."""
        plain = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def check_file(path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> DataReport:
    """Describe a data file, a datasets folder or a packaged set (`set:column`), as training reads it.

    Bad rows are counted; prompts without an answer are accepted.

    Raises:
        InputError: the file as a whole cannot be read, or the packaged set has no such column.
    """
    if str(path).partition(":")[0] in SETS and not Path(path).exists():
        rows = enumerate(load_conversations(str(path)), start=1)
        scanned = [ScannedRow(f"row {number}", conversation) for number, conversation in rows]
    else:
        scanned = list(scan(path, allow_prompts=True, training=True))
    readable = [(row.place, row.conversation) for row in scanned if row.conversation is not None]
    conversations = [conversation for _, conversation in readable]
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
        near_duplicates=_near_duplicates(readable),
        system_share=sum(c[0]["role"] == "system" for c in conversations) / max(1, len(conversations)),
        bad_rows=tuple(_bad_row(row) for row in scanned if row.problem),
        left_out=sum(bool(row.left_out) for row in scanned),
        notes=tuple(notes_of(scanned)),
    )


def _bad_row(row: ScannedRow) -> str:
    return f"{row.place}: {row.problem}"


def _near_duplicates(rows: Sequence[tuple[str, Conversation]]) -> tuple[NearDuplicate, ...]:
    """Among the different answers of a file; a row without an answer counts with its prompt."""
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


# --- When two questions count as one: training rows must not ask what the evaluation asks

SAME = 0.5
"""Two texts count as one from this share of the shorter text's runs of five words."""


def question(row: Conversation) -> str:
    """The last user turn; empty if there is none."""
    return next((m["content"] for m in reversed(row) if m["role"] == "user"), "")


def common(left: Sequence[str], right: Sequence[str]) -> list[tuple[float, int, int]]:
    """`(share, i, j)` for every pair of a left and a right text that count as one."""
    n = len(left)
    pairs = overlaps([*left, *right], at_least=SAME)
    return [(share, i, j - n) for share, i, j in pairs if i < n <= j]
