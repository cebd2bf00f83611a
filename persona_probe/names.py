"""Names that become files and folders: they stay inside their folder, and every file system takes them."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from contextvars import ContextVar

from persona_probe.errors import InputError

LONGEST = 100
"""Characters of a name: the files made of it add up to 120 (a suffix, a machine's name), and file systems take 255."""

_RECORDED = ContextVar("recorded", default=False)


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Read names that an earlier version wrote down: only what would leave its folder is refused while this lasts."""
    token = _RECORDED.set(True)
    try:
        yield
    finally:
        _RECORDED.reset(token)


def check_name(name: str, what: str, also: str = "") -> str:
    """A name that may become a file or a folder: ASCII letters, digits, dots, dashes and underscores.

    Args:
        name: the name as a user wrote it.
        what: what is named, for the error: `arm`, `name of the study`.
        also: further characters that are allowed.

    Returns:
        The name.

    Raises:
        InputError: it is empty or longer than `LONGEST`, begins with a dot or a dash, ends with a dot, or has another
            character.
    """
    if _RECORDED.get():
        safe = name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)
    else:
        inner = rf"[\w.\-{re.escape(also)}]"
        safe = len(name) <= LONGEST and re.fullmatch(rf"\w({inner}*[\w\-{re.escape(also)}])?", name, re.ASCII)
    if not safe:
        raise InputError(f"{what} {_short(name)} cannot name a folder: {_cure(name)}")
    return name


def check_names(names: Iterable[str], what: str, also: str = "") -> None:
    """Check several names of one folder; two that differ only in case are one name on some file systems.

    Raises:
        InputError: a bad name, or two that differ only in case.
    """
    known: dict[str, str] = {}
    for name in names:
        check_name(name, what, also)
        other = known.setdefault(name.casefold(), name)
        if other != name and not _RECORDED.get():
            raise InputError(f"{what}s {other!r} and {name!r} differ only in case: rename one")


def check_path(path: str, what: str) -> str:
    """A name of several parts with slashes between them, such as `smollm2-135m-instruct/layer20`; see `check_name`.

    Raises:
        InputError: a part is no name.
    """
    for part in path.split("/"):
        try:
            check_name(part, what)
        except InputError as error:
            raise InputError(str(error).replace(_short(part), _short(path), 1)) from None
    return path


def _short(name: str) -> str:
    return repr(name if len(name) <= LONGEST else f"{name[:40]}...")


def _cure(name: str) -> str:
    if not name:
        return "it is empty"
    if len(name) > LONGEST and not _RECORDED.get():
        return f"it has {len(name)} characters, write at most {LONGEST}"
    if name.strip(".") == "" or name.startswith(".") or name.endswith("."):
        return "it must not begin or end with a dot"
    if name.startswith("-"):
        return "it must not begin with a dash"
    return "write letters (a-z, A-Z), digits, dots, dashes and underscores only"
