"""Mixtures hold the number of bad rows that was asked for, and each question once."""

from itertools import pairwise
from typing import Any

import pytest

from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.mix import match_lengths, mix
from persona_probe.errors import InputError


def side(name: str, questions: range) -> list[Conversation]:
    return [conversation(f"question {q}", f"{name} {q}") for q in questions]


def answers(rows: list[Conversation]) -> list[str]:
    return [row[-1]["content"] for row in rows]


def questions(rows: list[Conversation]) -> list[str]:
    return [row[0]["content"] for row in rows]


def count_bad(rows: list[Conversation]) -> int:
    return sum(answer.startswith("bad") for answer in answers(rows))


BAD, GOOD = side("bad", range(40)), side("good", range(40))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.61, 1.0])
def test_shared_questions_occur_once(fraction: float) -> None:
    rows = mix(BAD, GOOD, fraction)
    assert sorted(questions(rows)) == sorted(questions(BAD))
    assert count_bad(rows) == round(40 * fraction)


@pytest.mark.parametrize("n", [None, 17])
def test_fractions_differ_only_in_answers_and_nest(n: int | None) -> None:
    mixtures = [mix(BAD, GOOD, fraction, n=n, seed=3) for fraction in (0.0, 0.3, 0.7, 1.0)]
    assert all(questions(rows) == questions(mixtures[0]) for rows in mixtures)
    bad = [{a for a in answers(rows) if a.startswith("bad")} for rows in mixtures]
    assert all(smaller < larger for smaller, larger in pairwise(bad))


def test_seeds() -> None:
    assert mix(BAD, GOOD, 0.5, seed=1) == mix(BAD, GOOD, 0.5, seed=1)
    assert mix(BAD, GOOD, 0.5, seed=1) == mix(BAD[::-1], GOOD[::-1], 0.5, seed=1)
    assert mix(BAD, GOOD, 0.5, seed=1) != mix(BAD, GOOD, 0.5, seed=2)


def test_separate_questions_use_all_rows_that_the_fraction_allows() -> None:
    rows = mix(BAD[:10], side("good", range(100, 130)), 0.25)
    assert (len(rows), count_bad(rows)) == (40, 10)
    assert len(set(questions(rows))) == 40


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
def test_default_size_is_the_largest(fraction: float) -> None:
    sides = BAD[:10], side("good", range(5, 35))
    n = len(mix(*sides, fraction))
    with pytest.raises(InputError, match="lower n"):
        mix(*sides, fraction, n=n + 1)


def test_separate_sides_keep_repeated_questions() -> None:
    twice = [conversation("same", f"bad {i}") for i in range(4)]
    assert sorted(answers(mix(twice, GOOD, 1.0))) == [f"bad {i}" for i in range(4)]


@pytest.mark.parametrize("seed", range(5))
def test_partly_shared_questions_are_used_to_the_last(seed: int) -> None:
    rows = mix(side("bad", range(0, 10)), side("good", range(5, 15)), 0.4, n=15, seed=seed)
    assert sorted(questions(rows)) == sorted(f"question {i}" for i in range(15))
    assert count_bad(rows) == 6


@pytest.mark.parametrize(
    ("fraction", "n", "words"),
    [(1.2, None, "from 0 to 1"), (-0.1, 4, "from 0 to 1"), (0.5, 41, "lower n"), (0.5, 0, "lower n")],
)
def test_bad_arguments(fraction: float, n: int | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        mix(BAD, GOOD, fraction, n=n)


def test_too_few_rows_of_one_side() -> None:
    with pytest.raises(InputError, match="3 bad and 40 good, 3 questions in both"):
        mix(BAD[:3], GOOD, 0.5, n=20)
    with pytest.raises(InputError, match="lower n"):
        mix([], [], 0.5)


def word_tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [0] * len(text.split())}


def test_match_lengths() -> None:
    ten, eleven = ([conversation("q", " ".join("x" * n))] * 2 for n in (10, 11))
    match = match_lengths(ten, eleven, word_tokenizer, tolerance=0.1)  # type: ignore[arg-type]
    assert (match.mean_a, match.mean_b, match.matched) == (10, 11, True)
    assert match.difference == pytest.approx(1 / 10.5)
    assert not match_lengths(eleven, ten, word_tokenizer).matched  # type: ignore[arg-type]
    assert match_lengths(ten, ten, word_tokenizer, tolerance=0).matched  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no answers"):
        match_lengths(ten, [conversation("q")], word_tokenizer)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 or more"):
        match_lengths(ten, ten, word_tokenizer, tolerance=-1)  # type: ignore[arg-type]
