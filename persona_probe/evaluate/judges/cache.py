"""The judgement cache: replies by content, in one SQLite file that several processes may use at the same time."""

import contextlib
import hashlib
import json
import logging
import os
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from persona_probe import locks
from persona_probe.data.chat import Message
from persona_probe.errors import InputError
from persona_probe.evaluate.judges.replies import Reply
from persona_probe.models.load import cache_folder

log = logging.getLogger(__name__)

# --- The SQLite file of a judgement cache: made, opened, checked

_VERSION = 1
_BUSY_SECONDS = 30.0
TABLES = """
CREATE TABLE IF NOT EXISTS judgements (
    key TEXT PRIMARY KEY, judge TEXT NOT NULL, protocol TEXT NOT NULL, prompt TEXT NOT NULL, reply TEXT NOT NULL,
    score REAL, label TEXT NOT NULL, mass REAL NOT NULL, judged_at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL, lease REAL NOT NULL) WITHOUT ROWID;
"""


def opened(path: str) -> sqlite3.Connection:
    """A connection to the cache at `path`, made if it is not there.

    Raises:
        InputError: the file is no judgement cache, or of another version.
    """
    if path != ":memory:":
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise InputError(f"{path} is a judgement cache of version {version}: give another path")
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables - {"judgements", "claims"}:
            raise InputError(f"{path} is another program's database, no judgement cache: give another path")
        _prepare(connection)
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path} is no judgement cache ({error}): give another path") from error
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    _to_wal(connection)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.executescript(TABLES)
    connection.execute(f"PRAGMA user_version = {_VERSION}")


def _to_wal(connection: sqlite3.Connection) -> None:
    """Switch to WAL. SQLite does not wait its busy timeout here when two processes make the file together."""
    until = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.05)


_KEYS_AT_ONCE = 500


def default_path() -> Path:
    """judgements.sqlite in the user's cache folder."""
    return cache_folder() / "judgements.sqlite"


def judgement_key(judge: str, protocol: str, messages: Sequence[Message], written: int = 0) -> str:
    """SHA-256 of what decides a reply: the judge with its decoding parameters, the protocol, the whole prompt.

    The answer is part of the prompt.
    """
    content = [judge, protocol, list(messages), written]
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class StoredJudgement:
    """One judgement, as the cache holds it."""

    key: str
    judge: str
    protocol: str
    prompt: str
    """The messages sent, as JSON."""
    reply: Reply
    score: float | None
    """As it was read when it was judged; readers read the reply again."""
    label: str
    mass: float


class JudgementCache:
    """The file, in WAL mode; safe with several threads and processes on one machine (not on a network drive).

    A process claims a missing judgement before it asks for it. While it judges it holds a lock next to the file, which
    the operating system frees when the process ends, however it ends: its claims are free at once. A claim is also a
    lease, which its owner renews, so that one that hangs does not keep others waiting. Leases go by the machine's
    monotonic clock: setting the time does not matter.

    Args:
        path: the file; None is `default_path()`, ":memory:" keeps nothing.

    Raises:
        InputError: the file is no judgement cache, or of a newer version.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = str(default_path() if path is None else path)
        self._lock = threading.Lock()
        self._connection = opened(self.path)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time.

        Raises:
            InputError: the file cannot be read or written.
        """
        with self._lock:
            try:
                yield self._connection
            except sqlite3.Error as error:
                cure = "check that its disk is not full and its folder writable, or give another cache"
                raise InputError(f"the judgement cache {self.path} does not work ({error}): {cure}") from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction: it takes the file's lock at once, so that two claimers cannot both read first."""
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    def replies(self, keys: Iterable[str]) -> dict[str, Reply]:
        """The cached replies of some keys. One that cannot be read, or is no reply, is removed."""
        replies: dict[str, Reply] = {}
        damaged: list[str] = []
        distinct = list(dict.fromkeys(keys))
        for start in range(0, len(distinct), _KEYS_AT_ONCE):
            part = distinct[start : start + _KEYS_AT_ONCE]
            marks = ",".join("?" * len(part))
            with self._open() as connection:
                rows = connection.execute(f"SELECT key, reply FROM judgements WHERE key IN ({marks})", part).fetchall()
            for key, reply in rows:
                try:
                    replies[key] = Reply.from_json(reply)
                except (ValueError, TypeError, RecursionError):
                    damaged.append(key)
        if damaged:
            log.warning("%s: %d replies are damaged and are asked for again", self.path, len(damaged))
            with self._transaction() as connection:
                connection.executemany("DELETE FROM judgements WHERE key = ?", [(key,) for key in damaged])
        return replies

    def claim(self, keys: Sequence[str], owner: str, seconds: float, most: int) -> list[str]:
        """Claim up to `most` of the keys that are neither judged nor claimed by another whose lease still runs."""
        mine: list[str] = []
        now = time.monotonic()
        with self._transaction() as connection:
            for key in keys:
                if len(mine) == most:
                    break
                row = connection.execute(
                    "INSERT INTO claims SELECT ?1, ?2, ?3 WHERE NOT EXISTS (SELECT 1 FROM judgements WHERE key = ?1) "
                    "ON CONFLICT (key) DO UPDATE SET owner = ?2, lease = ?3 WHERE lease < ?4",
                    (key, owner, now + seconds, now),
                )
                mine += [key] * row.rowcount
        return mine

    def renew(self, owner: str, seconds: float) -> None:
        """Let an owner's claims run for this many seconds from now."""
        with self._transaction() as connection:
            connection.execute("UPDATE claims SET lease = ? WHERE owner = ?", (time.monotonic() + seconds, owner))

    def release(self, owner: str, keys: Iterable[str] | None = None) -> None:
        """Give up claims: all of the owner's, or those named."""
        with self._transaction() as connection:
            if keys is None:
                connection.execute("DELETE FROM claims WHERE owner = ?", (owner,))
                return
            connection.executemany("DELETE FROM claims WHERE key = ? AND owner = ?", [(key, owner) for key in keys])

    def owners(self) -> list[str]:
        """Who holds claims."""
        with self._open() as connection:
            return [owner for (owner,) in connection.execute("SELECT DISTINCT owner FROM claims").fetchall()]

    def store(self, row: StoredJudgement, owner: str) -> None:
        """Keep a judgement and end its claim. The first one kept stays."""
        values = (row.key, row.judge, row.protocol, row.prompt, row.reply.to_json(), row.score, row.label, row.mass)
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO judgements VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING",
                (*values, time.time()),
            )
            connection.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (row.key, owner))

    def count(self) -> int:
        """How many judgements it holds."""
        with self._open() as connection:
            return int(connection.execute("SELECT COUNT(*) FROM judgements").fetchone()[0])


# --- The claims of one run on a judgement cache, renewed in the background for as long as its process lives

LEASE = 60.0
"""Seconds that the claims of a process that hangs still hold; those of one that has ended are free at once."""


class Claims:
    """A context manager: inside it claims are renewed, at its end (errors included) they are given up."""

    def __init__(self, cache: JudgementCache, lease: float | None = None) -> None:
        self.cache, self.lease = cache, LEASE if lease is None else lease
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
        self._ended = threading.Event()
        self._heartbeat = threading.Thread(target=self._renew, name="judge-claims", daemon=True)
        self._alive = contextlib.ExitStack()

    @property
    def _folder(self) -> Path | None:
        """Where owners hold their locks; None for a cache in memory, which no other process sees."""
        return None if self.cache.path == ":memory:" else Path(self.cache.path).parent

    def __enter__(self) -> "Claims":
        if self._folder is not None:
            self._alive.enter_context(locks.held(self._folder, _lock(self.owner), self.cache.path, instead=None))
        self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._heartbeat.join()
        with self._alive:
            self.cache.release(self.owner)

    def _renew(self) -> None:
        while not self._ended.wait(self.lease / 3):
            with contextlib.suppress(InputError):  # a file that is busy now is free at the next turn
                self.cache.renew(self.owner, self.lease)

    def take(self, keys: Sequence[str], most: int) -> list[str]:
        """Claim up to `most` of the keys that nobody has judged or is judging."""
        mine = self.cache.claim(keys, self.owner, self.lease, most)
        if len(mine) < min(most, len(keys)) and self._free_the_dead():
            taken = set(mine)
            rest = [key for key in keys if key not in taken]
            mine += self.cache.claim(rest, self.owner, self.lease, most - len(mine))
        return mine

    def _free_the_dead(self) -> bool:
        """Give up the claims of owners that have ended; whether there were any."""
        dead = [owner for owner in self.cache.owners() if owner != self.owner and not self._is_alive(owner)]
        for owner in dead:
            self.cache.release(owner)
        if dead and self._folder is not None:
            locks.sweep(self._folder)
        return bool(dead)

    def _is_alive(self, owner: str) -> bool:
        return self._folder is not None and locks.owner(self._folder, _lock(owner)) is not None

    def others(self) -> str:
        """Who else is judging, as words for a message."""
        folder = self._folder
        owners = [owner for owner in self.cache.owners() if owner != self.owner]
        names = [] if folder is None else [locks.owner(folder, _lock(owner)) for owner in owners]
        return " and ".join(sorted({name for name in names if name})) or "another process"

    def drop(self, keys: Sequence[str]) -> None:
        """Give up some claims."""
        self.cache.release(self.owner, keys)

    def store(self, row: StoredJudgement) -> None:
        """Keep a judgement that was claimed."""
        self.cache.store(row, self.owner)


def _lock(owner: str) -> str:
    """The name of an owner's lock."""
    return f"judging-{owner.rpartition(':')[2]}"
