"""Sampled answers for the report: side by side per question, with the choices of their filter."""

from collections.abc import Iterable, Mapping
from typing import Any

from persona_probe.report.records import Records

Row = dict[str, Any]
MAX_CHARACTERS = 1_500_000
"""Of answers beyond the side-by-side ones: a page of several megabytes of text is slow to open."""


def sampled_answers(records: Records) -> list[Row]:
    """Per question, the last-step answers of the arms side by side; those of other seeds and steps below.

    Each question says in `left_out` how many answers samples.jsonl holds beyond `MAX_CHARACTERS` of the page.
    """
    questions: dict[Any, Row] = {}
    last, room = _last_steps(records.samples), MAX_CHARACTERS
    for sample in records.samples:
        entry = questions.setdefault(sample["question_id"], _empty(sample))
        arm, columns = sample["arm"], entry["columns"]
        if arm in records.arms.names and arm not in columns and sample["step"] == last[arm, sample["seed"]]:
            columns[arm] = sample
        elif (room := room - len(str(sample["answer"]))) >= 0:
            entry["rest"].append({**sample, "key": arm, "arm": records.arms.label(arm)})
        else:
            entry["left_out"] += 1
    _fill_columns(records, list(questions.values()))
    return list(questions.values())


def answer_choices(questions: Iterable[Row]) -> Row:
    """What the filter of answers offers: arms as key and label, and categories."""
    arms = {
        answer["key"]: answer["arm"]
        for entry in questions
        for answer in (*(c for c in entry["columns"] if c["sample"]), *entry["rest"])
    }
    return {"arms": list(arms.items()), "categories": sorted({e["category"] for e in questions if e["category"]})}


def _empty(sample: Mapping[str, Any]) -> Row:
    words = {"question": sample["question"], "category": sample.get("category") or ""}
    return {**words, "columns": {}, "rest": [], "left_out": 0}


def _fill_columns(records: Records, questions: list[Row]) -> None:
    arms = records.arms
    shown = {a: arms.styles[a] for a in arms.names if any(a in q["columns"] for q in questions)}
    for entry in questions:
        entry["columns"] = [
            {"arm": style.label, "key": a, "colour": style.colour, "sample": entry["columns"].get(a)}
            for a, style in shown.items()
        ]


def _last_steps(samples: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], int]:
    last: dict[tuple[str, int], int] = {}
    for sample in samples:
        key = sample["arm"], sample["seed"]
        last[key] = max(sample["step"], last.get(key, 0))
    return last
