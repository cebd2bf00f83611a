"""The log of an unattended study: what was decided, by which rule, from which numbers; for programs and for people."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from persona_probe.errors import InputError
from persona_probe.files import is_there, parse_jsonl, read_text
from persona_probe.report.tables import Table, number_words
from persona_probe.writing import json_values, make_folder, refused, write_text

LOG, PAGE = "decisions.jsonl", "decisions.md"


@dataclass(frozen=True)
class Decision:
    """One entry of the log."""

    round: int
    """Of seeds: 1 is the first."""
    action: str
    """`plan`, `start`, `done`, `not started`, `failed`, `claim`, `more seeds` or `stop`."""
    subject: str
    """The stage or the claim."""
    result: str
    """In words."""
    rule: str
    """The rule that decided, by its name in `study.auto_rules` or `verdicts`."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """What the rule was given."""

    @property
    def key(self) -> tuple[int, str, str]:
        """What makes two entries the same decision."""
        return self.round, self.action, self.subject


class DecisionLog:
    """`decisions.jsonl`, which grows by one line a decision, and `decisions.md`, drawn from it after each.

    A log that exists goes on: a decision that stands in it is not written again. A last line that a kill cut short is
    left out, and the decision is made again.

    Raises:
        InputError: a damaged log, or one of another question.
    """

    def __init__(self, folder: Path, question: str) -> None:
        self.folder, self.question = folder, question
        self.decisions = list(self._read())

    def _read(self) -> Iterator[Decision]:
        path = self.folder / LOG
        if not is_there(path):
            return
        text = read_text(path)
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(path, whole)
        change = f"move {path} elsewhere to decide again"
        for number, row in enumerate(parse_jsonl(whole, str(path), change)):
            if number == 0:
                if row.get("question") != self.question:
                    raise InputError(f"{path} answers another question: choose another --out")
                continue
            try:
                yield Decision(**row)
            except TypeError as error:
                raise InputError(f"{path}, line {number + 1} is no decision: {change}") from error

    def has(self, round: int, action: str, subject: str) -> bool:
        """Whether this was decided."""
        return any(one.key == (round, action, subject) for one in self.decisions)

    def add(self, decision: Decision) -> Decision:
        """Write a decision, unless the same one stands in the log with the same result."""
        last = next((one for one in reversed(self.decisions) if one.key == decision.key), None)
        plain = Decision(**json_values(asdict(decision)))
        if last is not None and last == plain:
            return last
        self.decisions.append(plain)
        lines = [asdict(plain)] if is_there(self.folder / LOG) else [{"question": self.question}, asdict(plain)]
        path = make_folder(self.folder) / LOG
        with refused("write", path), path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(self.folder / PAGE, self.page())
        return plain

    @property
    def spent(self) -> float:
        """Seconds of all stages that were done or failed."""
        ended = [one for one in self.decisions if one.action in ("done", "failed")]
        return sum(float(one.numbers.get("seconds", 0.0)) for one in ended)

    def page(self) -> str:
        """The log as Markdown."""
        rows = [
            [str(n), str(one.round), one.action, one.subject, one.result, one.rule, number_words(one.numbers)]
            for n, one in enumerate(self.decisions, start=1)
        ]
        heads = ("", "round", "decision", "about", "result", "rule", "numbers")
        return f"# Decisions\n\nQuestion: {self.question}\n\n{Table(heads, rows).markdown()}\n"
