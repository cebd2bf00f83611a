"""Incidents: alarms on answers and roll-backs, one JSON line each, appended while a server runs."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any

from persona_probe.errors import InputError
from persona_probe.files import read_jsonl
from persona_probe.monitor.generation.trace import AnswerAlarm, rounded
from persona_probe.writing import json_values, make_folder, refused

KINDS = ("alarm", "rollback")
CUT = 20_000
"""Characters of a question or answer that are kept, where they are kept at all."""
TOKENS = 2_000
"""Tokens of a trace that are kept."""


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Incident:
    """One alarm on an answer, or one roll-back. Texts are kept only where the server was told to."""

    kind: str
    """`alarm` or `rollback`."""
    request: str = ""
    """Id of the chat completion."""
    model: str = ""
    adapter: str = ""
    """What answered: an adapter's name, or `base`."""
    rule: str = ""
    feature: str = ""
    token: int | None = None
    value: float | None = None
    threshold: float | None = None
    actions: tuple[str, ...] = ()
    message: str = ""
    """Of a roll-back: what happened, in one line."""
    question: str | None = None
    answer: str | None = None
    trace: Mapping[str, Any] | None = None
    """`tokens` of the answer, thought included, and `values` of the feature at each (None where it was not read)."""
    time: str = field(default_factory=now)

    @classmethod
    def of(cls, alarm: AnswerAlarm, **where: Any) -> "Incident":
        """The incident of an alarm."""
        return cls(
            "alarm",
            rule=alarm.rule,
            feature=alarm.feature,
            token=alarm.token,
            value=rounded(alarm.value),
            threshold=rounded(alarm.threshold),
            actions=alarm.did,
            **where,
        )

    def record(self) -> dict[str, Any]:
        """As plain JSON values; texts only where there are any."""
        record = json_values({**asdict(self), "actions": list(self.actions)})
        for name in ("question", "answer", "trace"):
            kept = record.pop(name)
            if kept is not None:
                record[name] = {k: v[:TOKENS] for k, v in kept.items()} if name == "trace" else kept[:CUT]
        return record


class IncidentLog:
    """Appends incidents to a file, each line whole in one write; several threads may use it.

    Raises:
        InputError: the path is a folder, or cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise InputError(f"{self.path} is a folder: give the name of a file for incidents")
        make_folder(self.path.parent)
        self._lock = Lock()
        with refused("write", self.path, "name another file for incidents"):
            _end_line(self.path)
            # only the user who runs the server reads them: they may hold what people asked
            self._file = FileIO(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")

    def write(self, incident: Incident) -> None:
        """Append one incident.

        Raises:
            OSError: the system refuses, or there is no space for a whole line.
        """
        line = (json.dumps(incident.record()) + "\n").encode()
        with self._lock:
            if self._file.write(line) != len(line):
                raise OSError(f"{self.path}: no space for another line")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _end_line(path: Path) -> None:
    """Cut off a last line that a killed process left torn."""
    if not path.is_file() or not (data := path.read_bytes()) or data.endswith(b"\n"):
        return
    with path.open("r+b") as file:
        file.truncate(data.rfind(b"\n") + 1)


def read_incidents(path: str | Path) -> list[dict[str, Any]]:
    """The incidents of a file, in order.

    Raises:
        InputError: no such file, or a line that is no incident.
    """
    rows = read_jsonl(path, "remove that line, or name the file that `persona-probe serve` wrote")
    for number, row in enumerate(rows, 1):
        if row.get("kind") not in KINDS or not isinstance(row.get("time"), str):
            raise InputError(f"{path}: entry {number} is no incident: name the file that `persona-probe serve` wrote")
    return rows


def alarm_counts(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], int]:
    """Alarms by adapter and rule."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["kind"] == "alarm":
            key = str(row.get("adapter", "")), str(row.get("rule", ""))
            counts[key] = counts.get(key, 0) + 1
    return counts
