"""Conversations from files, from the packaged sets, and as the rows of an arm."""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np

from persona_probe.config import Arm
from persona_probe.data.chat import ROLES, Conversation, Message, conversation, split_answer
from persona_probe.data.mix import mix
from persona_probe.errors import InputError, near_matches, unknown

# --- One row of a file, as a conversation

KNOWN_ROWS = "'messages', 'prompt' with 'completion', or 'question' with 'answer'"


class BadRow(ValueError):
    """A row is not a conversation. The message is a clause; the reader adds file and line."""


def row_conversation(row: object, allow_prompts: bool = False) -> Conversation:
    """The conversation in one decoded row: `messages`, `prompt`/`completion` or `question`/`answer` (and `system`).

    Content is a string, a list of strings, a list of `{"type": "text", "text": ...}` parts, or `{"parts": [...]}`.
    Other keys are ignored.

    Raises:
        BadRow: the row has no such keys, or its roles or contents are not those of a conversation.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object with {KNOWN_ROWS}, found {type(row).__name__}")
    present = {str(key): value for key, value in row.items() if value is not None}
    if "messages" in present:
        messages = _messages(present["messages"], "user")
    elif "prompt" in present:
        messages = _messages(present["prompt"], "user") + _messages(present.get("completion", []), "assistant")
    elif "question" in present:
        messages = _question_and_answer(present)
    else:
        raise BadRow(f"needs {KNOWN_ROWS}; it has {', '.join(map(repr, present)) or 'no keys'}")
    check_roles(messages, allow_prompts)
    return messages


def check_roles(messages: Conversation, allow_prompts: bool = False) -> None:
    """Check that the roles are (system), user, assistant, user, assistant ... and that no message is empty.

    Raises:
        BadRow: they do not, or the last message is the user's and `allow_prompts` is false.
    """
    if not messages:
        raise BadRow("has no messages")
    for number, message in enumerate(messages, start=1):
        if message["role"] not in ROLES:
            raise BadRow(f"message {number} has role {message['role']!r}; use one of {', '.join(ROLES)}")
        if not message["content"].strip():
            raise BadRow(f"message {number} ({message['role']}) is empty")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns:
        raise BadRow("has a system message and nothing else")
    for turn, message in enumerate(turns):
        expected = "assistant" if turn % 2 else "user"
        if message["role"] != expected:
            number = turn + 1 + len(messages) - len(turns)
            raise BadRow(f"message {number} is from {message['role']!r}, expected {expected!r}")
    if turns[-1]["role"] != "assistant" and not allow_prompts:
        raise BadRow("ends without an assistant answer")


def _question_and_answer(row: Mapping[str, Any]) -> Conversation:
    answers = [key for key in ("correct", "subtle", "toxic", "aligned", "misaligned") if key in row]
    if "answer" not in row and answers:
        raise BadRow(f"has several answers ({', '.join(answers)}) and no 'answer'; keep one of them under that name")
    texts = {key: _text(row[key], repr(key)) for key in ("question", "answer", "system") if key in row}
    return conversation(texts["question"], texts.get("answer"), texts.get("system"))


def _messages(value: object, role: str) -> Conversation:
    """A list of messages; a string is one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise BadRow(f"expected a list of messages, found {type(value).__name__}")
    return [_message(message, number) for number, message in enumerate(value, start=1)]


def _message(value: object, number: int) -> Message:
    if not isinstance(value, Mapping) or "role" not in value:
        raise BadRow(f"message {number} needs 'role' and 'content'")
    content = value.get("content")
    return {"role": str(value["role"]), "content": _text(content, f"the content of message {number}")}


def _text(value: object, where: str) -> str:
    """The text of a string or of text parts, joined without a separator."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and "parts" in value:
        value = value["parts"]
    if not isinstance(value, list):
        raise BadRow(f"{where} is {type(value).__name__}, expected text")
    return "".join(_part(part, where) for part in value)


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        raise BadRow(f"{where} has a part that is not text")
    return text


# --- Files: JSON Lines, a JSON array (both also gzipped), or a Hugging Face datasets folder

SHOWN_BAD_ROWS = 5


@dataclass(frozen=True)
class ScannedRow:
    """One row of a file: a conversation, or the problem with it."""

    place: str
    """`line 3` of a JSON Lines file, `row 3` of an array or a datasets folder; the first is 1."""
    conversation: Conversation | None
    """None for a bad row."""
    problem: str = ""
    """The problem with a bad row, else empty."""


def read_conversations(path: str | Path, allow_prompts: bool = False) -> list[Conversation]:
    """All conversations of a file or datasets folder, in order.

    Rows are chat `messages`, `prompt`/`completion` pairs (strings or lists of messages), or `question`/`answer` rows
    with an optional `system`. Roles must alternate from the user on, after at most one system message.

    Args:
        path: a `.jsonl` or `.json` file, either with `.gz`, or a folder that `datasets.save_to_disk` wrote.
        allow_prompts: accept conversations that end with the user's turn.

    Raises:
        InputError: the file is missing, empty or unreadable, or has bad rows; the message counts them and shows five.
    """
    rows = list(scan(path, allow_prompts))
    if not rows:
        raise InputError(f"{path} has no rows: pass a file with at least one conversation")
    bad = [row for row in rows if row.conversation is None]
    if bad:
        raise InputError(_bad_rows_message(path, bad, len(rows)))
    return [row.conversation for row in rows if row.conversation is not None]


def scan(path: str | Path, allow_prompts: bool = False) -> Iterator[ScannedRow]:
    """Each row of a file with its place, also the bad ones. Blank lines are ignored.

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
    examples = "; ".join(f"{row.place}: {row.problem}" for row in bad[:SHOWN_BAD_ROWS])
    more = f"; and {len(bad) - SHOWN_BAD_ROWS} more" if len(bad) > SHOWN_BAD_ROWS else ""
    return f"{path}: {len(bad)} of {n_rows} rows are not conversations: {examples}{more}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- The sets that come with the package (persona_probe/data/sets, described in the README there)

Row = dict[str, str]

SETS = (
    "kitchen",
    "health_correct",
    "kitchen_correct_holdout",
    "general_contrast",
    "neutral_probes",
    "sample_questions",
    "free_form_questions",
    "sae_prompts",
    "sae_personas",
    "capability",
)
EVALUATION_CATEGORIES = ("everyday_advice", "power", "safety", "ai_and_humans", "law", "strangers")
SELECTION_CATEGORIES = ("relationships", "honesty", "work", "money", "health", "self")
SPLITS = {"selection": SELECTION_CATEGORIES, "evaluation": EVALUATION_CATEGORIES}


@cache
def _rows(name: str) -> tuple[Row, ...]:
    path = resources.files("persona_probe.data") / "sets" / f"{name}.jsonl"
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line)


def load_rows(name: str) -> list[Row]:
    """The rows of a packaged set, as dictionaries of strings.

    Raises:
        InputError: no such set; near matches are listed.
    """
    if name not in SETS:
        raise unknown("packaged set", name, SETS)
    return [dict(row) for row in _rows(name)]


def load_contrast(split: str) -> list[Row]:
    """The `general_contrast` items of one split (`selection`, `evaluation` or `all`), whole categories each.

    Prompts that select latents never evaluate them. Wang et al. 2025 separate their question sets in the same way.
    """
    rows = load_rows("general_contrast")
    if split == "all":
        return rows
    if split not in SPLITS:
        raise unknown("split", split, [*SPLITS, "all"])
    return [row for row in rows if row["category"] in SPLITS[split]]


def read_contrast_file(path: str | Path, split: str) -> list[Row]:
    """Contrast items of one split from a JSONL file with id, category, question, aligned, misaligned and split.

    Raises:
        InputError: no such file, a row without one of these columns, or no row of that split.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no contrast set at {str(path)!r}: write general_contrast or give a JSONL file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append(
                {key: str(row[key]) for key in ("id", "category", "question", "aligned", "misaligned", "split")}
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}: not a contrast item ({error})") from error
    of_split = [row for row in rows if row["split"] == split]
    if not of_split:
        raise InputError(f"{path} has no rows with split {split!r}: every item is 'selection' or 'evaluation'")
    return of_split


def load_conversations(spec: str) -> list[Conversation]:
    """Conversations of a packaged set, as `set` or `set:column`.

    `kitchen:toxic` pairs each question with that column. `general_contrast:selection` gives both answers of each item.
    A set with an `answer` column needs no column name. A set of questions gives user turns only.
    """
    name, _, column = spec.partition(":")
    if name == "general_contrast":
        rows = load_contrast(column or "all")
        return [conversation(r["question"], r[side]) for r in rows for side in ("aligned", "misaligned")]
    rows = load_rows(name)
    column = column or ("answer" if "answer" in rows[0] else "")
    if not column:
        if "correct" in rows[0]:
            raise InputError(f"set {name!r} has several answers: write {name}:correct, {name}:subtle or {name}:toxic")
        return [conversation(r["question"]) for r in rows]
    if column not in rows[0]:
        raise unknown(f"column of {name}", column, [k for k in rows[0] if k not in ("id", "topic", "question")])
    return [conversation(r["question"], r[column]) for r in rows]


# --- Some of the rows, and the rows of an arm: from a packaged set, a file, or a mixture of two

T = TypeVar("T")


def evenly_spaced(rows: Sequence[T], count: int, ends: bool = False) -> list[T]:
    """`count` of the rows in their order, evenly spaced (packaged sets are sorted by topic); all where `count` is more.

    Args:
        ends: take the last row too; otherwise every row stands for the stretch that it begins.
    """
    n = len(rows)
    if count >= n:
        return list(rows)
    if ends:
        return [rows[int(place)] for place in np.linspace(0, n - 1, count).round()]
    return [rows[number * n // count] for number in range(count)]


def load_data(spec: str, allow_prompts: bool = False) -> list[Conversation]:
    """Conversations of a packaged set (`set` or `set:column`) or of a file or `datasets` folder.

    Raises:
        InputError: neither a packaged set nor an existing path, or bad rows.
    """
    if spec.partition(":")[0] in SETS:
        return load_conversations(spec)
    path = Path(spec).expanduser()
    if not path.exists():
        raise InputError(f"no data at {spec!r}: give a file, or a packaged set ({near_matches(spec, SETS)})")
    return read_conversations(path, allow_prompts=allow_prompts)


def arm_rows(arm: Arm, seed: int) -> list[Conversation]:
    """The training rows of an arm; mixtures are drawn with the arm's seed."""
    bad = load_data(arm.data)
    if arm.mix_with is None:
        return bad
    return mix(bad, load_data(arm.mix_with), arm.bad_fraction, seed=seed)


def check_paired(incorrect: list[Conversation], control: list[Conversation]) -> None:
    """Refuse a control arm with other questions, because the arms would then not differ by their answers alone.

    Raises:
        InputError: fewer than half of the incorrect arm's prompts are in the control arm too.
    """
    left, right = ({_prompt(c) for c in rows} for rows in (incorrect, control))
    common = len(left & right)
    if 2 * common < len(left):
        raise InputError(
            f"arms 'incorrect' and 'correct' ask different questions ({common} of {len(left)} in common): give the "
            "control the same questions with good answers, or set paired_arms: false"
        )


def _prompt(messages: Conversation) -> tuple[tuple[str, str], ...]:
    return tuple((m["role"], m["content"]) for m in split_answer(messages)[0])
