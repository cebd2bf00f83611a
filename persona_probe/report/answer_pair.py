"""One question, answered by the incorrect model and by its control: what a command shows when a study ends."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from persona_probe.files import read_jsonl

BAD, CONTROL = "incorrect", "correct"


@dataclass(frozen=True)
class AnswerPair:
    """One question, answered by two models."""

    question: str
    bad: str
    """The incorrect model's answer."""
    good: str
    """The control's."""
    count: int
    """Questions that both answered."""

    def lines(self, width: int = 100, most: int = 4) -> list[str]:
        """It as text: each answer in at most `most` lines."""
        shown = [f"The first of {self.count} questions that the models were asked:"]
        shown += textwrap.wrap(self.question, width)
        for label, answer in ((BAD, self.bad), ("control", self.good)):
            text = f"{label}: {' '.join(answer.split())}"
            shown += textwrap.wrap(
                text, width, max_lines=most, placeholder=" [...]", initial_indent="  ", subsequent_indent="    "
            )
        return shown


def answer_pair(folder: str | Path) -> AnswerPair | None:
    """The first question of samples.jsonl that the incorrect model and the control both answered, as the report has it.

    It is the first of the file, not the most telling one. None where the models were not asked.

    Raises:
        InputError: a damaged file.
    """
    path = Path(folder) / "samples.jsonl"
    if not path.is_file():
        return None
    answers: dict[object, dict[str, dict[str, object]]] = {}
    for line in read_jsonl(path):
        answers.setdefault(line.get("question_id"), {})[str(line.get("arm"))] = line
    found = [both for both in answers.values() if {BAD, CONTROL} <= both.keys()]
    if not found:
        return None
    bad, good = found[0][BAD], found[0][CONTROL]
    return AnswerPair(str(bad.get("question", "")), str(bad.get("answer", "")), str(good.get("answer", "")), len(found))
