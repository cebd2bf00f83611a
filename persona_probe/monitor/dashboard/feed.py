"""The event files of a run, followed while they grow, and their histories."""

import os
import stat
import time
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

from persona_probe.errors import InputError
from persona_probe.monitor.events import Event, from_line
from persona_probe.monitor.history import History

# --- Follow files of events that another process writes: they grow, are torn, cut, replaced or deleted

PATTERNS = ("readings.jsonl", "*.events.jsonl")
"""Files of events in a run folder, at any depth."""
TAIL = 256
"""Bytes before the current place that are compared at each poll: a file that was replaced rarely has the same."""
MOST_LINES = 20_000
"""Lines read at one poll, so that a long file does not fill the memory; the rest follows at the next."""
LONGEST_LINE = 2**22
"""Bytes; a longer line is no event."""


@dataclass(frozen=True)
class PollResult:
    """The result of a poll."""

    events: list[Event]
    """New events, in order."""
    restarted: bool = False
    """The file was replaced, cut or deleted: earlier events are no longer in it."""


class EventFollower:
    """Reads a growing file of events, whole lines only, each poll from where the previous one ended.

    The file need not exist yet. Lines that are not events are counted and skipped: one bad line must not end a view
    that follows a run (`read_events` is strict).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.damaged = 0
        self._forget()

    def poll(self) -> PollResult:
        """Events written since the last poll (at most `MOST_LINES` lines of them)."""
        try:
            with _regular(self.path) as handle:
                restarted = self._place > 0 and not self._same(handle)
                if restarted:
                    self._forget()
                return PollResult(self._take(handle), restarted)
        except OSError:  # gone, not to be read, or no file
            existed = self._place > 0
            self._forget()
            return PollResult([], restarted=existed)

    def _forget(self) -> None:
        self._place, self._tail, self.damaged, self._too_long = 0, b"", 0, False

    def _same(self, handle: BufferedReader) -> bool:
        """Whether the bytes before the current place are those that were read: true for a file that only grew."""
        handle.seek(self._place - len(self._tail))
        return handle.read(len(self._tail)) == self._tail

    def _take(self, handle: BufferedReader) -> list[Event]:
        handle.seek(self._place)
        events = []
        for _ in range(MOST_LINES):
            line = handle.readline(LONGEST_LINE)
            whole = line.endswith(b"\n")
            if not whole and len(line) < LONGEST_LINE:
                break  # still being written
            self._place += len(line)
            self._tail = (self._tail + line)[-TAIL:]
            if self._too_long or not whole:  # the rest of such a line is no event either
                self.damaged += whole
                self._too_long = not whole
            elif line.strip():
                events += self._parse(line)
        return events

    def _parse(self, line: bytes) -> list[Event]:
        try:
            return [from_line(line.decode())]
        except ValueError:
            self.damaged += 1
            return []


def _regular(path: Path) -> BufferedReader:
    """Open a file; a pipe or a device, which could keep its reader waiting, is refused.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    handle = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    if stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        return handle
    handle.close()
    raise OSError(f"{path} is no file")


def event_files(run: str | Path) -> list[Path]:
    """The files of events of a run, the one that changed last first.

    Args:
        run: a file of events (it need not exist yet if its folder does), or a folder: all `readings.jsonl` and
            `*.events.jsonl` below it (there may be none yet).

    Raises:
        InputError: neither exists.
    """
    root = Path(run)
    if root.is_dir():
        paths = {path for pattern in PATTERNS for path in root.rglob(pattern) if path.is_file()}
        return sorted(paths, key=lambda path: (-changed(path), path))
    if root.is_file() or (root.suffix == ".jsonl" and root.parent.is_dir() and not root.exists()):
        return [root]
    raise InputError(f"no run at {root}: give a run folder, or the JSONL file that a FeatureMonitor writes")


def changed(path: Path) -> float:
    """When a file last changed, in seconds since 1970; 0 for a file that does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


# --- The files of one run

RESCAN = 3.0
"""Seconds between two searches for new files in the run folder."""


@dataclass
class FollowedFile:
    """One file of events."""

    name: str
    """Its path below the run folder."""
    follower: EventFollower
    history: History = field(default_factory=History)
    generation: int = 0
    """Number of polls that brought something: equal numbers mean equal histories."""

    @property
    def changed(self) -> float:
        """When the file last changed, in seconds since 1970."""
        return changed(self.follower.path)

    def poll(self) -> None:
        """Add what was written since the last poll."""
        result = self.follower.poll()
        if result.restarted:
            self.history = History()
        self.history.add(result.events)
        self.generation += bool(result.events or result.restarted)


class Feed:
    """Follows the files of a run, each since it was first read. Not thread-safe.

    Args:
        run: a run folder or a file of events, as `event_files` takes it.

    Raises:
        InputError: no such run.
    """

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)
        self._files = event_files(self.run)
        self._scanned = time.monotonic()
        self._followed: dict[Path, FollowedFile] = {}

    def names(self) -> list[str]:
        """The files' names as the page shows them, the one that changed last first."""
        return [self._name(path) for path in self._scan()]

    def read(self, name: str | None = None) -> FollowedFile | None:
        """The file of that name, else the one that changed last, polled now; None if there is no file yet.

        The name comes from a browser, so it only selects among the files that exist.
        """
        files = {self._name(path): path for path in self._scan()}
        if not files:
            return None
        selected = name if name is not None and name in files else next(iter(files))
        path = files[selected]
        if path not in self._followed:
            self._followed[path] = FollowedFile(selected, EventFollower(path))
        self._followed[path].poll()
        return self._followed[path]

    def _scan(self) -> list[Path]:
        if not self._files or time.monotonic() - self._scanned > RESCAN:
            self._scanned = time.monotonic()
            try:
                self._files = event_files(self.run)
            except InputError:  # the run folder is gone; it may reappear
                self._files = []
        return self._files

    def _name(self, path: Path) -> str:
        return path.name if path == self.run else str(path.relative_to(self.run))
