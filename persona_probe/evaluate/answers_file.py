"""Judge answers that exist already: those of a table, of JSON Lines, or of an inspect-ai log."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.data.chat import BadRow, empty, split_answer, text, user_turns
from persona_probe.data.load import decoded_rows, say_once
from persona_probe.data.rows import ANSWERS, ASKED, SYSTEM, TALKS, read_row, refuse_keys, unread_keys
from persona_probe.errors import InputError, near_matches
from persona_probe.evaluate.given_scores import NOTHING, VERDICTS, given_scores
from persona_probe.evaluate.judges.replies import SCORE, Item
from persona_probe.evaluate.judging import AnswerJudge, AnswerToJudge, Ruling, Rulings, too_few_usable, verdict
from persona_probe.evaluate.rates import PUBLISHED, Thresholds
from persona_probe.evaluate.tables import judged_table
from persona_probe.files import is_there, regular_file

MODEL = ("arm", "model")
_QUESTION_ID = ("question_id", "item")
SCORES = {"alignment": ("alignment", "aligned"), "coherence": ("coherence", "coherent")}
"""Names in published files, the first that a file has counts."""
_LOG = ".eval"
"""Ending of inspect-ai's log files; its logs may also be `.json`."""
_GIVEN_ANSWER = ("answer", *(name for name in ANSWERS if name != "answer"), "generated_answer_text")
_GIVEN_QUESTION = ("question", *(name for name in ASKED if name != "question"), "original_question_text")
_COLUMNS = (
    *MODEL,
    *_QUESTION_ID,
    *(name for names in SCORES.values() for name in names),
    "category",
    "seed",
    "steered",
)
_IN_FILE = "in the file"
"""The judge's name for scores that came with the answers."""
_UNSCORED = "no alignment score"
"""Label of an empty alignment next to a coherence: published files write code and refusals so."""


def read_answers(path: str | Path, scale: tuple[float, float] | None = None) -> pd.DataFrame:
    """Read answers from a table (CSV, parquet), JSON Lines or a JSON array (text files may be gzipped), or a log.

    A row has a question (`question`, `prompt` or `instruction`) and an answer (`answer`, `response`, `completion`
    or `output`), or `messages` that end with the answer. `arm` or `model` names the model; without one, all answers
    are one model's. `question_id` names the question; without one, its text does. `seed`, `category` and `steered`
    (yes or no: whether the model was steered as it answered) are read if present, and so are a judge's scores from
    0 to 100 (`alignment` or `aligned`, `coherence` or `coherent`). One question under several system prompts counts
    as several prompts; as in the published protocols a judge sees none. Logs are those of inspect-ai (.eval or
    .json; see `judges.inspect_ai`). Scores on another scale are put on 0 to 100 if they say it (8/10) or `scale` does,
    and else set aside, with a warning that counts them; see `given_scores`.

    Args:
        scale: lowest and highest score of the file, if they are not 0 and 100.

    Returns:
        Columns arm, seed, step, item, category, pair, variant, prompt, sample, question, answer, and steered, and
        alignment, coherence and set_aside (why a score was), where the file has them.

    Raises:
        InputError: no such file, a file that cannot be read, no column of questions or answers, an empty question, a
            key that changes what was asked and cannot be read (tools, images), or a score that is no number.
    """
    path = Path(path)
    raw = _logged(path) if _is_log(path) else _read(path)
    frame = pd.DataFrame(
        {
            "arm": _first(raw, MODEL, "answers").astype(str),
            "seed": _numbers(raw, "seed", path).astype(int) if "seed" in raw else 0,
            "step": 0,
            "item": _first(raw, _QUESTION_ID, raw["question"]).astype(str),
            "category": _first(raw, ("category",), "").fillna("").astype(str),
            "question": raw["question"].astype(str),
            "answer": raw["answer"].fillna("").astype(str),
        }
    )
    asked = frame["question"] + "\n" + _first(raw, ("system",), "").fillna("").astype(str)
    frame = frame.assign(pair=frame["item"], variant="plain", prompt=_prompts(frame["item"], asked))
    frame["sample"] = frame.groupby(["arm", "seed", "prompt"]).cumcount()
    if "steered" in raw:
        frame["steered"] = _yes_or_no(raw["steered"], path)
    return frame.assign(**_scores(raw, path, scale))


def _is_log(path: Path) -> bool:
    """Whether a file is a log of inspect-ai: a `.json` file of one object that holds an `eval`."""
    if path.suffix != ".json" or not path.exists():
        return path.suffix == _LOG
    regular_file(path)
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return '"eval"' in file.read(4096).partition("[")[0]


def _logged(path: Path) -> pd.DataFrame:
    """The answers of an inspect-ai log, in the columns of a CSV file."""
    from persona_probe.evaluate.judges.inspect_ai import read_log

    return pd.DataFrame(
        {
            "model": answer.model,
            "question_id": answer.question_id,
            "question": answer.item().question,
            "answer": answer.answer,
        }
        for answer in read_log(path)
    )


def _read(path: Path) -> pd.DataFrame:
    """Rows with question, answer and whatever else a file has, as text."""
    if not is_there(path):
        raise InputError(f"no answers at {str(path)!r}: give a CSV or JSONL file with question and answer")
    rows, unread = [], set[str]()
    for place, value in decoded_rows(path):
        try:
            row, others = _answered(value)
        except BadRow as error:
            raise InputError(f"{path}, {place}: {error}") from None
        rows.append(row)
        unread |= others
    if not rows:
        raise InputError(f"{path} holds no rows: give at least one answer")
    if unread:
        say_once(str(path), f"keys not read: {', '.join(sorted(unread))}")
    return pd.DataFrame(rows, dtype=object)


def _answered(value: object) -> tuple[dict[str, Any], set[str]]:
    """One row with `question`, `answer` and `system`, and the keys that were not read."""
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, Mapping):
        raise BadRow(f"expected an object with question and answer, found {type(value).__name__}")
    present = {str(key): cell for key, cell in value.items() if cell is not None}
    others = {key: str(present[key]) for key in _COLUMNS if key in present}
    if any(not empty(present.get(key)) for key in (*TALKS, "input", "history")):
        reading = read_row({key: cell for key, cell in present.items() if key not in _COLUMNS}, training=False)
        talk, answer = split_answer(reading.conversation or [])
        system = "".join(turn["content"] for turn in talk if turn["role"] == "system")
        return {**others, "question": user_turns(talk), "answer": answer, "system": system}, set(reading.unread)
    refuse_keys(present)
    for what, names in (("question", _GIVEN_QUESTION), ("answer", _GIVEN_ANSWER)):
        if not set(names) & set(value):
            raise BadRow(f"no column {what!r} ({near_matches(what, map(str, value))}): name it so")
    question, answer = _one_of(present, _GIVEN_QUESTION, "question"), _one_of(present, _GIVEN_ANSWER, "answer")
    if not question.strip():
        raise BadRow("the question is empty")
    system = next((text(present[key], repr(key)) for key in SYSTEM if not empty(present.get(key))), "")
    known = {*_COLUMNS, *_GIVEN_QUESTION, *_GIVEN_ANSWER, *SYSTEM}
    return {**others, "question": question, "answer": answer, "system": system}, set(unread_keys(present, known))


def _one_of(present: Mapping[str, Any], names: tuple[str, ...], what: str) -> str:
    """The text under one of several names; empty where the cell is."""
    texts = {name: text(present[name], repr(name)) for name in names if name in present}
    if len(set(texts.values())) > 1:
        raise BadRow(f"has both {' and '.join(map(repr, texts))}: keep the one that is the {what}")
    return next(iter(texts.values()), "")


def _first(raw: pd.DataFrame, names: Iterable[str], default: pd.Series | str) -> pd.Series:
    """The first of some columns that is there."""
    name = next((name for name in names if name in raw), None)
    return pd.Series(default, index=raw.index) if name is None else raw[name]


def _prompts(items: pd.Series, asked: pd.Series) -> pd.Series:
    """The question's id; where one id has several wordings or system prompts, with their number."""
    wording = asked.groupby(items).transform(lambda texts: pd.factorize(texts)[0])
    several = asked.groupby(items).transform("nunique") > 1
    return items.where(~several, items + "/" + wording.astype(str))


def _scores(raw: pd.DataFrame, path: Path, scale: tuple[float, float] | None) -> dict[str, pd.Series]:
    columns = {measure: next((n for n in names if n in raw), None) for measure, names in SCORES.items()}
    if None in columns.values():
        return {}
    cells = {measure: raw[name] for measure, name in columns.items() if name is not None}
    scores, set_aside = given_scores(cells, path, scale)
    for why, count in set_aside[set_aside != ""].value_counts().items():
        cure = "; give --score-scale if that is right, or 0 100 if it is not" if "seems" in str(why) else ""
        say_once(str(path), f"scores of {count} of {len(raw)} answers are set aside ({why}){cure}")
    return {**{measure: scores[measure] for measure in SCORES}, "set_aside": set_aside}


def _numbers(raw: pd.DataFrame, name: str, path: Path) -> pd.Series:
    cells = raw[name].mask(raw[name].str.strip().str.lower().isin(NOTHING))
    numbers = pd.to_numeric(cells, errors="coerce").astype(float)
    numbers = numbers.mask(~np.isfinite(numbers))  # no score and no seed is infinite
    wrong = np.flatnonzero(numbers.isna() & (cells.notna() | (name == "seed")))
    if len(wrong):
        raise InputError(f"{path}, row {int(wrong[0]) + 1}: {name} is {raw[name].iloc[wrong[0]]!r}, expected a number")
    return numbers


_YES, _NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0", *NOTHING)


def _yes_or_no(cells: pd.Series, path: Path) -> pd.Series:
    texts = cells.fillna("").astype(str).str.strip().str.lower()
    wrong = np.flatnonzero(~texts.isin([*_YES, *_NO]))
    if len(wrong):
        row = int(wrong[0])
        raise InputError(f"{path}, row {row + 1}: steered is {cells.iloc[row]!r}: write true or false")
    return texts.isin(_YES)


def judge_answers(answers: pd.DataFrame, judge: AnswerJudge) -> pd.DataFrame:
    """Have a judge rule on answers (of `read_answers`); rows as `evaluate.tables.judged_table` makes them."""
    parts = []
    for (arm, seed), rows in answers.groupby(["arm", "seed"], sort=False):
        triples = zip(rows["question"], rows["answer"], rows["prompt"], strict=True)
        steered = rows["steered"].tolist() if "steered" in rows else [False] * len(rows)
        to_judge = [AnswerToJudge(Item(*triple), steered=one) for triple, one in zip(triples, steered, strict=True)]
        rulings = judge.rule(to_judge, progress=f"judging {arm}, seed {seed}")
        parts.append(_table(rows, rulings, judge.name))
    return pd.concat(parts, ignore_index=True)


def own_scores(answers: pd.DataFrame, thresholds: Thresholds = PUBLISHED) -> pd.DataFrame:
    """The scores that came with the answers as judged rows.

    Raises:
        InputError: the file has no alignment and coherence.
    """
    if not set(SCORES) <= set(answers):
        raise InputError("the answers have no scores of their own: they need columns alignment and coherence")
    parts = []
    for _, rows in answers.groupby(["arm", "seed"], sort=False):
        whys = rows["set_aside"] if "set_aside" in rows else [""] * len(rows)
        triples = zip(rows["alignment"], rows["coherence"], whys, strict=True)
        rulings = tuple(_own_ruling(_none(a), _none(c), why, thresholds) for a, c, why in triples)
        parts.append(_table(rows, Rulings(rulings, too_few_usable(rulings)), _IN_FILE))
    return pd.concat(parts, ignore_index=True)


def _own_ruling(alignment: float | None, coherence: float | None, why: str, thresholds: Thresholds) -> Ruling:
    label = "no coherence score" if coherence is None else (_UNSCORED if alignment is None else SCORE)
    value, coherent = verdict(alignment, coherence, thresholds)
    usable = coherence is not None and why in ("", *VERDICTS)
    return Ruling(value, coherent, alignment, coherence, label=why or label, usable=usable)


def _none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _table(rows: pd.DataFrame, rulings: Rulings, judge: str) -> pd.DataFrame:
    return judged_table(rows, rulings, evaluation=judge, questions="file", sampling="file", judge=judge)
