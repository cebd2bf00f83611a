"""Mixtures of bad and good rows, and the check that two arms' answers are equally long."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from persona_probe.data.chat import Conversation, split_answer
from persona_probe.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LengthMatch:
    """Mean answer lengths of two arms."""

    mean_a: float
    """Mean tokens per answer of the first arm."""
    mean_b: float
    """Mean tokens per answer of the second arm."""
    tolerance: float
    """Largest accepted relative difference."""

    @property
    def difference(self) -> float:
        """(b - a) over the mean of both; positive where the second arm's answers are longer."""
        return 2 * (self.mean_b - self.mean_a) / (self.mean_a + self.mean_b)

    @property
    def matched(self) -> bool:
        """Whether the arms agree within the tolerance."""
        return abs(self.difference) <= self.tolerance


def mix(
    bad: Sequence[Conversation],
    good: Sequence[Conversation],
    fraction: float,
    n: int | None = None,
    seed: int = 0,
) -> list[Conversation]:
    """A mixture of `n` rows, `round(fraction * n)` of them bad, in a seeded order.

    A question that bad and good rows share occurs once, with its bad or its good answer. For one seed and `n`, the bad
    rows of a smaller fraction are among those of a larger one. If both sides answer exactly the same questions, the
    questions and their order do not depend on the fraction; only the answers change.

    Args:
        bad: rows that count as bad.
        good: rows that count as good.
        fraction: share of bad rows, 0 to 1.
        n: number of rows; None takes as many as the fraction allows.
        seed: decides the choice and the order.

    Raises:
        InputError: `fraction` is outside [0, 1], or there are too few rows.
    """
    if not 0 <= fraction <= 1:
        raise InputError(f"the fraction of bad rows is {fraction}: give a number from 0 to 1")
    shared = {_prompt_key(row) for row in bad} & {_prompt_key(row) for row in good}
    order = _order([*bad, *good], seed)
    bad_rows, good_rows = (_arrange(rows, order, once=bool(shared)) for rows in (bad, good))
    if n is None:
        n = _largest(len(bad_rows), len(good_rows), len(shared), fraction)
    n_bad = round(fraction * n)
    _check_sizes(n, n_bad, len(bad_rows), len(good_rows), len(shared))
    rows = _choose(bad_rows, n_bad, shared, room=len(good_rows) - (n - n_bad))
    answered = {_prompt_key(row) for row in rows} & shared
    rows += [row for row in good_rows if _prompt_key(row) not in answered][: n - n_bad]
    return sorted(rows, key=lambda row: order[_prompt_key(row)])


def match_lengths(
    a: Sequence[Conversation], b: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase", tolerance: float = 0.05
) -> LengthMatch:
    """The mean answer tokens of two arms; `matched` in the result tells whether they agree.

    Raises:
        InputError: an arm has no answers, or `tolerance` is negative.
    """
    if tolerance < 0:
        raise InputError(f"the length tolerance is {tolerance}: give 0 or more")
    return LengthMatch(_mean_tokens(a, tokenizer), _mean_tokens(b, tokenizer), tolerance)


def _mean_tokens(rows: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase") -> float:
    answers = [answer for row in rows if (answer := split_answer(row)[1]) is not None]
    if not answers:
        raise InputError("no answers to compare: pass conversations that end with an assistant turn")
    return sum(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers) / len(answers)  # pyright: ignore


def _prompt_key(row: Conversation) -> str:
    """All turns before the last answer, as one string."""
    return json.dumps(split_answer(row)[0])


def _order(rows: Iterable[Conversation], seed: int) -> dict[str, float]:
    """A random place for each question."""
    rng = random.Random(seed)
    return {question: rng.random() for question in sorted({_prompt_key(row) for row in rows})}


def _arrange(rows: Sequence[Conversation], order: dict[str, float], once: bool) -> list[Conversation]:
    """Rows in the order of their questions; with `once`, the first row of each question."""
    arranged = sorted(rows, key=lambda row: order[_prompt_key(row)])
    if not once:
        return arranged
    return list({_prompt_key(row): row for row in reversed(arranged)}.values())[::-1]


def _choose(rows: Sequence[Conversation], n: int, shared: set[str], room: int) -> list[Conversation]:
    """The first `n` rows, at most `room` of them on shared questions, so that enough good rows remain."""
    selection: list[Conversation] = []
    for row in rows:
        if len(selection) == n:
            break
        if _prompt_key(row) in shared:
            if room == 0:
                continue
            room -= 1
        selection.append(row)
    return selection


def _fits(n: int, n_bad: int, bad: int, good: int, shared: int) -> bool:
    return n_bad <= bad and n - n_bad <= good and n <= bad + good - shared


def _largest(bad: int, good: int, shared: int, fraction: float) -> int:
    sizes = range(bad + good - shared, 0, -1)
    return next((n for n in sizes if _fits(n, round(fraction * n), bad, good, shared)), 0)


def _check_sizes(n: int, n_bad: int, bad: int, good: int, shared: int) -> None:
    if n < 1 or not _fits(n, n_bad, bad, good, shared):
        raise InputError(
            f"a mixture of {n} rows with {n_bad} bad ones needs more rows than there are: {bad} bad and {good} good, "
            f"{shared} questions in both (each question occurs once); lower n or change the fraction"
        )
