"""The activation cache's folder: entries appear and go whole, and the least recently used ones go first."""

import contextlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from persona_probe.errors import InputError

log = logging.getLogger(__name__)

MARKER = "persona-probe-activations.txt"
ENTRY = re.compile(r"[0-9a-f]{64}")
WRITING, REMOVING = ".writing-", ".removing-"
STALE_SECONDS = 3600.0
"""Unfinished work of this age was left by a process that was killed."""


def open_folder(folder: Path) -> None:
    """Make or take a cache folder, and remove what killed processes left in it.

    Raises:
        InputError: it holds something else, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
        foreign = [n for n in names if n != MARKER and not ENTRY.fullmatch(n) and not n.startswith((WRITING, REMOVING))]
        if foreign or (names and MARKER not in names):
            raise InputError(f"{folder} holds {(foreign or names)[0]!r}, no activation cache: choose an empty folder")
        if not names:
            (folder / MARKER).write_text("An activation cache of persona_probe: it may be deleted whole.\n")
    except OSError as error:
        raise InputError(f"could not use {folder} as cache: {error.strerror}; choose another folder") from error
    for path in folder.iterdir():
        if path.name.startswith((WRITING, REMOVING)) and time.time() - _used(path) > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def entries(folder: Path) -> list[Path]:
    """All entries, least recently used first."""
    found = [path for path in folder.iterdir() if ENTRY.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_used(path), path.name))


@contextlib.contextmanager
def new_entry(folder: Path, key: str) -> Iterator[Path]:
    """A scratch folder that becomes the entry `key` when the block ends well; else nothing of it stays.

    Where another process has moved the same entry in meanwhile, that one stays.

    Raises:
        OSError: the disk is full or read-only.
    """
    scratch, target = folder / f"{WRITING}{uuid.uuid4().hex}", folder / key
    try:
        scratch.mkdir()
        yield scratch
        touch(scratch)
        with contextlib.suppress(OSError):
            scratch.rename(target)
        if not target.is_dir():
            raise OSError(f"could not move {scratch.name} to {key}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove(entry: Path) -> None:
    """Remove an entry; it is taken out of sight first, so that no process finds half of it."""
    aside = entry.with_name(f"{REMOVING}{uuid.uuid4().hex}")
    try:
        entry.rename(aside)
    except FileNotFoundError:
        return  # another process was first
    except OSError as error:
        log.warning("activation cache: could not remove %s: %s", entry, error)
    shutil.rmtree(aside, ignore_errors=True)


def make_room(folder: Path, limit_bytes: int) -> None:
    """Remove the least recently used entries until the rest is within the limit."""
    sizes = {path: size(path) for path in entries(folder)}
    total = sum(sizes.values())
    for path, taken in sizes.items():
        if total <= limit_bytes:
            return
        remove(path)
        total -= taken


def touch(entry: Path) -> None:
    """Note that an entry is used now. It may be gone already, or the folder read-only: then its age stays."""
    now = time.time_ns()
    with contextlib.suppress(OSError):
        os.utime(entry, ns=(now, now))


def size(entry: Path) -> int:
    """Bytes of an entry's files; 0 when another process has removed it."""
    try:
        return sum(file.stat().st_size for file in entry.iterdir())
    except FileNotFoundError:
        return 0


def _used(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0
