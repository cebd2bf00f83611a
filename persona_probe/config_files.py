"""Read configuration dataclasses from YAML: an unknown key or a wrong type is an error that says what to change."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from persona_probe.config import StudyConfig
from persona_probe.errors import InputError, near_matches

T = TypeVar("T")


def load_config(path: str | Path, kind: type[T] = StudyConfig) -> T:
    """Read a YAML file into a configuration dataclass.

    Raises:
        InputError: missing or malformed file, unknown key (near matches listed), or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no config at {str(path)!r}: give the path of a YAML file")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} must hold a mapping of keys, not {type(raw).__name__}")
    return from_dict(kind, raw, str(path))


def from_dict(kind: type[T], raw: dict[str, Any], where: str = "config") -> T:
    """Build a configuration dataclass from plain values; `where` names the place in messages."""
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    for key in raw:
        if key not in fields:
            raise InputError(f"{where}: unknown key {key!r}: {near_matches(str(key), fields)}")
    for name, f in fields.items():
        if name not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: key {name!r} is missing")
    values = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in raw.items()}
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(args, value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise InputError(f"{where} must be a mapping, not {value!r}")
        return from_dict(typing.cast(type, hint), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} must be a list, not {value!r}")
        return tuple(_convert(args[0], item, where) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where} must be a mapping, not {value!r}")
        return {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _number(value, where)
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, hint):
        raise InputError(f"{where} must be {getattr(hint, '__name__', hint)}, not {value!r}")
    return value


def _number(value: int | float | str, where: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise InputError(f"{where} must be a number, not {value!r}") from None


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    failures = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert(option, value, where)
        except InputError as error:
            failures.append(str(error))
    raise InputError(failures[-1])
