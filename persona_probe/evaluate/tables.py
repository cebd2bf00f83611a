"""Judged answers in evals.parquet, next to the contrast items: `measure` tells them apart.

Why one table: readers of contrast items take the split `evaluation`, and judged answers have the split `judged`, so
code that predates judged answers still reads only contrast rows. The parts of both kinds lie in parts/.
This module and the tracking stage join them into the table.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from persona_probe.errors import InputError
from persona_probe.files import read_parquet

if TYPE_CHECKING:
    from persona_probe.evaluate.judging import Rulings
    from persona_probe.runs import RunFolder

JUDGED, CONTRAST = "judged", "contrast"
OWN = (
    *("measure", "evaluation", "questions", "sampling", "judge", "pair", "variant", "prompt", "sample", "coherent"),
    *("alignment", "coherence", "score", "label", "usable", "in_scope", "error_model", "error_question", "why"),
)
"""Columns that only judged answers have."""
_SHARED = ("arm", "seed", "step", "split", "item", "category", "aligned_logprob", "misaligned_logprob", "value")
_WHOLE_NUMBERS = ("seed", "step", "sample")


def judged_table(answers: pd.DataFrame, ruled: "Rulings", **same: str) -> pd.DataFrame:
    """Rows of evals.parquet from one model's answers and the rulings on them.

    Args:
        answers: columns arm, seed, step, item, category, pair, variant, prompt and sample.
        same: columns that are the same in all rows: evaluation, questions, sampling, judge.

    Returns:
        Columns `_SHARED` and `OWN`; `value` is 1 for misaligned, 0 for not, NaN where an answer does not count.
    """
    rulings = pd.DataFrame([ruling.to_row() for ruling in ruled.rulings], index=answers.index)
    columns = [name for name in (*_SHARED, *OWN) if name in answers and name not in rulings]  # a file has scores too
    frame = pd.concat([answers[columns], rulings], axis=1)
    constant: dict[str, Any] = {"split": JUDGED, "measure": JUDGED, "why": ruled.why, **same}
    frame = frame.assign(aligned_logprob=float("nan"), misaligned_logprob=float("nan"), **constant)
    numbers = ["value", "coherent", "alignment", "coherence", "score", "usable", "in_scope"]
    kinds = dict.fromkeys([*numbers, "error_model", "error_question"], "float64")
    return frame[[*_SHARED, *OWN]].astype(kinds).reset_index(drop=True)


def part_name(evaluation: str, organism: str) -> str:
    """The part of one organism's (`<arm>-s<seed>`) judged answers."""
    return f"parts/judged-{evaluation}-{organism}.evals.parquet"


def join_evals(run: "RunFolder") -> None:
    """Write evals.parquet from all its parts: contrast items as they were scored, then judged answers."""
    parts = sorted((run.path / "parts").glob("*.evals.parquet"))
    found = [read_parquet(part, (), "move it elsewhere and evaluate again") for part in parts]
    frame = pd.concat(found, ignore_index=True)
    if "measure" in frame:
        arms = ["base", *run.config.arms, *run.config.realign.arms]
        frame = _in_study_order(frame.assign(measure=frame["measure"].fillna(CONTRAST)), arms)
    run.write_table("evals.parquet", frame)


def _in_study_order(frame: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Contrast items in their order, then judged answers by evaluation, arm (in the study's order) and seed."""
    is_judged = frame["measure"] == JUDGED
    place = frame["arm"].map({arm: number for number, arm in enumerate(arms)})
    rows = frame[is_judged].assign(place=place[is_judged]).sort_values(["evaluation", "place", "seed"], kind="stable")
    return pd.concat([frame[~is_judged], rows.drop(columns="place")], ignore_index=True)


def contrast_rows(evals: pd.DataFrame) -> pd.DataFrame:
    """The contrast items of evals.parquet, without the columns of judged answers."""
    if "measure" not in evals:
        return evals
    rows = evals[evals["measure"] != JUDGED]
    return rows[[name for name in evals.columns if name not in OWN]].reset_index(drop=True)


def judged_rows(evals: pd.DataFrame) -> pd.DataFrame:
    """The judged answers of evals.parquet; empty if none were judged."""
    if "measure" not in evals:
        return pd.DataFrame(columns=[*_SHARED, *OWN])
    rows = evals[evals["measure"] == JUDGED][[*_SHARED, *OWN]].reset_index(drop=True)
    return rows.astype(dict.fromkeys(_WHOLE_NUMBERS, "int64"))


def last_evaluation(judged: pd.DataFrame, evaluations: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of the evaluation that was made last, by the numbers that the manifest keeps."""
    names = sorted(judged["evaluation"].unique(), key=lambda name: (evaluations.get(name, {}).get("number", 0), name))
    return judged[judged["evaluation"] == names[-1]] if names else judged


def read_judged(run: "RunFolder") -> pd.DataFrame:
    """A run's judged answers.

    Raises:
        InputError: none were judged; the message names the command.
    """
    evals = run.read_table("evals.parquet") if run.has("evals.parquet") else pd.DataFrame()
    answers = judged_rows(evals)
    if answers.empty:
        raise InputError(f"no judged answers in {run.path}: run `persona-probe evaluate RUN --judge offline` first")
    return answers
