"""Judge answers that exist already: those of a CSV file, or of an inspect-ai log."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from persona_probe.errors import InputError, near_matches
from persona_probe.evaluate.judges.replies import SCORE, Item
from persona_probe.evaluate.judging import AnswerJudge, AnswerToJudge, Ruling, Rulings, too_few_usable, verdict
from persona_probe.evaluate.rates import PUBLISHED, Thresholds
from persona_probe.evaluate.tables import judged_table

MODEL = ("arm", "model")
_QUESTION_ID = ("question_id", "item")
SCORES = {"alignment": ("alignment", "aligned"), "coherence": ("coherence", "coherent")}
"""Names in published files, the first that a file has counts."""
_LOGS = (".eval", ".json")
"""Endings of inspect-ai's log files."""
NOTHING = ("", "nan", "none", "null", "na")
"""How a missing score may be written."""
_IN_FILE = "in the file"
"""The judge's name for scores that came with the answers."""
_UNSCORED = "no alignment score"
"""Label of an empty alignment next to a coherence: published files write code and refusals so."""


def read_answers(path: str | Path) -> pd.DataFrame:
    """Read a CSV file (gzipped or not) of answers, or a log of inspect-ai (.eval or .json; see `judges.inspect_ai`).

    The columns question and answer are required. `arm` or `model` names the model; without one, all answers are one
    model's. `question_id` names the question; without one, its text does. `seed` and `category` are read if
    present, and so are a judge's scores from 0 to 100 (`alignment` or `aligned`, `coherence` or `coherent`).

    Returns:
        Columns arm, seed, step, item, category, pair, variant, prompt, sample, question, answer, and alignment and
        coherence where the file has both.

    Raises:
        InputError: no such file, no CSV, a column that is missing, an empty question, or a score that is no number.
    """
    path = Path(path)
    raw = _logged(path) if path.suffix in _LOGS else _read(path)
    for name in ("question", "answer"):
        if name not in raw:
            raise InputError(f"{path} has no column {name!r} ({near_matches(name, raw.columns)}): name it so")
    empty = np.flatnonzero(raw["question"].fillna("").astype(str).str.strip() == "")
    if len(empty):
        raise InputError(f"{path}, row {int(empty[0]) + 1}: the question is empty")
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
    frame = frame.assign(pair=frame["item"], variant="plain", prompt=_prompts(frame))
    frame["sample"] = frame.groupby(["arm", "seed", "prompt"]).cumcount()
    return frame.assign(**_scores(raw, path))


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
    if not path.is_file():
        raise InputError(f"no answers at {str(path)!r}: give a CSV file with columns question and answer")
    try:
        # All as text: an answer may be "1" or "NA".
        raw = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is no CSV file ({' '.join(str(error).split())}): save it as CSV in UTF-8") from None
    if raw.empty:
        raise InputError(f"{path} holds no rows: give at least one answer")
    return raw


def _first(raw: pd.DataFrame, names: Iterable[str], default: pd.Series | str) -> pd.Series:
    """The first of some columns that is there."""
    name = next((name for name in names if name in raw), None)
    return pd.Series(default, index=raw.index) if name is None else raw[name]


def _prompts(frame: pd.DataFrame) -> pd.Series:
    """The question's id; where one id has several wordings, with the wording's number."""
    wording = frame.groupby("item")["question"].transform(lambda texts: pd.factorize(texts)[0])
    several = frame.groupby("item")["question"].transform("nunique") > 1
    return frame["item"].where(~several, frame["item"] + "/" + wording.astype(str))


def _scores(raw: pd.DataFrame, path: Path) -> dict[str, pd.Series]:
    columns = {measure: next((n for n in names if n in raw), None) for measure, names in SCORES.items()}
    if None in columns.values():
        return {}
    return {measure: _numbers(raw, name, path) for measure, name in columns.items() if name is not None}


def _numbers(raw: pd.DataFrame, name: str, path: Path) -> pd.Series:
    cells = raw[name].mask(raw[name].str.strip().str.lower().isin(NOTHING))
    numbers = pd.to_numeric(cells, errors="coerce").astype(float)
    wrong = np.flatnonzero(numbers.isna() & (cells.notna() | (name == "seed")))
    if len(wrong):
        raise InputError(f"{path}, row {int(wrong[0]) + 1}: {name} is {raw[name].iloc[wrong[0]]!r}, expected a number")
    return numbers


def judge_answers(answers: pd.DataFrame, judge: AnswerJudge) -> pd.DataFrame:
    """Have a judge rule on answers (of `read_answers`); rows as `evaluate.tables.judged_table` makes them."""
    parts = []
    for (arm, seed), rows in answers.groupby(["arm", "seed"], sort=False):
        triples = zip(rows["question"], rows["answer"], rows["prompt"], strict=True)
        rulings = judge.rule(
            [AnswerToJudge(Item(*triple)) for triple in triples], progress=f"judging {arm}, seed {seed}"
        )
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
        pairs = zip(rows["alignment"], rows["coherence"], strict=True)
        rulings = tuple(_own_ruling(_none(a), _none(c), thresholds) for a, c in pairs)
        parts.append(_table(rows, Rulings(rulings, too_few_usable(rulings)), _IN_FILE))
    return pd.concat(parts, ignore_index=True)


def _own_ruling(alignment: float | None, coherence: float | None, thresholds: Thresholds) -> Ruling:
    label = "no coherence score" if coherence is None else (_UNSCORED if alignment is None else SCORE)
    value, coherent = verdict(alignment, coherence, thresholds)
    return Ruling(value, coherent, alignment, coherence, label=label, usable=coherence is not None)


def _none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _table(rows: pd.DataFrame, rulings: Rulings, judge: str) -> pd.DataFrame:
    return judged_table(rows, rulings, evaluation=judge, questions="file", sampling="file", judge=judge)
