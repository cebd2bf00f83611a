"""Text that others wrote (rows, answers, names), for a terminal and for a spreadsheet: shown, never obeyed."""

import re
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

LONGEST = 600
"""Characters of one message."""
_SPACES = "\n\t"
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that turn the direction of the text around them."""


def terminal_text(text: str) -> str:
    r"""The text with everything that a terminal would obey written out, such as `\x1b`; lines and tabs stay.

    Those are control characters, separators of lines that are no newline, marks that reorder text, and halves of
    surrogate pairs.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _harmless(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(text: str, longest: int = LONGEST) -> str:
    """A message in one line for a terminal; the middle of a very long one is left out."""
    line = terminal_text(" ".join(text.split()))
    if len(line) <= longest:
        return line
    head = longest * 2 // 3
    return f"{line[:head]} ... {line[head + 5 - longest :]}"


def _harmless(character: str) -> bool:
    if character in _SPACES:
        return True
    return unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") and character not in _REORDERING


# --- A spreadsheet runs a cell that begins like a formula

_FORMULA = re.compile(r"[\s\0\ufeff\u200b]*[=+@\-\uff1d\uff0b\uff20\uff0d]|[\t\r\n]")
"""What a spreadsheet takes for a formula, perhaps behind spaces that it skips; the last four signs are wide forms."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
GUARD = "'"
"""Put before such a cell, as spreadsheets themselves mark text."""


def csv_text(frame: "pd.DataFrame", **settings: Any) -> str:
    """A table as CSV in which a spreadsheet finds no formula.

    Text that begins with `=`, `+`, `-`, `@` (also behind spaces), a tab or a line break gets an apostrophe in front,
    in cells and headings. Numbers stay as they are, and so does text that is a number. Carriage returns become line
    breaks.

    Args:
        settings: of `DataFrame.to_csv`.
    """
    import pandas as pd

    columns = [column if _holds_no_text(column) else column.astype(object).map(_guarded) for _, column in frame.items()]
    guarded = pd.concat(columns, axis=1) if columns else frame
    guarded.columns = [_guarded(name) for name in frame.columns]
    return guarded.to_csv(**{"index": False, **settings})


def _holds_no_text(column: "pd.Series") -> bool:
    import pandas as pd

    return pd.api.types.is_numeric_dtype(column) or pd.api.types.is_datetime64_any_dtype(column)


def _guarded(value: object) -> object:
    if not isinstance(value, str):
        return value
    # Python's csv leaves a carriage return unquoted, and what follows it would be a row of its own.
    text = value.replace("\r\n", "\n").replace("\r", "\n")
    return GUARD + text if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text
