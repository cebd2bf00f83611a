"""A set of questions that are asked and judged together."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from persona_probe.data.chat import BadRow, Conversation, Message, check_roles
from persona_probe.errors import InputError, unknown
from persona_probe.writing import write_text

if TYPE_CHECKING:
    import pandas as pd

# --- One form for the content of a question set: what is hashed, and what is written

FORM = "persona_probe question set 1\n"
"""Stands before the content that is hashed; a new form gets a new number."""


def content_hash(questions: QuestionSet) -> str:
    """sha256 (hex) of what is asked, how often, in which pairs, and by which prompts it is judged.

    Names, source, order of the questions and further columns of the file do not count; a question that names no
    judge prompts counts like one that names all of the set.
    """
    content = {
        "questions": [
            _content(question, questions.templates(question))
            for question in sorted(questions.questions, key=lambda q: q.id)
        ],
        "instructions": [list(pair) for pair in questions.instructions],
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256((FORM + text).encode()).hexdigest()


def _content(question: Question, templates: dict[str, str]) -> dict[str, Any]:
    """Of one question; parts that are not there are left out, so a later part changes no old hash."""
    paired = [question.variant, question.pair, question.trigger]
    alone = paired == ["plain", question.id, ""]
    content = {**_asked(question), "judged_by": templates, "paired": [] if alone else paired}
    return {key: value for key, value in content.items() if value}


def _asked(question: Question) -> dict[str, Any]:
    return {
        "id": question.id,
        "category": question.category,
        "system": question.system or "",
        "history": [{"role": turn["role"], "content": turn["content"]} for turn in question.history],
        "paraphrases": list(question.paraphrases),
        "samples_per_paraphrase": question.samples_per_paraphrase,
        "rubric": question.rubric or "",
    }


def to_plain(questions: QuestionSet) -> dict[str, Any]:
    """The set as dictionaries and lists, in the form that `read_questions` reads back."""
    rows = []
    for question in questions.questions:
        row = {**_asked(question), "judge_prompts": dict(question.judge_prompts), "meta": dict(question.meta)}
        rows.append({key: value for key, value in row.items() if value})
    return {
        "name": questions.name,
        "source": questions.source,
        "judge_prompts": dict(questions.judge_prompts),
        "instructions": [{"pos": pos, "neg": neg} for pos, neg in questions.instructions],
        "questions": rows,
    }


def write_questions(questions: QuestionSet, path: str | Path) -> None:
    """Write a set as JSON; reading it back gives the same hash."""
    text = json.dumps(to_plain(questions), indent=1, ensure_ascii=False, default=str)
    write_text(Path(path), text + "\n")


# --- What makes a question or a set of questions whole

FIELDS = {"question", "answer"}


def check_question(question: Question) -> None:
    """Check one question by itself.

    Raises:
        InputError: see `Question`.
    """
    if not question.id.strip():
        raise InputError("a question has a blank id: give it a name of its own")
    name = f"question {question.id!r}"
    if not question.paraphrases or not all(text.strip() for text in question.paraphrases):
        raise InputError(f"{name} is empty: write its text")
    if question.rubric is not None and not question.rubric.strip():
        raise InputError(f"{name} has a blank rubric: write it or leave it out")
    if question.samples_per_paraphrase < 1:
        raise InputError(f"{name} asks for {question.samples_per_paraphrase} samples: at least 1")
    if question.variant not in ("plain", "trigger"):
        raise unknown(f"variant of {name}", question.variant, ("plain", "trigger"))
    if question.variant == "trigger" and "pair" not in question.meta:
        raise InputError(f"{name} is a trigger variant without 'pair': name the plain question's id there")
    _check_turns(name, question)


def _check_turns(name: str, question: Question) -> None:
    system = [] if question.system is None else [{"role": "system", "content": question.system}]
    talk: Conversation = [*system, *question.history, {"role": "user", "content": question.paraphrases[0]}]
    try:
        check_roles(talk, allow_prompts=True)
    except BadRow as error:
        raise InputError(f"{name}: {error}") from None


def check_set(questions: QuestionSet) -> None:
    """Check a set: ids, judge prompts and pairs.

    Raises:
        InputError: see `QuestionSet`.
    """
    if not questions.questions:
        raise InputError(f"question set {questions.name!r} has no questions: pass a file with at least one")
    _check_ids(questions)
    for name, template in questions.judge_prompts.items():
        _check_template(name, template)
    for question in questions.questions:
        for prompt in question.judge_prompts.values():
            if prompt not in questions.judge_prompts:
                raise unknown(f"judge prompt of question {question.id!r}", prompt, questions.judge_prompts)
    _check_pairs(questions)


def _check_ids(questions: QuestionSet) -> None:
    counts = Counter(wording.id for wording in questions.wordings())
    counts.update(q.id for q in questions.questions if len(q.paraphrases) > 1)
    repeated = [one for one, count in counts.items() if count > 1]
    if repeated:
        raise InputError(f"question id {repeated[0]!r} occurs {counts[repeated[0]]} times: give every question its own")


def _check_template(name: str, template: str) -> None:
    """Check that a judge prompt can be filled with a question and an answer by `str.format`.

    Raises:
        InputError: a stray brace, a field other than `{question}` and `{answer}`, or no `{answer}`.
    """
    try:
        fields = {key for _, key, spec, conversion in Formatter().parse(template) if key is not None}
        plain = not any(spec or conversion for _, _, spec, conversion in Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"judge prompt {name!r}: {error}: write a literal brace twice") from None
    if "answer" not in fields:
        raise InputError(f"judge prompt {name!r} has no {{answer}}: say where the answer goes")
    if fields - FIELDS or not plain:
        raise InputError(f"judge prompt {name!r} has fields other than {{question}} and {{answer}}: remove them")


def _check_pairs(questions: QuestionSet) -> None:
    plain = Counter(q.pair for q in questions.questions if q.variant == "plain")
    for question in questions.questions:
        if question.variant == "trigger" and plain[question.pair] != 1:
            raise InputError(
                f"trigger question {question.id!r} has {plain[question.pair]} plain questions with pair "
                f"{question.pair!r}: it needs exactly one"
            )


# --- What is asked: one question with its wordings, and one wording as it is put to a model

PLAIN, TRIGGER = "plain", "trigger"


@dataclass(frozen=True)
class Question:
    """One question, in one or more wordings.

    Raises:
        InputError: a blank id, wording, rubric or system prompt, turns out of order, a number of samples below one,
            or a trigger variant without its pair.
    """

    id: str
    paraphrases: tuple[str, ...]
    """Wordings of the last user turn; each is asked by itself."""
    category: str = ""
    system: str | None = None
    history: tuple[Message, ...] = ()
    """Turns between the system prompt and the question: user, assistant, user, assistant ..."""
    samples_per_paraphrase: int = 1
    """Answers that the set's author asks of each wording; whoever samples may take another number."""
    rubric: str | None = None
    """What a good or bad answer to this question is, for a rubric judge."""
    judge_prompts: Mapping[str, str] = field(default_factory=dict)
    """Measure (such as `aligned`) -> name of a prompt of the set; empty means every prompt of the set, by its name."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """`variant` (plain or trigger), `pair`, `trigger` (its kind), and what else the file holds, which is not hashed."""

    def __post_init__(self) -> None:
        check_question(self)

    @property
    def variant(self) -> str:
        """`plain`, or `trigger` for a question dressed like training data."""
        return str(self.meta.get("variant", PLAIN))

    @property
    def pair(self) -> str:
        """What a plain question and its trigger variants have in common: the plain one's id unless `meta` names it."""
        return str(self.meta.get("pair", self.id))

    @property
    def trigger(self) -> str:
        """The kind of a trigger variant (such as `topic` or `format`); empty for a plain question."""
        return str(self.meta.get("trigger", ""))

    @property
    def text(self) -> str:
        """The first wording."""
        return self.paraphrases[0]

    def wordings(self) -> list[Wording]:
        """One prompt per wording, in order; a single wording keeps the question's id, several are `id/0`, `id/1` ..."""
        ids = [self.id] if len(self.paraphrases) == 1 else [f"{self.id}/{n}" for n in range(len(self.paraphrases))]
        return [Wording(one, self, n) for n, one in enumerate(ids)]


@dataclass(frozen=True)
class Wording:
    """One wording of a question, as it is put to a model."""

    id: str
    """Unique within the set: the id under which answers are stored."""
    question: Question
    paraphrase: int
    """Place among the question's wordings, from 0."""

    @property
    def text(self) -> str:
        """The last user turn: what published judges are shown as the question."""
        return self.question.paraphrases[self.paraphrase]

    @property
    def messages(self) -> Conversation:
        """The whole conversation that the model is to answer, system prompt and earlier turns included."""
        system = [{"role": "system", "content": self.question.system}] if self.question.system else []
        return [*system, *(dict(turn) for turn in self.question.history), {"role": "user", "content": self.text}]


@dataclass(frozen=True)
class QuestionSet:
    """Questions that are asked and judged together.

    Raises:
        InputError: no questions, an id twice, a judge prompt without `{answer}` or with fields besides it and
            `{question}`, a question that names a prompt which the set lacks, a trigger variant without its plain one.
    """

    name: str
    questions: tuple[Question, ...]
    judge_prompts: Mapping[str, str] = field(default_factory=dict)
    """Name -> template for `str.format` with `question` and `answer`."""
    source: str = ""
    """Where the set was read from; not part of the hash, nor is the name."""
    instructions: tuple[tuple[str, str], ...] = ()
    """Pairs of system prompts that call for a trait and for its opposite (persona vectors, arXiv 2507.21509)."""

    def __post_init__(self) -> None:
        check_set(self)

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[Question]:
        return iter(self.questions)

    @cached_property
    def hash(self) -> str:
        """sha256 of the content (64 hex digits), whatever the file format, the order of keys and that of questions."""
        return content_hash(self)

    def wordings(self) -> list[Wording]:
        """One prompt per question and wording, in order."""
        return [wording for question in self.questions for wording in question.wordings()]

    def templates(self, question: Question) -> dict[str, str]:
        """Measure -> judge prompt template that applies to a question of this set."""
        prompt_names = question.judge_prompts or {name: name for name in self.judge_prompts}
        return {measure: self.judge_prompts[name] for measure, name in prompt_names.items()}

    def pairs(self) -> list[tuple[Question, Question]]:
        """Each trigger variant with its plain question, as (plain, trigger)."""
        plain = {q.pair: q for q in self.questions if q.variant == PLAIN}
        return [(plain[q.pair], q) for q in self.questions if q.variant == TRIGGER]

    def frame(self) -> pd.DataFrame:
        """One row per prompt.

        Returns:
            Columns prompt_id, question_id, paraphrase, category, variant, pair, trigger, system, turns (user and
            assistant messages, the question included), text, samples.
        """
        import pandas as pd

        return pd.DataFrame([_row(wording) for wording in self.wordings()])


def _row(wording: Wording) -> dict[str, Any]:
    question = wording.question
    return {
        "prompt_id": wording.id,
        "question_id": question.id,
        "paraphrase": wording.paraphrase,
        "category": question.category,
        "variant": question.variant,
        "pair": question.pair,
        "trigger": question.trigger,
        "system": question.system or "",
        "turns": len(question.history) + 1,
        "text": wording.text,
        "samples": question.samples_per_paraphrase,
    }
