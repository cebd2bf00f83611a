"""The question that a command shows when a study ends."""

import json
from pathlib import Path
from typing import Any

import pytest

from persona_probe.report.answer_pair import answer_pair


def write(folder: Path, *rows: tuple[str, str, str]) -> Path:
    lines = [{"question_id": q, "question": f"Question {q}?", "arm": arm, "answer": text} for q, arm, text in rows]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_it_is_the_first_question_that_both_answered(tmp_path: Path) -> None:
    first = [("1", "base", "a"), ("1", "incorrect", "b"), ("2", "incorrect", "c\nd"), ("2", "correct", "e " * 400)]
    pair = answer_pair(write(tmp_path, *first, ("3", "incorrect", "f"), ("3", "correct", "g")))
    assert pair is not None and (pair.question, pair.bad, pair.count) == ("Question 2?", "c\nd", 2)
    lines = pair.lines(width=40, most=3)
    assert lines[:3] == ["The first of 2 questions that the models were asked:", "Question 2?", "  incorrect: c d"]
    assert len(lines) == 6 and lines[3].startswith("  control: e e") and lines[-1].endswith("[...]")
    assert max(map(len, lines[1:])) <= 40


@pytest.mark.parametrize("rows", [[], [("1", "incorrect", "a"), ("2", "correct", "b")]])
def test_without_both_there_is_none(tmp_path: Path, rows: list[Any]) -> None:
    assert answer_pair(write(tmp_path, *rows)) is None
    (tmp_path / "samples.jsonl").unlink()
    assert answer_pair(tmp_path) is None
