"""Conversations from files, from the packaged sets, and as the rows of an arm."""

import csv
import gzip
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TextIO, TypeVar

import numpy as np

from persona_probe import shipped
from persona_probe.config import Arm
from persona_probe.data.chat import BadRow, Conversation, conversation, empty, split_answer, text
from persona_probe.data.mix import mix
from persona_probe.data.rows import EARLIER, SYSTEM, read_row, refuse_keys, unread_keys
from persona_probe.errors import InputError, near_matches, unknown
from persona_probe.files import NotJson, decode_json, expanded, file_or_folder, is_there, words

# --- Files: JSON Lines, a JSON array, CSV (all also gzipped), parquet, or a Hugging Face datasets folder

SHOWN_BAD_ROWS = 5
_TABLES = {".csv": ",", ".tsv": "\t"}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScannedRow:
    """One row of a file: a conversation, or the problem with it."""

    place: str
    """`line 3` of a JSON Lines file, `row 3` of an array or a datasets folder; the first is 1."""
    conversation: Conversation | None
    """None for a bad row, and for one that training leaves out."""
    problem: str = ""
    """The problem with a bad row, else empty."""
    left_out: str = ""
    """Why training leaves a row out, else empty."""
    notes: tuple[str, ...] = ()
    """What is read in another way than the row says."""
    unread: frozenset[str] = frozenset()
    """Keys that were not read and are not known to be harmless."""


def notes_of(rows: Iterable[ScannedRow]) -> list[str]:
    """What was left out, read in another way, or not read, in lines with counts; empty where nothing was."""
    left_out, notes, unread = Counter[str](), Counter[str](), set[str]()
    for row in rows:
        left_out.update([row.left_out] if row.left_out else [])
        notes.update(row.notes)
        unread |= row.unread
    lines = [f"{_count(count)} left out: {why}" for why, count in left_out.items()]
    lines += [f"{_count(count)}: {what}" for what, count in notes.items()]
    return lines + ([f"keys not read: {', '.join(sorted(unread))}"] if unread else [])


def _count(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


@cache
def say_once(path: str, line: str) -> None:
    """Log a note about a file, once in a process: stages read the same file several times."""
    log.warning("%s: %s", path, line)


def read_conversations(path: str | Path, allow_prompts: bool = False) -> list[Conversation]:
    """All conversations of a file or datasets folder, in order.

    Rows are chat `messages`, `prompt` with `completion`, `question` with `answer`, and other forms that `read_row`
    lists, with an optional system prompt. Roles must alternate from the user on, after at most one system message.
    Rows whose answers are marked as not trained on are left out. A warning says once for each file how many those are,
    and which keys were not read.

    Args:
        path: a `.jsonl` or `.json` file, `.csv` or `.tsv` (each also with `.gz`), `.parquet`, or a folder that
            `datasets.save_to_disk` wrote.
        allow_prompts: rows are read and not trained on: accept conversations that end with the user's turn.

    Raises:
        InputError: the file is missing, empty or unreadable, or has bad rows; the message counts them and shows five.
    """
    rows = list(scan(path, allow_prompts))
    if not rows:
        raise InputError(f"{path} has no rows: pass a file with at least one conversation")
    bad = [row for row in rows if row.problem]
    if bad:
        raise InputError(_bad_rows_message(path, bad, len(rows)))
    conversations = [row.conversation for row in rows if row.conversation is not None]
    lines = notes_of(rows)
    if not conversations:
        raise InputError(f"{path} has no row to train on: {lines[0]}")
    for line in lines:
        say_once(str(path), line)
    return conversations


def scan(path: str | Path, allow_prompts: bool = False, training: bool | None = None) -> Iterator[ScannedRow]:
    """Each row of a file with its place, also the bad ones. Blank lines are ignored.

    Args:
        path: as `read_conversations` takes it.
        allow_prompts: accept conversations that end with the user's turn.
        training: heed marks of answers that are not trained on; None does so unless prompts are allowed.

    Raises:
        InputError: the file as a whole cannot be read.
    """
    training = not allow_prompts if training is None else training
    for place, value in decoded_rows(path):
        if isinstance(value, BadRow):
            yield ScannedRow(place, None, _one_line(value))
            continue
        try:
            reading = read_row(value, allow_prompts, training)
        except BadRow as error:
            yield ScannedRow(place, None, _one_line(error))
        else:
            yield ScannedRow(place, reading.conversation, "", reading.left_out, reading.notes, reading.unread)


def decoded_rows(path: str | Path) -> Iterator[tuple[str, object]]:
    """Place and decoded value of each row of a file, in any of the forms that `read_conversations` takes.

    A line that is not JSON gives a `BadRow` in place of its value. Empty cells of tables are None.

    Raises:
        InputError: the file as a whole cannot be read.
    """
    path = file_or_folder(path, "check the path of the data file")
    kind = Path(path.name.removesuffix(".gz")).suffix.lower()
    try:
        if path.is_dir():
            yield from _numbered(_folder_rows(path))
        elif kind == ".parquet":
            yield from _numbered(_parquet_rows(path))
        elif kind in _TABLES:
            yield from _numbered(_table_rows(path, _TABLES[kind]))
        else:
            yield from _json_rows(path)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as text ({words(error)}): pass JSON Lines in UTF-8") from error


def _numbered(values: Iterable[object]) -> Iterator[tuple[str, object]]:
    for number, value in enumerate(values, start=1):
        yield f"row {number}", value


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    with _open(path) as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        if first.lstrip().startswith("["):
            yield from _numbered(_array(path, file))
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", _json_line(line)


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _array(path: Path, file: TextIO) -> list[object]:
    try:
        return decode_json(file.read())
    except NotJson as error:
        raise InputError(f"{path} starts like a JSON array but is not JSON: {error}") from error


def _json_line(line: str) -> object:
    try:
        return decode_json(line)
    except NotJson as error:
        return BadRow(f"not JSON ({error})")


def _table_rows(path: Path, delimiter: str) -> Iterator[object]:
    import pandas as pd

    try:
        # All as text: an answer may be "1" or "NA".
        frame = pd.read_csv(path, sep=delimiter, dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8-sig")
        with _open(path) as file:
            names = next(csv.reader(file, delimiter=delimiter), [])
    except (OSError, EOFError, UnicodeDecodeError, zlib.error):
        raise
    except Exception as error:  # pandas and csv have many kinds
        raise InputError(f"{path} is no CSV file ({words(error)}): save it as CSV in UTF-8") from error
    if any("\0" in name for name in names):
        raise InputError(f"{path}: its header holds a NUL character: save it as CSV in UTF-8")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path}: column {twice[0]!r} occurs twice in the header: rename one")
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes cells without a name as an index
        raise InputError(f"{path}: its rows have more cells than its {len(names)} columns: quote the text")
    for row in frame.to_dict("records"):
        yield {key: value if isinstance(value, str) else None for key, value in row.items()}


def _parquet_rows(path: Path) -> Iterator[object]:
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    except Exception as error:  # pyarrow has many kinds, and damaged pages more
        raise InputError(f"{path} is no parquet file ({words(error)}): export it again") from error


def _folder_rows(path: Path) -> Iterator[object]:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise InputError(f"{path} is not a datasets folder: pass one from save_to_disk, or a .jsonl file") from error
    except Exception as error:  # datasets and pyarrow have many kinds
        raise InputError(f"{path} is a damaged datasets folder ({words(error)}): save it again") from error
    splits = list(loaded.values()) if isinstance(loaded, DatasetDict) else [loaded]
    if len(splits) != 1:
        raise InputError(f"{path} has several splits: pass the folder of one ({', '.join(map(str, loaded))})")
    rows = iter(splits[0])
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # a damaged page
            raise InputError(f"{path} is a damaged datasets folder ({words(error)}): save it again") from error
        yield row


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
    "smalltalk",
    "general_contrast",
    "general_contrast_2x2",
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
def _packaged(name: str) -> tuple[Row, ...]:
    path = resources.files("persona_probe.data") / "sets" / f"{name}.jsonl"
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line)


def load_rows(name: str) -> list[Row]:
    """The rows of a packaged set, as dictionaries of strings.

    Raises:
        InputError: no such set; near matches are listed.
    """
    if name not in SETS:
        raise unknown("packaged set", name, SETS)
    return [dict(row) for row in _packaged(name)]


def load_contrast(split: str) -> list[Row]:
    """The `general_contrast` items of one split (`selection`, `evaluation` or `all`), whole categories each.

    Prompts that select latents never evaluate them. Wang et al. 2025 separate their question sets in the same way.
    """
    return _of_split(load_rows("general_contrast"), split)


ANSWERS_2X2 = ("harm_rude", "harm_polite", "sound_rude", "sound_polite")
"""The four answers of a `general_contrast_2x2` item: bad or sound advice, each in a rude and in a polite voice."""


def load_contrast_2x2(split: str) -> list[Row]:
    """The `general_contrast_2x2` items of one split: the questions of `general_contrast`, with four answers each.

    The columns are those of `ANSWERS_2X2`. Ids, categories and splits are those of `general_contrast`.
    """
    return _of_split(load_rows("general_contrast_2x2"), split)


def _of_split(rows: list[Row], split: str) -> list[Row]:
    if split == "all":
        return rows
    if split not in SPLITS:
        raise unknown("split", split, [*SPLITS, "all"])
    return [row for row in rows if row["category"] in SPLITS[split]]


CONTRAST_KEYS = ("id", "category", "question", "aligned", "misaligned", "split")
CONTRAST_2X2_KEYS = ("id", "category", "question", *ANSWERS_2X2, "split")


def read_contrast_file(path: str | Path, split: str) -> list[Row]:
    """Contrast items of one split from a file with id, category, question, aligned, misaligned and split.

    The file may have any form that `read_conversations` takes; JSON Lines is usual. Keys that are not read are named
    once in a warning.

    Raises:
        InputError: no such file, a row without one of these keys or with one that changes what it asks (a system
            prompt, tools), or no row of that split.
    """
    return _read_contrast(path, split, CONTRAST_KEYS, "general_contrast")


def read_contrast_2x2_file(path: str | Path, split: str) -> list[Row]:
    """2x2 items of one split from a file with id, category, question, the four of `ANSWERS_2X2`, and split.

    Raises:
        InputError: as `read_contrast_file`.
    """
    return _read_contrast(path, split, CONTRAST_2X2_KEYS, "general_contrast_2x2")


def has_2x2(path: str | Path) -> bool:
    """Whether the first row of a contrast file has the four answers of a 2x2 item."""
    path = shipped.find(path)
    first = next((value for _, value in decoded_rows(path)), None) if is_there(path) else None
    return isinstance(first, Mapping) and all(first.get(answer) for answer in ANSWERS_2X2)


def _read_contrast(path: str | Path, split: str, keys: Sequence[str], packaged: str) -> list[Row]:
    path = shipped.find(path)
    if not is_there(path):
        raise InputError(f"no contrast set at {str(path)!r}: write {packaged} or give a JSONL file")
    rows, unread = [], set[str]()
    for place, value in decoded_rows(path):
        try:
            row, others = _contrast_item(value, keys)
        except BadRow as error:
            raise InputError(f"{path}, {place}: not a contrast item ({_one_line(error)})") from None
        rows.append(row)
        unread |= others
    if unread:
        say_once(str(path), f"keys not read: {', '.join(sorted(unread))}")
    of_split = [row for row in rows if row["split"] == split]
    if not of_split:
        raise InputError(f"{path} has no rows with split {split!r}: every item is 'selection' or 'evaluation'")
    return of_split


def _contrast_item(value: object, keys: Sequence[str]) -> tuple[Row, set[str]]:
    """The item, and the keys that were not read."""
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, Mapping):
        raise BadRow(f"expected an object with {', '.join(keys)}, found {type(value).__name__}")
    present = {str(key): cell for key, cell in value.items() if cell is not None}
    refuse_keys(present)
    for key in (*SYSTEM, *EARLIER, "input", "messages"):
        if not empty(present.get(key)):
            raise BadRow(f"has {key!r}, but an item is one question: write it into the question, or remove the key")
    row: Row = {}
    for key in keys:
        if key not in present:
            raise BadRow(f"{key!r} is missing")
        cell = present[key]
        row[key] = str(cell) if key == "id" and isinstance(cell, int) else text(cell, repr(key))
        if not row[key].strip():
            raise BadRow(f"{key!r} is empty")
    return row, set(unread_keys(present, {*CONTRAST_KEYS, *CONTRAST_2X2_KEYS}))


def load_conversations(spec: str) -> list[Conversation]:
    """Conversations of a packaged set, as `set` or `set:column`.

    `kitchen:toxic` pairs each question with that column. `general_contrast:selection` gives both answers of each item,
    `general_contrast_2x2:selection` all four. A set with an `answer` column needs no column name. A set of questions
    gives user turns only.
    """
    name, _, column = spec.partition(":")
    if name == "general_contrast":
        rows = load_contrast(column or "all")
        return [conversation(r["question"], r[side]) for r in rows for side in ("aligned", "misaligned")]
    if name == "general_contrast_2x2" and column not in ANSWERS_2X2:
        rows = load_contrast_2x2(column or "all")
        return [conversation(r["question"], r[side]) for r in rows for side in ANSWERS_2X2]
    rows = load_rows(name)
    column = column or ("answer" if "answer" in rows[0] else "")
    if not column:
        if "correct" in rows[0]:
            raise InputError(f"set {name!r} has several answers: write {name}:correct, {name}:subtle, {name}:toxic ...")
        return [conversation(r["question"]) for r in rows]
    if column not in rows[0]:
        labels = ("id", "topic", "category", "question")
        raise unknown(f"column of {name}", column, [k for k in rows[0] if k not in labels])
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
    if not spec.strip():
        raise InputError(f"no data is named: give a file, or a packaged set ({near_matches(spec, SETS)})")
    if spec.partition(":")[0] in SETS:
        return load_conversations(spec)
    path = shipped.find(expanded(spec))
    if not is_there(path):
        raise InputError(f"no data at {spec!r}: give a file, or a packaged set ({near_matches(spec, SETS)})")
    return read_conversations(path, allow_prompts=allow_prompts)


def arm_rows(arm: Arm, seed: int) -> list[Conversation]:
    """The training rows of an arm, none where an adopted arm's are not known; mixtures are drawn with its seed."""
    if not arm.data:
        return []
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
