"""Files of events, one JSON line each: appended and flushed, so that a killed run loses at most one line."""

import logging
import os
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from persona_probe.errors import InputError
from persona_probe.monitor.events import (
    Event,
    Reading,
    from_line,
    to_line,
)

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

BLOCK = 65_536
"""Bytes read at a time when looking back for the last line's start."""


class JsonlSink:
    """Appends every event to a file as one line of `to_line`.

    An existing file is continued: a last line that was torn by a kill is cut off first, and a whole one without a line
    break gets one. No whole line is lost.

    Args:
        path: the file; its folders are made.
        fsync: also wait until each line is on the disk (survives a crash of the machine, not only of the run).

    Raises:
        InputError: `path` is a folder.
    """

    def __init__(self, path: str | Path, fsync: bool = False) -> None:
        self.path, self.fsync = Path(path), fsync
        if self.path.is_dir():
            raise InputError(f"{self.path} is a folder: give the path of a file, e.g. {self.path / 'readings.jsonl'}")
        self._file: FileIO | None = None

    def emit(self, event: Event) -> None:
        """Append one line. Unbuffered: a line is written at once, or raises; no half of it waits in a buffer."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            recover(self.path)
            self._file = self.path.open("ab", buffering=0)
        line = to_line(event).encode()
        if self._file.write(line) != len(line):
            raise OSError(f"{self.path}: no space for another line")
        if self.fsync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a later `emit` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def recover(path: Path) -> None:
    """Make a file of events end with a whole line: cut a torn last line off, or add a missing line break."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("r+b") as handle:
        start = _last_line_start(handle)
        handle.seek(start)
        last = handle.read()
        if not last:
            return
        if _is_event(last):
            handle.write(b"\n")
            return
        handle.truncate(start)
    log.warning("%s ended in a torn line of %d bytes: cut off", path, len(last))


def read_events(path: str | Path) -> list[Event]:
    """All events of a file, in order; a torn last line is ignored.

    Raises:
        InputError: no such file, or a line before the last that is not an event.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no events at {file}: give the JSONL file that a FeatureMonitor wrote")
    *whole, last = file.read_bytes().split(b"\n")
    events = [_event(file, number, line) for number, line in enumerate(whole, 1) if line.strip()]
    return [*events, from_line(last.decode())] if _is_event(last) else events


def readings_frame(events: Iterable[Event]) -> "pd.DataFrame":
    """All readings as a table, one row per reading and feature (`Reading.rows`); without readings it has no columns."""
    import pandas as pd

    return pd.DataFrame([row for event in events if isinstance(event, Reading) for row in event.rows()])


def _event(file: Path, number: int, line: bytes) -> Event:
    try:
        return from_line(line.decode())
    except ValueError as error:
        raise InputError(f"{file}, line {number} is damaged ({error}): remove it, or read another file") from error


def _is_event(line: bytes) -> bool:
    try:
        from_line(line.decode())
    except ValueError:
        return False
    return True


def _last_line_start(handle: BinaryIO) -> int:
    end = handle.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - BLOCK)
        handle.seek(start)
        if (place := handle.read(end - start).rfind(b"\n")) >= 0:
            return start + place + 1
        end = start
    return 0
