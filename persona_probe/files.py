"""Read a file of each kind: whatever its library raises becomes one `InputError` with the file and what to change."""

import json
import math
import re
import reprlib
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from persona_probe.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

AGAIN = "restore it, or make it again"
"""What to change about a damaged file that this package wrote."""
SHOWN = 200
"""Characters of a library's message, or of a bad value, that an error repeats."""
LARGEST = 2**63 - 1
"""The largest whole number that tables and tensors hold."""
YAML_NODES = 100_000
"""Values that a YAML file may hold after its aliases are written out: a few lines of aliases can mean billions."""
_OF_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NOT_FILES = {
    stat.S_ISFIFO: "a pipe: save what it gives to a file first",
    stat.S_ISSOCK: "a socket: give a file",
    stat.S_ISCHR: "a device: give a file",
    stat.S_ISBLK: "a device: give a file",
}


def words(error: BaseException) -> str:
    """What a library's exception says, on one line and not longer than `SHOWN`."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = f"no {text}" if isinstance(error, KeyError) else text
    if "integer string conversion" in text:
        return "a whole number of more than 4,300 digits"
    return text if len(text) <= SHOWN else text[:SHOWN] + " ..."


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def shown(value: object) -> str:
    """A bad value as an error repeats it: long and nested ones are cut."""
    return _repr.repr(value)


@contextmanager
def as_damaged(where: str | Path, change: str = AGAIN) -> Iterator[None]:
    """A block that takes the values of a file apart: one that is missing or of another kind is the file's damage.

    Raises:
        InputError: in place of the KeyError, TypeError and so on of the block.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not isinstance(error, _OF_DAMAGE) and not type(error).__module__.startswith("safetensors"):
            raise
        raise InputError(f"{where} is damaged ({words(error)}): {change}") from error


# --- The file itself


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~user` written out.

    Raises:
        InputError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: no home folder of that name: write the path out") from error


def is_there(path: str | Path) -> bool:
    """Whether there is anything at a path; no for what cannot be a path, such as one that is too long."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def regular_file(path: str | Path, change: str = "check the path") -> Path:
    """The path of a file that can be read: it is there, and is no folder, pipe, socket or device.

    Raises:
        InputError: it is not.
    """
    if "\0" in str(path):
        raise InputError(f"the path {str(path)!r} holds a NUL character: {change}")
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise InputError(f"{path} {'does not exist' if missing else _denied(error)}: {change}") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder, not a file: {change}")
    for is_kind, what in _NOT_FILES.items():
        if is_kind(mode):
            raise InputError(f"{path} is {what}")
    return path


def file_or_folder(path: str | Path, change: str = "check the path") -> Path:
    """The path of a folder, or of a file as `regular_file` takes it.

    Raises:
        InputError: it is neither.
    """
    return Path(path) if "\0" not in str(path) and Path(path).is_dir() else regular_file(path, change)


def _denied(error: Exception) -> str:
    return f"cannot be read ({getattr(error, 'strerror', None) or words(error)})"


def read_text(path: str | Path, change: str = "save it as UTF-8") -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        InputError: no such file, a folder, a pipe, or not UTF-8.
    """
    path = regular_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is not UTF-8"
        raise InputError(f"{path} cannot be read as text ({where}): {change}") from error
    except OSError as error:
        raise InputError(f"{path} {_denied(error)}: {change}") from error


# --- JSON, and JSON Lines


class NotJson(ValueError):
    """Why a text is not JSON, or holds what cannot be stored: one line."""


def decode_json(text: str) -> Any:
    """The value of JSON text.

    Raises:
        NotJson: not JSON, nested too deeply, a number too long to read, or a lone surrogate, which no file can hold.
    """
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise NotJson(f"{error.msg} at {line}column {error.colno}") from error
    except RecursionError as error:
        raise NotJson("too deeply nested") from error
    except UnicodeEncodeError as error:
        raise NotJson(f"half of a character (\\u{ord(error.object[error.start]):x})") from error
    except ValueError as error:  # a whole number of more than 4,300 digits
        raise NotJson(words(error)) from error
    return value


def parse_json(text: str, where: str, change: str = AGAIN) -> Any:
    """`decode_json`, with an error for the user; `where` names the file, or file and line.

    Raises:
        InputError: see `decode_json`.
    """
    try:
        return decode_json(text)
    except NotJson as error:
        raise InputError(f"{where} is damaged (not JSON: {error}): {change}") from error


def read_json(path: str | Path, kind: type = dict, change: str = AGAIN) -> Any:
    """The value of a JSON file, which must be of one kind (`object` takes any).

    Raises:
        InputError: the file cannot be read, is not JSON, or holds another kind.
    """
    value = parse_json(read_text(path, change), str(path), change)
    if not isinstance(value, kind):
        wanted = {dict: "an object", list: "a list"}.get(kind, kind.__name__)
        raise InputError(f"{path} is damaged (it holds {_kind(value)}, not {wanted}): {change}")
    return value


def read_jsonl(path: str | Path, change: str = AGAIN) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; blank lines are passed over.

    Raises:
        InputError: the file cannot be read, or one of its lines is no JSON object.
    """
    return list(parse_jsonl(read_text(path, change), str(path), change))


def parse_jsonl(text: str, where: str, change: str = AGAIN) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines.

    Raises:
        InputError: a line is no JSON object.
    """
    # not splitlines(): answers may hold U+2028 and the like, which JSON does not escape
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        value = parse_json(line, f"{where}, line {number}", change)
        if not isinstance(value, dict):
            raise InputError(f"{where}, line {number} is damaged (it holds {_kind(value)}, not an object): {change}")
        yield value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# --- YAML


def read_yaml(path: str | Path, change: str = "correct it") -> Any:
    """The value of a YAML file.

    Raises:
        InputError: see `parse_yaml`.
    """
    return parse_yaml(read_text(path), str(path), change)[0]


def parse_yaml(text: str, where: str, change: str = "correct it") -> tuple[Any, yaml.Node | None]:
    """The value of YAML text (plain values only: no code runs), and its tree of nodes, which know their lines.

    Raises:
        InputError: not YAML, nested too deeply, a key twice in one mapping, a lone surrogate, or aliases that mean
            themselves or more than `YAML_NODES` values.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_nodes(root, where)
        return yaml.safe_load(text), root
    except InputError:
        raise
    except RecursionError as error:
        raise InputError(f"{where} is not valid YAML (too deeply nested): {change}") from error
    except (yaml.YAMLError, ValueError) as error:
        said = words(error).replace('in "<unicode string>", ', "in ")
        raise InputError(f"{where} is not valid YAML: {said}: {change}") from error
    except Exception as error:  # of a tag: whatever the conversion fails with
        raise InputError(f"{where} is not valid YAML: a value is not what its tag says: {change}") from error


def _check_nodes(root: yaml.Node | None, where: str) -> None:
    """Refuse what YAML readers take in silence: a key twice (the last one counts), aliases without end."""
    sizes: dict[int, int] = {}
    if root is not None:
        _check_node(root, where, sizes, set())


def _check_node(node: yaml.Node, where: str, sizes: dict[int, int], inside: set[int]) -> int:
    """The number of values below a node, aliases written out."""
    line = f"{where}, line {node.start_mark.line + 1}"
    if id(node) in inside:
        raise InputError(f"{line}: an alias means what it is a part of: write the values out")
    if id(node) in sizes:
        return sizes[id(node)]
    children: Iterable[yaml.Node] = ()
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, where)
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    elif not _is_text(str(node.value)):
        raise InputError(f"{line}: half of a character: write it in UTF-8")
    inside.add(id(node))
    size = 1 + sum(_check_node(child, where, sizes, inside) for child in children)
    inside.discard(id(node))
    if size > YAML_NODES:
        raise InputError(f"{line}: more than {YAML_NODES:,} values, with its aliases written out: use fewer aliases")
    sizes[id(node)] = size
    return size


def _check_keys(mapping: yaml.MappingNode, where: str) -> None:
    seen: dict[str, int] = {}
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
            continue
        line = key.start_mark.line + 1
        if key.value in seen:
            raise InputError(
                f"{where}, line {line}: key {shown(key.value)} occurs twice, first in line {seen[key.value]}: keep one"
            )
        seen[key.value] = line


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- Values


def check_plain(value: object, where: str, depth: int = 0) -> None:
    """Refuse a value that JSON cannot hold: a date, bytes, NaN, a number too large, a lone surrogate.

    Raises:
        InputError: it holds one; `where` names its place.
    """
    if depth > 50:
        raise InputError(f"{where} is too deeply nested: write fewer levels")
    if isinstance(value, dict):
        for key, entry in value.items():
            check_plain(str(key), where, depth + 1)
            check_plain(entry, f"{where}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for entry in value:
            check_plain(entry, where, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where} must be a finite number, not {value}")
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise InputError(f"{where} must be a number below 2^63, not {shown(value)}")
    elif isinstance(value, str) and not _is_text(value):
        raise InputError(f"{where} holds half of a character: write it in UTF-8")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise InputError(f"{where} must be a text, a number, true, false, a list or a mapping, not {shown(value)}")


# --- Tables and tensors


def read_parquet(path: str | Path, columns: Iterable[str] = (), change: str = AGAIN) -> "pd.DataFrame":
    """A parquet table with at least these columns.

    Raises:
        InputError: the file cannot be read, is no parquet file, or lacks a column.
    """
    import pandas as pd

    path = regular_file(path)
    try:
        table = pd.read_parquet(path)
    except Exception as error:  # pyarrow and pandas raise many kinds on damaged bytes
        raise InputError(f"{path} cannot be read as parquet ({words(error)}): {change}") from error
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}: {change}")
    return table


def read_tensors(path: str | Path, names: Iterable[str] = (), change: str = AGAIN) -> "dict[str, Tensor]":
    """The tensors of a safetensors file, with at least these names, on the CPU.

    Raises:
        InputError: the file cannot be read, is no safetensors file, or lacks a tensor.
    """
    from safetensors.torch import load_file

    path = regular_file(path)
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors, and torch for a type that it does not have
        raise InputError(f"{path} cannot be read as safetensors ({words(error)}): {change}") from error
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(f"{path} has no tensor {missing[0]!r}: {change}")
    return tensors
