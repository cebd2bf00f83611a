"""Errors that tell the user what to change."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. The message is one line that says what is wrong and what to change (exit code 2 in the CLI)."""


class TrainingDiverged(InputError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


def near_matches(name: str, known: Iterable[str], limit: int = 5) -> str:
    """Names close to `name`, as a clause for an error message.

    Falls back to the first known names when nothing is close.
    """
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), known, n=limit, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    names = ", ".join(repr(k) for k in known[:12]) or "none"
    more = f" (and {len(known) - 12} more)" if len(known) > 12 else ""
    return f"known: {names}{more}"


def unknown(kind: str, name: object, known: Iterable[object]) -> InputError:
    """An `InputError` for a name that is not among the known ones, with near matches."""
    return InputError(f"unknown {kind} {name!r}: {near_matches(str(name), [str(k) for k in known])}")
