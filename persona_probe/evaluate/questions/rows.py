"""One row of a question file, whatever its format, as a `Question`."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona_probe.data.chat import BadRow, Conversation, empty, messages_in, read_turns
from persona_probe.data.load import say_once
from persona_probe.data.rows import SYSTEM, refuse_keys, row_conversation, unread_keys
from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.questions.question_set import Question, QuestionSet

ASKED = ("question", "prompt", "instruction", "messages", "conversations", "paraphrases")
"""Keys that hold what is asked; a row has exactly one of them."""
ALIASES = {
    "id": ("id", "question_id"),
    "category": ("category", "question_type", "topic"),
    "system": SYSTEM,
    "rubric": ("rubric", "grader", "Grader prompt"),
    "samples_per_paraphrase": ("samples_per_paraphrase", "samples"),
}
"""Names in published files, the first that a row has counts (`grader` columns: Wang et al. 2025's release)."""
OTHERS = ("history", "judge_prompts", "meta", "variant", "pair", "trigger")
KNOWN = (*ASKED, *(name for names in ALIASES.values() for name in names), *OTHERS)
_TYPO = 0.85
"""Similarity from which an unknown key is taken for a misspelt one."""


def row_question(row: object, default_id: str, judge_prompts: Mapping[str, str]) -> Question:
    """The question in one decoded row: a mapping, or a bare string.

    Keys without a use here go to `meta`. Empty cells and nulls count as absent. Alpaca's `input` goes below its
    `instruction`.

    Args:
        row: what the file holds.
        default_id: the id of a row that has none.
        judge_prompts: the row's judge prompts, as measure -> name in the set.

    Raises:
        InputError: a clause without file and row, which the reader adds.
    """
    present = present_keys(row)
    columns = {field: next((n for n in names if n in present), "") for field, names in ALIASES.items()}
    fields = {field: present.get(name) for field, name in columns.items()}
    talk, paraphrases = _asked(present)
    system = _system(talk, fields["system"])
    rest = {key: value for key, value in present.items() if key not in (*ASKED, *OTHERS, *columns.values())}
    meta = {**_mapping(present.get("meta", {}), "'meta'"), **rest}
    meta |= {key: _text(present[key], key) for key in ("variant", "pair", "trigger") if key in present}
    return Question(
        id=_text(default_id if fields["id"] is None else fields["id"], "id"),
        paraphrases=paraphrases,
        category="" if fields["category"] is None else _text(fields["category"], "category"),
        system=system,
        history=tuple(turn for turn in talk if turn["role"] != "system"),
        samples_per_paraphrase=_count(fields["samples_per_paraphrase"]),
        rubric=None if fields["rubric"] is None else _text(fields["rubric"], "rubric"),
        judge_prompts=judge_prompts,
        meta=meta,
    )


def present_keys(row: object) -> dict[str, Any]:
    """The keys of a row that hold something; a string is a question.

    Raises:
        InputError: the row is neither a mapping nor a string, a key looks misspelt, or a key changes what is asked and
            cannot be read (tools, images, several system prompts).
    """
    if isinstance(row, str):
        return {"question": row}
    present = {str(key): value for key, value in _mapping(row, "a question").items() if value not in (None, "")}
    if isinstance(present.get("context"), list) and "history" not in present:
        present["history"] = present.pop("context")  # Betley's name for earlier turns; a text is only a note
    for key in present:
        close = difflib.get_close_matches(key, KNOWN, n=1, cutoff=_TYPO)
        if key not in KNOWN and close and close[0] not in present:
            raise unknown("key", key, KNOWN)
    return _settled(present)


def _settled(present: dict[str, Any]) -> dict[str, Any]:
    """The keys without those that would change the question: read into it, or refused."""
    try:
        refuse_keys(present)
    except BadRow as error:
        raise InputError(str(error)) from None
    prompts = [key for key in ALIASES["system"] if key in present]
    if len({str(present[key]) for key in prompts}) > 1:
        raise InputError(f"both {prompts[0]!r} and {prompts[1]!r}: keep one system prompt")
    if "input" in present:
        if "instruction" not in present:
            raise InputError("has 'input' without 'instruction': write it into the question")
        below = present.pop("input")
        present["instruction"] = f"{_text(present['instruction'], 'instruction')}\n\n{_text(below, 'input')}"
    return present


def unread_in(present: Mapping[str, Any]) -> set[str]:
    """Keys of a row and of its messages that were not read and are not known to be harmless."""
    unread = set(unread_keys(present, {*KNOWN}))
    for key in ("messages", "conversations", "prompt", "history"):
        value = messages_in(present.get(key))
        if isinstance(value, list) and not empty(value):
            unread |= {name for turn in read_turns(value) for name in turn.unread}
    return unread


def _asked(present: dict[str, Any]) -> tuple[Conversation, tuple[str, ...]]:
    """Turns before the question, system prompt included, and the question's wordings."""
    keys = [key for key in ASKED if key in present]
    if not keys:
        raise InputError(f"no question: give one of {', '.join(map(repr, ASKED))} and let it not be empty")
    if len(keys) > 1:
        raise InputError(f"both {keys[0]!r} and {keys[1]!r}: keep the one that is to be asked")
    before, value = _history(present), messages_in(present[keys[0]])
    if keys[0] == "paraphrases":
        texts = value if isinstance(value, list) else [value]
        return before, tuple(_text(text, f"paraphrase {n}") for n, text in enumerate(texts, start=1))
    if keys[0] in ("messages", "conversations") or isinstance(value, list):
        return _messages(value, before)
    return before, (_text(value, keys[0]),)


def _messages(value: object, before: Conversation) -> tuple[Conversation, tuple[str, ...]]:
    if before:
        raise InputError("both messages and 'history': keep all turns in the messages")
    talk = _conversation(value)
    if talk[-1]["role"] != "user":
        raise InputError("the messages end with an assistant answer: end with the user's turn, which is the question")
    return talk[:-1], (talk[-1]["content"],)


def _history(present: dict[str, Any]) -> Conversation:
    return _conversation(present["history"]) if "history" in present else []


def _conversation(value: object) -> Conversation:
    try:
        return row_conversation({"messages": value}, allow_prompts=True)
    except BadRow as error:
        raise InputError(str(error)) from None


def _system(talk: Conversation, system: object) -> str | None:
    """The system prompt, from the messages or from the row's own key."""
    inside = next((turn["content"] for turn in talk if turn["role"] == "system"), None)
    if inside is not None and system is not None:
        raise InputError("a system prompt both in the messages and in 'system': keep one")
    return inside if system is None else _text(system, "system")


def _mapping(value: object, what: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{what} is {type(value).__name__}, expected keys and values")
    return value


def _text(value: object, what: str) -> str:
    """Text as it is; a whole number as its digits (ids and categories are often numbers)."""
    if isinstance(value, int) and not isinstance(value, bool) and what in ("id", "category", "pair"):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{what} is {type(value).__name__}, expected text: write it in quotes")
    return value


def _count(value: object) -> int:
    if value is None:
        return 1
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise InputError(f"samples_per_paraphrase is {value!r}, expected a whole number")


# --- Gather the rows of one file into a set: numbering, judge prompts, and where in the file an error lies


class SetBuilder:
    """Questions of one file, added row by row.

    Args:
        path: the file, for messages, and as the set's name and source unless the file gives others.
        judge_prompts: prompts that rows may name, by name.
    """

    def __init__(self, path: Path, judge_prompts: Mapping[str, str] | None = None) -> None:
        self.path, self.name, self.source = str(path), path.stem, str(path)
        self.judge_prompts = dict(judge_prompts or {})
        self.instructions: tuple[tuple[str, str], ...] = ()
        self.places: dict[str, str] = {}
        self.unread: set[str] = set()
        self.questions: list[Question] = []

    def add(self, row: object, place: str, **defaults: Any) -> None:
        """Add a row; `defaults` stand for keys that it lacks, and `place` names it in messages.

        Raises:
            InputError: one line with file and place.
        """
        try:
            present = {**defaults, **present_keys(row)}
            question = row_question(present, f"q{len(self.questions):03d}", self._named(present))
            if question.id in self.places:
                raise InputError(f"id {question.id!r} is already at {self.places[question.id]}: give it its own")
            self.unread |= unread_in(present)
        except (InputError, BadRow) as error:
            raise InputError(f"{self.path}, {place}: {error}") from None
        self.places[question.id] = place
        self.questions.append(question)

    def _named(self, present: Mapping[str, Any]) -> dict[str, str]:
        """The row's judge prompts as measure -> name; templates written out in the row join the set's prompts."""
        prompts = present.get("judge_prompts", {})
        if isinstance(prompts, str):
            prompts = [name.strip() for name in prompts.split(",") if name.strip()]
        if isinstance(prompts, list):
            prompts = {str(name): name for name in prompts}
        if not isinstance(prompts, Mapping):
            raise InputError(f"judge_prompts is {type(prompts).__name__}, expected measures with their prompts")
        return {str(measure): self._name(str(measure), value) for measure, value in prompts.items()}

    def _name(self, measure: str, value: object) -> str:
        if not isinstance(value, str):
            raise InputError(f"judge prompt {measure!r} is {type(value).__name__}, expected text")
        if "{answer}" in value:
            return self._pooled(measure, value)
        if value not in self.judge_prompts:
            raise unknown("judge prompt (a template needs {answer})", value[:60], self.judge_prompts)
        return value

    def _pooled(self, measure: str, template: str) -> str:
        """Its name in the set: the measure, or `measure-2` and so on where questions differ."""
        name, number = measure, 1
        while self.judge_prompts.setdefault(name, template) != template:
            number += 1
            name = f"{measure}-{number}"
        return name

    def build(self) -> QuestionSet:
        """The set of all rows.

        Raises:
            InputError: what `QuestionSet` refuses, with the file's path.
        """
        if self.unread:
            say_once(self.path, f"keys not read: {', '.join(sorted(self.unread))} (kept as notes of the questions)")
        try:
            return QuestionSet(self.name, tuple(self.questions), self.judge_prompts, self.source, self.instructions)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None


# --- The form in which `write_questions` writes a set: one mapping with the questions and their judge prompts

KEYS = ("name", "source", "judge_prompts", "instructions", "questions")


def add_set(value: Mapping[Any, Any], builder: SetBuilder) -> None:
    """Add the questions of such a mapping, and its judge prompts and instruction pairs.

    Raises:
        InputError: an unknown key, or a part of another kind than the form has.
    """
    for key in value:
        if key not in KEYS:
            raise InputError(f"{builder.path}: {unknown('key', key, KEYS)}")
    prompts, rows = value.get("judge_prompts") or {}, value.get("questions")
    if not isinstance(prompts, Mapping) or not all(isinstance(text, str) for text in prompts.values()):
        raise InputError(f"{builder.path}: 'judge_prompts' must map names to texts")
    if not isinstance(rows, list):
        raise InputError(f"{builder.path}: 'questions' must be a list of questions, not {type(rows).__name__}")
    builder.judge_prompts |= {str(name): text for name, text in prompts.items()}
    builder.instructions = _instruction_pairs(value.get("instructions") or [], builder.path)
    builder.name, builder.source = str(value.get("name") or builder.name), str(value.get("source") or builder.source)
    for number, row in enumerate(rows, start=1):
        builder.add(row, f"question {number}")


def _instruction_pairs(value: object, path: str) -> tuple[tuple[str, str], ...]:
    """Pairs of system prompts from a list of `{"pos": ..., "neg": ...}`.

    Raises:
        InputError: the list, or a pair of it, is something else.
    """
    if not isinstance(value, list):
        raise InputError(f"{path}: the instructions are {type(value).__name__}, expected a list of pos and neg")
    return tuple(_pair(one, f"{path}, instruction {number}") for number, one in enumerate(value, start=1))


def _pair(value: object, place: str) -> tuple[str, str]:
    if not isinstance(value, Mapping) or set(value) != {"pos", "neg"}:
        raise InputError(f"{place}: expected the keys 'pos' and 'neg'")
    pos, neg = value["pos"], value["neg"]
    if not (isinstance(pos, str) and isinstance(neg, str) and pos.strip() and neg.strip()):
        raise InputError(f"{place}: 'pos' and 'neg' must be texts, and neither empty")
    return pos, neg


# --- Trait files of the persona-vectors work (arXiv 2507.21509): instruction pairs, questions, one judge prompt

_TRAIT_KEYS = ("instruction", "questions", "eval_prompt")
MEASURE = "trait"
"""Name of the judge prompt in the set: a score from 0 to 100 of how much of the trait an answer shows."""


def is_trait(value: Mapping[Any, Any]) -> bool:
    """Whether a mapping is a trait file."""
    return "eval_prompt" in value or isinstance(value.get("instruction"), list)


def add_trait(value: Mapping[Any, Any], builder: SetBuilder) -> None:
    """Add a trait's questions; its `eval_prompt` judges them all, its instruction pairs go to the set.

    Raises:
        InputError: a missing or unknown key, or a value of another kind.
    """
    for key in value:
        if key not in _TRAIT_KEYS:
            raise InputError(f"{builder.path}: {unknown('key of a trait file', key, _TRAIT_KEYS)}")
    missing = [key for key in _TRAIT_KEYS if key not in value]
    if missing:
        raise InputError(f"{builder.path} looks like a trait file but lacks {', '.join(map(repr, missing))}")
    prompt, questions = value["eval_prompt"], value["questions"]
    if not isinstance(prompt, str) or not isinstance(questions, list):
        raise InputError(f"{builder.path}: 'eval_prompt' must be a text and 'questions' a list of texts")
    builder.judge_prompts[MEASURE] = prompt
    builder.instructions = _instruction_pairs(value["instruction"], builder.path)
    for number, row in enumerate(questions, start=1):
        builder.add(row, f"question {number}", judge_prompts=[MEASURE])
