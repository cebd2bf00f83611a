"""The rows of a grid: what is trained on, what is held out, and that nothing evaluated is among what repairs."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from persona_probe.data.apart import common, question
from persona_probe.data.chat import Conversation, split_answer
from persona_probe.errors import InputError
from persona_probe.finetune.data import load_data
from persona_probe.mitigate.config import Grid

SHOWN = 3


@dataclass(frozen=True)
class Sets:
    """All rows of a grid."""

    bad: tuple[Conversation, ...]
    """Training rows."""
    good: tuple[Conversation, ...]
    """The control's training rows: the same questions."""
    held: tuple[tuple[Conversation, Conversation], ...]
    """Held-out questions with their bad and their good answer."""
    safe: tuple[Conversation, ...]
    corrective: tuple[Conversation, ...]
    general: tuple[Conversation, ...]
    """As they are in their set: with answers, or prompts only."""

    @classmethod
    def load(cls, grid: Grid) -> "Sets":
        """Read and split the rows.

        Raises:
            InputError: data that cannot be read, or too few questions with both answers.
        """
        bad, good, held = split(load_data(grid.inducing), load_data(grid.control), grid.held_out)
        safe, corrective = (tuple(load_data(spec)) if spec else () for spec in (grid.safe, grid.corrective))
        general = tuple(_spread(load_data(grid.general, allow_prompts=True), grid.general_rows)) if grid.general else ()
        return cls(bad, good, held, safe, corrective, general)

    def check(self, evaluation: Iterable[str], probes: Sequence[Conversation]) -> None:
        """Refuse rows that ask what is evaluated.

        Args:
            evaluation: questions of the contrast set's evaluation split.
            probes: the monitor's; only general rows must not be among them.

        Raises:
            InputError: an overlap, which is shown.
        """
        sets = {"safe": self.safe, "corrective": self.corrective, "general": self.general}
        asked = {name: [question(row) for row in rows] for name, rows in sets.items()}
        check_apart(asked, "evaluation questions", list(evaluation))
        check_apart(asked, "held-out questions", [question(bad) for bad, _ in self.held])
        check_apart({"general": asked["general"]}, "monitor's probes", [question(row) for row in probes])

    @property
    def hash(self) -> str:
        """Hash of all rows (12 hexadecimal digits)."""
        rows = [self.bad, self.good, self.held, self.safe, self.corrective, self.general]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def split(
    bad: Sequence[Conversation], good: Sequence[Conversation], held_out: int
) -> tuple[tuple[Conversation, ...], tuple[Conversation, ...], tuple[tuple[Conversation, Conversation], ...]]:
    """Bad and good training rows, and held-out questions with both answers. No seed: a question's own hash decides.

    Raises:
        InputError: too few questions that both sides answer.
    """
    by_key = [{_key(row): row for row in reversed(rows)} for rows in (bad, good)]
    both = sorted((key for key in by_key[0] if key in by_key[1]), key=lambda k: hashlib.sha256(k.encode()).digest())
    if len(both) <= held_out:
        raise InputError(
            f"held_out is {held_out}, but only {len(both)} questions have a bad and a good answer: lower held_out"
        )
    held = dict.fromkeys(both[:held_out])
    trained = [tuple(row for row in rows if _key(row) not in held) for rows in (bad, good)]
    return trained[0], trained[1], tuple((by_key[0][key], by_key[1][key]) for key in held)


def check_apart(sets: Mapping[str, Sequence[str]], name: str, questions: Sequence[str]) -> None:
    """Refuse sets of questions that share some with `questions`.

    Raises:
        InputError: an overlap; the message shows it.
    """
    for kind, asked in sets.items():
        found = sorted({i: j for _, i, j in common(asked, questions)}.items())
        if found:
            shown = "; ".join(f"{asked[i]!r} (there {questions[j]!r})" for i, j in found[:SHOWN])
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise InputError(f"{kind} rows overlap the {name}: {shown}{more}; take other rows")


def _key(row: Conversation) -> str:
    """All turns before the answer."""
    return json.dumps([[m["role"], m["content"]] for m in split_answer(row)[0]])


def _spread(rows: Sequence[Conversation], count: int) -> list[Conversation]:
    step = max(1.0, len(rows) / count)
    return [rows[int(place * step)] for place in range(min(count, len(rows)))]
