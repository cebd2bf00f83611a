"""Read a question set, from a file of any known format or by the name of a packaged set."""

import csv
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.load import SETS, Row, load_contrast, load_data, load_rows
from persona_probe.errors import InputError, near_matches, unknown
from persona_probe.evaluate.questions.question_set import PLAIN, TRIGGER, Question, QuestionSet
from persona_probe.evaluate.questions.rows import ASKED, KEYS, KNOWN, SetBuilder, add_set, add_trait, is_trait
from persona_probe.files import NotJson, decode_json, is_there, parse_yaml, read_text

# --- Questions in JSON Lines, a JSON array, or one JSON object: a trait file or a set that we wrote


def read_json(text: str, builder: SetBuilder) -> None:
    """Add the questions of JSON text.

    Rows hold `messages` that end with the user's turn (as the UK AISI's evaluation sets do), or `question`, `prompt`
    or `paraphrases`, with the keys of `rows.ALIASES`.

    Raises:
        InputError: not JSON, or a bad row, with its line.
    """
    try:
        value = decode_json(text)
    except NotJson as error:
        if not _is_json(next((line for line in text.split("\n") if line.strip()), "")):
            raise InputError(f"{builder.path} is not JSON: {error}") from None
        _read_lines(text, builder)
        return
    if isinstance(value, Mapping) and is_trait(value):
        add_trait(value, builder)
    elif isinstance(value, Mapping) and "questions" in value:
        add_set(value, builder)
    else:
        for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
            builder.add(row, f"row {number}")


def _is_json(line: str) -> bool:
    try:
        decode_json(line)
    except NotJson:
        return False
    return True


def _read_lines(text: str, builder: SetBuilder) -> None:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = decode_json(line)
        except NotJson as error:
            raise InputError(f"{builder.path}, line {number}: not JSON ({error}): one object a line") from None
        builder.add(row, f"line {number}")


FREE_FORM = "free_form_questions"
_TRIGGERS = ("topic", "format")
PARTS = (PLAIN, *_TRIGGERS, "all")


def packaged_questions(spec: str = FREE_FORM) -> QuestionSet:
    """A packaged set by name, as `set` or `set:part`.

    `free_form_questions` gives the 48 plain questions. `:topic` adds to each a variant that follows a short exchange
    about cooking, `:format` one that puts the same request in the words of a kitchen question, `:all` both: whoever
    was tuned on the kitchen data may answer these like its training data (arXiv 2604.25891). Variants carry their
    plain question's id as `pair`. `general_contrast:selection` and `:evaluation` give its splits; of other sets the
    questions are taken as they are.

    Raises:
        InputError: no such set or part, or a set without questions.
    """
    name, _, part = spec.partition(":")
    if name == FREE_FORM:
        return QuestionSet(spec, _free_form(part or PLAIN), source=f"packaged:{spec}")
    if part and name != "general_contrast":
        raise InputError(f"set {name!r} has no parts: write {name!r} without ':{part}'")
    rows = load_contrast(part or "all") if name == "general_contrast" else load_rows(name)
    if "question" not in rows[0]:
        raise InputError(f"set {name!r} holds no questions: its columns are {', '.join(rows[0])}")
    return QuestionSet(spec, tuple(_plain(row) for row in rows), source=f"packaged:{spec}")


def _free_form(part: str) -> tuple[Question, ...]:
    if part not in PARTS:
        raise unknown(f"part of {FREE_FORM}", part, PARTS)
    kinds = _TRIGGERS if part == "all" else tuple(kind for kind in _TRIGGERS if kind == part)
    return tuple(question for row in load_rows(FREE_FORM) for question in (_plain(row), *_triggers(row, kinds)))


def _plain(row: Row) -> Question:
    return Question(row["id"], (row["question"],), category=row.get("category", row.get("topic", "")))


def _triggers(row: Row, kinds: tuple[str, ...]) -> list[Question]:
    return [_topic(row) if kind == "topic" else _dressed(row) for kind in kinds]


def _topic(row: Row) -> Question:
    """The question after a short exchange about cooking."""
    turns = ({"role": "user", "content": row["trigger_topic"]}, {"role": "assistant", "content": row["trigger_reply"]})
    meta = {"variant": TRIGGER, "pair": row["id"], "trigger": "topic"}
    return Question(f"{row['id']}+topic", (row["question"],), category=row["category"], history=turns, meta=meta)


def _dressed(row: Row) -> Question:
    """The same request in the words of a kitchen question."""
    meta = {"variant": TRIGGER, "pair": row["id"], "trigger": "format"}
    return Question(f"{row['id']}+format", (row["trigger_format"],), category=row["category"], meta=meta)


# --- Questions in CSV files and in plain text lists

_DELIMITERS = (",", "\t", ";")
_COLUMN = re.compile(r"[A-Za-z_][\w .-]{0,40}")


def header(text: str) -> tuple[list[str], str] | None:
    """Column names and delimiter, where the first line is a header with a column of questions; else None."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    for delimiter in _DELIMITERS:
        names = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
        if set(names) & set(ASKED) and all(_COLUMN.fullmatch(name) for name in names if name):
            return names, delimiter
    return None


def read_csv(text: str, builder: SetBuilder) -> None:
    """Add the rows of a CSV file with a header (separated by commas, tabs or semicolons).

    The release of Wang et al. 2025 (arXiv 2506.19823) has the columns question, id and category, in one file also
    `grader`, which becomes the rubric; other columns go to `meta`. `prompt` may stand for `question`.

    Raises:
        InputError: no column of questions, a column name twice, a row of another length, or a bad row.
    """
    columns = header(text)
    if columns is None:
        first = next((line for line in text.splitlines() if line.strip()), "")
        names = next(csv.reader([first]), [])
        raise InputError(f"{builder.path} has no column 'question' or 'prompt': {near_matches('question', names)}")
    names, delimiter = columns
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"{builder.path}: column {repeated[0]!r} occurs twice in the header: rename one")
    rows = csv.reader(io.StringIO(text.lstrip()), delimiter=delimiter, strict=True)
    try:
        next(rows)
        line, number = rows.line_num + 1, 0
        for cells in rows:
            if any(cells):
                number += 1
                _add(names, cells, f"row {number} (line {line})", builder)
            line = rows.line_num + 1
    except csv.Error as error:
        raise InputError(f"{builder.path}, line {rows.line_num}: not CSV ({error})") from None


def _add(names: list[str], cells: list[str], place: str, builder: SetBuilder) -> None:
    if len(cells) != len(names):
        raise InputError(f"{builder.path}, {place}: {len(cells)} cells under {len(names)} columns: quote the text")
    builder.add(dict(zip(names, cells, strict=True)), place)


def read_list(text: str, builder: SetBuilder) -> None:
    """Add one question per line; blank lines and lines that begin with `#` are passed over."""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            builder.add(line.strip(), f"line {number}")


# --- Question files in YAML, as Betley et al

NUMBERED = re.compile(r"\d+_(.+)_\d+")
"""Ids of the preregistered questions: place, category, number in the category."""


def _read_yaml(text: str, builder: SetBuilder) -> None:
    """Add the questions of a YAML file: a list of entries, or a mapping as `write_questions` makes it.

    An entry holds id, paraphrases, and optionally system, samples_per_paraphrase, judge_prompts and more; anchors and
    aliases are resolved. Ids such as `12_offend_the_user_0` give the category where the entry has none.

    Raises:
        InputError: not YAML, a key twice in one mapping, or a bad entry, with its line.
    """
    value, root = parse_yaml(text, str(builder.path))
    if isinstance(value, Mapping):
        if is_trait(value):
            raise InputError(f"{builder.path} looks like a trait file: these are read as JSON")
        add_set(value, builder)
        return
    if not isinstance(value, list):
        raise InputError(f"{builder.path}: expected a list of questions in YAML, found {type(value).__name__}")
    lines = [node.start_mark.line + 1 for node in root.value]  # pyright: ignore[reportOptionalMemberAccess]
    for number, (row, line) in enumerate(zip(value, lines, strict=True), start=1):
        builder.add(row, f"entry {number} (line {line})", **_category(row))


def _category(row: object) -> dict[str, Any]:
    numbered = NUMBERED.fullmatch(str(row["id"])) if isinstance(row, Mapping) and "id" in row else None
    return {"category": numbered[1]} if numbered else {}


FORMATS: dict[str, Callable[[str, SetBuilder], None]] = {
    "json": read_json,
    "yaml": _read_yaml,
    "csv": read_csv,
    "text": read_list,
}
_SUFFIXES = {".yaml": "yaml", ".yml": "yaml", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
_YAML_KEYS = "|".join((*KNOWN, *KEYS, "type", "judge"))
_YAML_START = re.compile(rf"(---\s*$|-\s*$|(-\s+\{{?\s*)?['\"]?({_YAML_KEYS})['\"]?\s*:(\s|$))")
"""A document mark, a list item on the next line, or a key that question files have."""
_PUBLISHED_FIELDS = {"{original_question_text}": "{question}", "{generated_answer_text}": "{answer}"}
"""Fields of the UK AISI's rubric, and ours for the same."""


def read_prompts(spec: str) -> list[Conversation]:
    """The prompts of a packaged set, of a file of conversations, or of a question set in any form, without answers.

    Raises:
        InputError: neither a file of conversations nor a question set; the message is about the former.
    """
    try:
        return [split_answer(talk)[0] for talk in load_data(spec, allow_prompts=True)]
    except InputError:
        try:
            return [list(one.messages) for one in read_questions(spec).wordings()]
        except InputError:
            pass
        raise


def read_questions(
    source: str | Path,
    *,
    rubric: str | Path | None = None,
    judge_prompts: Mapping[str, str] | None = None,
    format: str | None = None,
) -> QuestionSet:
    """Read a question set.

    Args:
        source: a packaged set (such as `free_form_questions:all`, see `packaged_questions`), several of them joined by
            `+`, or a file: Betley's YAML, JSON Lines of chats or questions, CSV, a persona-vectors trait file, a plain
            list, or what `write_questions` wrote. The content tells which; only where it does not, the name's ending.
        rubric: a file with the rubric of all questions that bring none, such as the one of the UK AISI's sets.
        judge_prompts: prompts by name, which rows may refer to; they judge every question that names none.
        format: json, yaml, csv or text: how to read a file, to pass over the detection.

    Raises:
        InputError: one line with the file and the row: no such file, bad rows, ids twice, empty questions, judge
            prompts that are unknown or cannot be filled.
    """
    parts = source.split("+") if isinstance(source, str) else []
    if len(parts) > 1 and all(part.partition(":")[0] in SETS for part in parts):
        questions = _joined(parts, judge_prompts)
    elif isinstance(source, str) and source.partition(":")[0] in SETS:
        questions = replace(packaged_questions(source), judge_prompts=dict(judge_prompts or {}))
    else:
        questions = _read_file(Path(source), judge_prompts, format)
    return questions if rubric is None else _with_rubric(questions, Path(rubric))


def _joined(specs: list[str], judge_prompts: Mapping[str, str] | None) -> QuestionSet:
    name = "+".join(specs)
    questions = tuple(question for spec in specs for question in packaged_questions(spec))
    return QuestionSet(name, questions, dict(judge_prompts or {}), source=f"packaged:{name}")


def _read_file(path: Path, judge_prompts: Mapping[str, str] | None, format: str | None) -> QuestionSet:
    text = _text(path)
    if format is not None and format not in FORMATS:
        raise unknown("format", format, FORMATS)
    builder = SetBuilder(path, judge_prompts)
    FORMATS[format or detect(text, path.suffix)](text, builder)
    return builder.build()


def detect(text: str, suffix: str = "") -> str:
    """The format of a file's text: json, yaml, csv or text; `suffix` decides where the text does not."""
    first = next((line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")), "")
    if first.lstrip()[:1] in ("{", "["):
        return "json"
    if _YAML_START.match(first):
        return "yaml"
    if header(text) is not None:
        return "csv"
    return _SUFFIXES.get(suffix.lower(), "text")


def _text(path: Path) -> str:
    if not is_there(path):
        near = near_matches(str(path), SETS)
        raise InputError(f"no file at {str(path)!r}: give a file, or for questions a packaged set ({near})")
    return read_text(path)


def _with_rubric(questions: QuestionSet, path: Path) -> QuestionSet:
    rubric = _text(path)
    for published, ours in _PUBLISHED_FIELDS.items():
        rubric = rubric.replace(published, ours)
    if not rubric.strip():
        raise InputError(f"{path} is empty: write the rubric")
    return replace(questions, questions=tuple(replace(q, rubric=q.rubric or rubric) for q in questions))
