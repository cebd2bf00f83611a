"""Read the files of a run folder; what is damaged is said with its path."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from persona_probe.errors import InputError


def read_table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """A parquet table with at least these columns; an empty one where the file is not there."""
    if not path.is_file():
        return pd.DataFrame(columns=list(columns))
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as parquet ({error}): run its stage again") from error
    for column in columns:
        if column not in table.columns:
            raise InputError(f"{path.name} has no column {column!r}: run its stage again with this version")
    return table


def read_json(path: Path, kind: type) -> Any:
    """A JSON value of one kind; an empty one where the file is not there."""
    if not path.is_file():
        return kind()
    value = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(value, kind):
        raise InputError(f"{path} holds a {type(value).__name__}, not a {kind.__name__}: run its stage again")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; none where the file is not there."""
    if not path.is_file():
        return []
    # not splitlines(): answers may hold U+2028 and the like, which JSON does not escape
    lines = path.read_text(encoding="utf-8").split("\n")
    return [_parse(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error}); run its stage again") from error
