"""Locks of folders: one writer at a time. The second one is told who the first is.

A lock is a file in `.locks/` of the folder that it guards. The operating system ties it to the process that holds it
(`filelock`, by flock), so a killed process frees it at once. On a network file system this holds where flock reaches
the other machines: NFS 4, NFS 3 with lockd, Lustre mounted with `flock`, CephFS, GPFS. Where a file system has no
flock at all, filelock falls back to a file that exists while the lock is held.
"""

import contextlib
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from persona_probe.errors import InputError
from persona_probe.writing import reason

FOLDER = ".locks"
PATIENCE_S = 0.3
"""Long enough for an owner to say its name, and for a lock file that its owner is just removing to be gone."""


class InUse(InputError):
    """Another process holds a lock."""


_GUARD = threading.RLock()
_HELD: dict[Path, tuple[FileLock, int]] = {}
"""Locks of this process, each with the number of blocks that are inside it."""


@contextlib.contextmanager
def held(
    folder: Path, name: str, what: str, wait: float = PATIENCE_S, instead: str | None = "choose another --out"
) -> Iterator[None]:
    """Hold the lock `name` of a folder while the block lasts. Blocks of one process may nest.

    Args:
        folder: an existing folder.
        name: the lock's name; a slash in it becomes a dash.
        what: what an error says is in use.
        wait: seconds to wait for another process.
        instead: what an error tells the user to do, if not to wait.

    Raises:
        InUse: another process holds it; its id and host are named.
        InputError: the lock cannot be made.
    """
    path = _path(folder, name)
    _take(path, what, wait, "" if instead is None else f", or {instead}")
    try:
        yield
    finally:
        _give_back(path)


@contextlib.contextmanager
def brief(folder: Path, name: str, what: str, wait: float = 60.0) -> Iterator[None]:
    """Hold a lock for a moment, waiting for other processes and for other threads of this one.

    Raises:
        InUse: another process held it for `wait` seconds.
    """
    with _GUARD, held(folder, name, what, wait):
        yield


RUN, SHARER = "run", "sharer--"
CROWD_S = 10.0
"""How long one that shares a folder waits for the others that are just coming in."""


@contextlib.contextmanager
def alone(folder: Path, wait: float = PATIENCE_S) -> Iterator[None]:
    """Be the only writer of a folder while the block lasts; blocks of one process may nest.

    Raises:
        InUse: another process writes it, alone or with others.
    """
    with held(folder, RUN, str(folder), wait):
        for path in (folder.resolve() / FOLDER).glob(f"{SHARER}*.lock"):
            if path not in _HELD and (name := owner(folder, path.stem)) is not None:
                raise InUse(_in_use(str(folder), name, ", or choose another --out"))
        try:
            yield
        finally:
            sweep(folder)


@contextlib.contextmanager
def together(folder: Path) -> Iterator[None]:
    """Be one of several writers of a folder, each of whom came in by this way; units have locks of their own.

    Raises:
        InUse: a process writes the folder alone.
    """
    with contextlib.ExitStack() as own:
        with held(folder, RUN, str(folder), CROWD_S):
            own.enter_context(held(folder, f"{SHARER}{socket.gethostname()}--{os.getpid()}", str(folder)))
        yield
        with contextlib.suppress(InUse), held(folder, RUN, str(folder)):
            sweep(folder)


def _in_use(what: str, name: str, instead: str) -> str:
    return f"{what} is in use by {name}: wait until it ends{instead}"


def owner(folder: Path, name: str) -> str | None:
    """Who holds a lock, as words for a message; None where it is free."""
    path = _path(folder, name)
    if path in _HELD:
        return _names(os.getpid(), socket.gethostname())
    if not path.exists():
        return None
    probe = FileLock(path, thread_local=False)
    try:
        probe.acquire(timeout=0)
    except (Timeout, OSError):
        return _read_owner(path)
    probe.release()
    return None


def _path(folder: Path, name: str) -> Path:
    return folder.resolve() / FOLDER / f"{name.replace('/', '--')}.lock"


def _take(path: Path, what: str, wait: float, instead: str) -> None:
    with _GUARD:
        if path in _HELD:
            lock, count = _HELD[path]
            _HELD[path] = (lock, count + 1)
            return
        lock = FileLock(path, thread_local=False)
        try:
            _acquire(lock, path, wait)
        except Timeout:
            raise InUse(_in_use(what, _read_owner(path), instead)) from None
        except OSError as error:
            raise InputError(f"could not lock {what} ({reason(error)}): it must be a writable folder") from error
        _HELD[path] = (lock, 1)


def _acquire(lock: FileLock, path: Path, wait: float) -> None:
    until = time.monotonic() + wait
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=max(0.0, until - time.monotonic()), poll_interval=0.02)
        # Another process has given its lock back and removed the folder of locks. Where that happens inside mkdir, the
        # folder existed first and is gone when mkdir looks what it is.
        except (FileNotFoundError, FileExistsError):
            if time.monotonic() > until:
                raise
            continue
        _owner_file(path).write_text(json.dumps(_myself()), encoding="utf-8")
        return


def _give_back(path: Path) -> None:
    with _GUARD:
        lock, count = _HELD[path]
        if count > 1:
            _HELD[path] = (lock, count - 1)
            return
        del _HELD[path]
        with contextlib.suppress(OSError):
            _owner_file(path).unlink(missing_ok=True)
            if not isinstance(lock, SoftFileLock):  # that one removes its file itself
                # While it is held: whoever opened this file meanwhile sees that it has no name, and tries again.
                path.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def _owner_file(path: Path) -> Path:
    return path.with_suffix(".owner")


def _myself() -> dict[str, str | int]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": Path(sys.argv[0] if sys.argv else "").name}


def _read_owner(path: Path) -> str:
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            known = json.loads(_owner_file(path).read_text(encoding="utf-8"))
            return _names(known["pid"], known["host"])
        except (OSError, ValueError, KeyError, TypeError):
            if time.monotonic() > until:
                return "another process"
            time.sleep(0.02)


def _names(process: object, host: object) -> str:
    return f"process {process} on {host}"


# --- What a folder's writers leave while they work


def is_ours(path: Path) -> bool:
    """Whether a path in a folder is its locks."""
    return path.name == FOLDER


def sweep(folder: Path) -> None:
    """Remove the lock files that killed processes left in a folder; one that is held stays."""
    for path in (folder.resolve() / FOLDER).glob("*.lock"):
        if path not in _HELD:
            with contextlib.suppress(InputError), held(folder, path.stem, str(path), wait=0.0):
                pass  # giving it back removes its file


def empty(folder: Path) -> None:
    """Remove all that a folder holds but its locks: the one who does it holds one of them."""
    for path in folder.iterdir():
        if is_ours(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
