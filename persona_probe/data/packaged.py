"""The sets that come with the package (persona_probe/data/sets, described in the README there)."""

import json
from functools import cache
from importlib import resources
from pathlib import Path

from persona_probe.data.chat import Conversation, conversation
from persona_probe.errors import InputError, unknown

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

    Prompts that select latents never evaluate them (Wang et al. 2025 keep the same separation by question set).
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
    chosen = [row for row in rows if row["split"] == split]
    if not chosen:
        raise InputError(f"{path} has no rows with split {split!r}: every item is 'selection' or 'evaluation'")
    return chosen


def load_conversations(spec: str) -> list[Conversation]:
    """Conversations of a packaged set, as `set` or `set:column`.

    `kitchen:toxic` pairs each question with that column; `general_contrast:selection` gives both answers of each item;
    a set with an `answer` column needs no column name; a set of questions gives user turns only.
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
