"""When two questions count as one: what trains a model must not ask what evaluates it."""

from collections.abc import Sequence

from persona_probe.data.chat import Conversation
from persona_probe.data.ngrams import overlaps

SAME = 0.5
"""Share of the shorter text's runs of five words from which on two texts count as one."""


def question(row: Conversation) -> str:
    """What the last user turn asks; empty where there is none."""
    return next((m["content"] for m in reversed(row) if m["role"] == "user"), "")


def common(left: Sequence[str], right: Sequence[str]) -> list[tuple[float, int, int]]:
    """`(share, i, j)` for every pair of a left and a right text that count as one."""
    n = len(left)
    pairs = overlaps([*left, *right], at_least=SAME)
    return [(share, i, j - n) for share, i, j in pairs if i < n <= j]
