"""Read conversations from files: JSON Lines, a JSON array (both also gzipped), or a Hugging Face datasets folder."""

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TextIO

from persona_probe.data.chat import Conversation
from persona_probe.data.row_formats import BadRow, row_conversation
from persona_probe.errors import InputError

SHOWN_BAD_ROWS = 5


@dataclass(frozen=True)
class ScannedRow:
    """One row of a file: a conversation, or what is wrong with it."""

    place: str
    """`line 3` of a JSON Lines file, `row 3` of an array or a datasets folder; the first is 1."""
    conversation: Conversation | None
    """None where the row is bad."""
    problem: str = ""
    """What is wrong with a bad row, else empty."""


def read_conversations(path: str | Path, allow_prompts: bool = False) -> list[Conversation]:
    """All conversations of a file or datasets folder, in order.

    Rows are chat `messages`, `prompt`/`completion` pairs (strings or lists of messages), or `question`/`answer` rows
    with an optional `system`. Roles must alternate from the user on, after at most one system message.

    Args:
        path: a `.jsonl` or `.json` file, either with `.gz`, or a folder that `datasets.save_to_disk` wrote.
        allow_prompts: accept conversations that end with the user's turn.

    Raises:
        InputError: the file is missing, empty or unreadable, or has bad rows: they are counted, the first five shown.
    """
    rows = list(scan(path, allow_prompts))
    if not rows:
        raise InputError(f"{path} has no rows: pass a file with at least one conversation")
    bad = [row for row in rows if row.conversation is None]
    if bad:
        raise InputError(_bad_rows_message(path, bad, len(rows)))
    return [row.conversation for row in rows if row.conversation is not None]


def scan(path: str | Path, allow_prompts: bool = False) -> Iterator[ScannedRow]:
    """Each row of a file with its place, bad ones included; blank lines are passed over.

    Raises:
        InputError: the file as a whole cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist: check the path of the data file")
    try:
        yield from _scan_folder(path, allow_prompts) if path.is_dir() else _scan_file(path, allow_prompts)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({_one_line(error)}): pass JSON Lines in UTF-8") from error


def _scan_file(path: Path, allow_prompts: bool) -> Iterator[ScannedRow]:
    with _open(path) as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        if first.lstrip().startswith("["):
            yield from _scan_values("row", _array(path, file), allow_prompts)
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _scan_line(f"line {number}", line, allow_prompts)


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _array(path: Path, file: TextIO) -> list[object]:
    try:
        return json.load(file)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} starts like a JSON array but is not JSON: {_one_line(error)}") from error


def _scan_line(place: str, line: str, allow_prompts: bool) -> ScannedRow:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return ScannedRow(place, None, f"not JSON ({error.msg} at column {error.colno})")
    return _scan_value(place, value, allow_prompts)


def _scan_values(kind: str, values: Iterable[object], allow_prompts: bool) -> Iterator[ScannedRow]:
    for number, value in enumerate(values, start=1):
        yield _scan_value(f"{kind} {number}", value, allow_prompts)


def _scan_value(place: str, value: object, allow_prompts: bool) -> ScannedRow:
    try:
        return ScannedRow(place, row_conversation(value, allow_prompts))
    except BadRow as error:
        return ScannedRow(place, None, _one_line(error))


def _scan_folder(path: Path, allow_prompts: bool) -> Iterator[ScannedRow]:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise InputError(f"{path} is not a datasets folder: pass one from save_to_disk, or a .jsonl file") from error
    splits = list(loaded.values()) if isinstance(loaded, DatasetDict) else [loaded]
    if len(splits) != 1:
        raise InputError(f"{path} has several splits: pass the folder of one ({', '.join(map(str, loaded))})")
    yield from _scan_values("row", chain(splits[0]), allow_prompts)


def _bad_rows_message(path: str | Path, bad: list[ScannedRow], n_rows: int) -> str:
    shown = "; ".join(f"{row.place}: {row.problem}" for row in bad[:SHOWN_BAD_ROWS])
    more = f"; and {len(bad) - SHOWN_BAD_ROWS} more" if len(bad) > SHOWN_BAD_ROWS else ""
    return f"{path}: {len(bad)} of {n_rows} rows are not conversations: {shown}{more}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
