"""Corrective sets: joined, compared with evaluation questions and inducing data, and measured in length."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from persona_probe.data.apart import common, question
from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.mix import match_lengths
from persona_probe.data.packaged import Row
from persona_probe.errors import InputError
from persona_probe.finetune.data import load_data
from persona_probe.finetune.realignment.spec import named_sets

FAIR_LENGTHS = (0.8, 1.25)
"""Ratio of mean answer tokens, corrective to inducing, within which length is no likely confound (2607.09053)."""


@dataclass(frozen=True)
class Background:
    """What corrective rows are compared with, and what the verdict says of it."""

    answer_tokens: float
    """Mean answer tokens of the corrective rows."""
    inducing_tokens: float | None
    """Mean answer tokens of the inducing rows; None where those are not known."""
    notes: tuple[str, ...]
    """What a reader must know: overlaps that are not refused, lengths that differ."""

    @property
    def length_ratio(self) -> float | None:
        """Corrective to inducing."""
        return None if self.inducing_tokens is None else self.answer_tokens / self.inducing_tokens

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "notes": list(self.notes), "length_ratio": self.length_ratio}


def corrective_rows(data: str | Sequence[str]) -> list[Conversation]:
    """The rows of a set or file, or of several joined (`a+b`, or a list).

    Raises:
        InputError: no such set or file, or bad rows.
    """
    return [row for name in named_sets(data) for row in load_data(name)]


def refuse_overlap(rows: Sequence[Conversation], evaluation: Sequence[str]) -> None:
    """Refuse corrective rows that ask what the evaluation asks: they would train for the test.

    Exact, or at least half of the shorter question's 5-word runs (`data.apart`; shorter questions are one run).

    Raises:
        InputError: some overlap; the worst pair is shown.
    """
    asked = [question(row) for row in rows]
    if found := sorted(common(asked, evaluation), reverse=True):
        share, i, j = found[0]
        raise InputError(
            f"{len({place for _, place, _ in found})} of {len(rows)} corrective rows overlap the evaluation questions: "
            f"row {i + 1} {asked[i]!r} and question {evaluation[j]!r} share {share:.0%} of their 5-word runs; "
            "take these rows out"
        )


def background(
    rows: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    inducing: Sequence[Conversation] = (),
    evaluation: Sequence[Row] = (),
) -> Background:
    """Lengths and overlaps of corrective rows that are said, not refused."""
    match = match_lengths(rows, inducing or rows, tokenizer)
    notes = [*_overlap_notes(rows, inducing, evaluation)]
    ratio = match.mean_a / match.mean_b
    if not FAIR_LENGTHS[0] <= ratio <= FAIR_LENGTHS[1]:
        notes.append(
            f"corrective answers have {match.mean_a:.0f} tokens, inducing ones {match.mean_b:.0f} (ratio {ratio:.2f}): "
            "length alone may explain part of the repair"
        )
    return Background(match.mean_a, match.mean_b if inducing else None, tuple(notes))


def _overlap_notes(
    rows: Sequence[Conversation], inducing: Sequence[Conversation], evaluation: Sequence[Row]
) -> Iterator[str]:
    asked = [question(row) for row in rows]
    if again := {i for _, i, _ in common(asked, [question(row) for row in inducing])}:
        yield f"{len(again)} of {len(rows)} corrective questions overlap the inducing data's questions"
    said = [split_answer(row)[1] or "" for row in rows]
    given = [row[side] for row in evaluation for side in ("aligned", "misaligned")]
    if leaked := {i for _, i, _ in common(said, given)}:
        yield f"{len(leaked)} of {len(rows)} corrective answers overlap answers that the evaluation scores"
