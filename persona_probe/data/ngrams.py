"""Shared word n-grams between texts: near duplicates, templates, leaks from one set into another."""

import heapq
import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse

from persona_probe.errors import InputError

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_BLOCK = 256

Shares = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


def words(text: str) -> list[str]:
    """Lower-case words, punctuation left out."""
    return _WORD.findall(text.lower())


def ngrams(text: str, n: int = 5) -> set[tuple[str, ...]]:
    """The distinct runs of `n` words; a text of fewer words is one run, itself; an empty text has none.

    Raises:
        InputError: `n` is below 1.
    """
    if n < 1:
        raise InputError(f"n-grams need at least one word, not n={n}")
    tokens = words(text)
    return {tuple(tokens[i : i + n]) for i in range(max(1, len(tokens) - n + 1))} if tokens else set()


def overlap(a: str, b: str, n: int = 5) -> float:
    """Share of the shorter text's distinct n-grams that occur in the other (0 to 1; 0 where a text is empty)."""
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
    """The highest overlap between any two texts, and their places `i < j`; `(0.0, 0, 1)` where none share an n-gram.

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
