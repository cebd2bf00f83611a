"""Write a file or a folder whole or not at all, and say in words what the operating system refused."""

import contextlib
import errno
import glob
import json
import math
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_probe.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

# --- What the operating system refused, in words

FULL = (errno.ENOSPC, errno.EDQUOT)
REASONS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than is allowed here",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "there is a file of that name",
    errno.EISDIR: "it is a folder",
    errno.ENOTEMPTY: "the folder is not empty",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its links lead in a circle",
    errno.ENOENT: "there is no such file or folder",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the network file system has lost it",
    errno.EBUSY: "it is in use",
}
CURES = {
    **dict.fromkeys(FULL, "free space"),
    errno.EFBIG: "raise the limit (ulimit -f)",
    errno.ENAMETOOLONG: "shorten it",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit (ulimit -n)"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check the disk"),
}


def reason(error: OSError) -> str:
    """What happened: `permission denied`, `no space left on the disk`, `runs/a is a file, not a folder`."""
    if error.errno in (errno.ENOTDIR, errno.EEXIST) and error.filename is not None:
        path = Path(os.fsdecode(error.filename))
        part = next((p for p in (path, *path.parents) if p.is_symlink() or p.exists()), None)
        if part is not None and not part.is_dir():
            return f"{part} is a {'file' if part.exists() else 'link to nothing'}, not a folder"
    return REASONS.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__


def cure(error: OSError, otherwise: str) -> str:
    """What to change: only a full disk is told to free space."""
    known = CURES.get(error.errno or 0)
    return f"{known} or {otherwise}" if known else otherwise


def os_error(error: BaseException) -> OSError | None:
    """The operating system's error behind an exception; None where it is of another kind.

    Libraries that are written in Rust, such as safetensors, have kinds of their own with its number in the text.
    """
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return None if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def could_not(act: str, path: Path, error: OSError, otherwise: str = "choose another --out") -> InputError:
    """An `InputError` in one line: `could not write runs/a/x.csv: permission denied; choose another --out`."""
    file = None if error.filename is None else Path(os.fsdecode(error.filename))
    elsewhere = f" ({file})" if file is not None and path.parent not in (file, *file.parents) else ""
    return InputError(f"could not {act} {path}: {reason(error)}{elsewhere}; {cure(error, otherwise)}")


@contextlib.contextmanager
def refused(act: str, path: Path, otherwise: str = "choose another --out") -> Iterator[None]:
    """Turn an error of the operating system in this block into an `InputError`.

    Raises:
        InputError: see `could_not`; or the path holds a NUL character.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and "null" in str(error):
            raise InputError(f"could not {act} {str(path)!r}: it holds a NUL character; {otherwise}") from error
        if (known := os_error(error)) is None:
            raise
        raise could_not(act, path, known, otherwise) from error


def make_folder(path: Path, otherwise: str = "choose another --out") -> Path:
    """Make a folder and those above it, where they are missing.

    Raises:
        InputError: it cannot be made.
    """
    with refused("make", path, otherwise):
        path.mkdir(parents=True, exist_ok=True)
    return path


# --- Files

LEFT, ASIDE = ".tmp", ".old"


@contextlib.contextmanager
def whole_file(path: Path, otherwise: str = "choose another --out") -> Iterator[Path]:
    """A temporary file next to `path` that takes its place when the block ends well; otherwise it is removed.

    Its name has this machine's name and this process's id, and no other block uses it: two writers of one file replace
    it one after the other. What a killed process left behind is removed by the next that writes the same file.
    A device or a pipe, such as /dev/stdout, is written directly.

    Args:
        otherwise: what an error tells the user to do, besides freeing space where that helps.

    Raises:
        InputError: the operating system refuses; the line says what happened.
    """
    with refused("write", path, otherwise):
        if path.name in ("", "..") or path.is_dir():
            raise InputError(f"could not write {path}: it is a folder; give the name of a file")
        if path.exists() and (not path.is_file() or path.parts[:2] == ("/", "dev")):
            yield path
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = _scratch(path)
        try:
            for leftover in _leftovers(path, LEFT):
                remove(leftover)
            yield scratch
            scratch.chmod(0o644)
            scratch.replace(path)
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write a text file (UTF-8) whole or not at all."""
    with whole_file(path) as scratch:
        # Line ends stay as they are: others would change the hashes of a report's scripts.
        scratch.write_text(text, encoding="utf-8", newline="\n")
    return path


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all."""
    with whole_file(path) as scratch:
        scratch.write_bytes(content)
    return path


def write_json(path: Path, value: Any, indent: int = 2) -> Path:
    """Write JSON whole or not at all."""
    return write_text(path, json.dumps(value, indent=indent) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON lines whole or not at all."""
    return write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_table(path: Path, frame: "pd.DataFrame") -> Path:
    """Write a parquet table whole or not at all."""
    with whole_file(path) as scratch:
        frame.to_parquet(scratch, index=False)
    return path


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file whole or not at all."""
    from safetensors.torch import save_file

    with whole_file(path) as scratch:
        save_file(dict(tensors), scratch, None if metadata is None else dict(metadata))
    return path


def json_values(value: Any) -> Any:
    """Plain JSON values: numpy's numbers as Python's, and null for NaN and infinities, which JSON does not have."""
    import numpy as np

    if isinstance(value, dict):
        return {str(key): json_values(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- Folders


@contextlib.contextmanager
def whole_folder(path: Path, otherwise: str = "choose another --out") -> Iterator[Path]:
    """A new folder next to `path` that takes its place when the block ends well; otherwise it is removed.

    What stood at `path` is there, whole, until its successor is; it is put back where the exchange fails.

    Raises:
        InputError: the operating system refuses.
    """
    scratch = _scratch(path)
    with refused("write", path, otherwise):
        path.parent.mkdir(parents=True, exist_ok=True)
        rescue(path)
        for leftover in _leftovers(path, LEFT):
            remove(leftover)
        try:
            scratch.mkdir()
            yield scratch
            exchange(scratch, path)
        finally:
            remove(scratch)


def exchange(new: Path, path: Path) -> None:
    """Put a file or folder in the place of another of the same file system, which is removed only then."""
    if not (path.exists() or path.is_symlink()):
        new.replace(path)
        return
    old = _scratch(path, ASIDE)
    path.replace(old)
    try:
        new.replace(path)
    except BaseException:
        old.replace(path)
        raise
    remove(old)


def rescue(path: Path) -> None:
    """Put back what a process had moved aside from `path` when it was killed, before the successor took its place."""
    for old in _leftovers(path, ASIDE):
        if path.exists():
            remove(old)
        else:
            old.replace(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that it holds, where it exists and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, ... that does not exist."""
    number, free = 1, path
    while free.exists() or free.is_symlink():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _scratch(path: Path, kind: str = LEFT) -> Path:
    return path.with_name(f".{path.name}.{_host()}.{uuid.uuid4().hex[:6]}.{os.getpid()}{kind}")


def _leftovers(path: Path, kind: str) -> list[Path]:
    """What processes of this machine that have ended left next to a path."""
    pattern = f".{glob.escape(path.name)}.{glob.escape(_host())}.{'[0-9a-f]' * 6}.*{kind}"
    return [p for p in path.parent.glob(pattern) if not _is_running(p.name.split(".")[-2])]


def _host() -> str:
    return socket.gethostname()[:40]


def _is_running(process: str) -> bool:
    """Whether a process of this machine has that id; yes where that cannot be known."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError, OverflowError):
        return True
    return True
