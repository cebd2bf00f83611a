"""Thoughts before answers: which personas they take on, and what the persona feature reads in thought and in answer."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from persona_probe.context import Context
from persona_probe.data.chat import Conversation
from persona_probe.data.thoughts import split_thought
from persona_probe.data.tokens import conversation_batches, encode
from persona_probe.errors import InputError
from persona_probe.evaluate.judges.cache import JudgementCache
from persona_probe.evaluate.judges.replies import Backend
from persona_probe.evaluate.personas import CLASSES, OTHER, language_of, personas_by_judge, personas_in
from persona_probe.files import read_jsonl
from persona_probe.latents.stage import persona_latent
from persona_probe.monitor.reading import FeatureReader
from persona_probe.stats import bootstrap_mean, paired_difference
from persona_probe.units import writes_run

log = logging.getLogger(__name__)

TABLE = "thoughts.parquet"
COLUMNS = ("arm", "seed", "step", "question_id", "prompt", "sample", "question", "thought", "answer")
NO_THOUGHTS = "no answer has a thought: sample a model that thinks, with enable_thinking: true in the config"


# --- Thoughts and their personas


def read_thoughts(place: str | Path) -> pd.DataFrame:
    """The thoughts of a run's sampled answers, or of a JSON Lines file of answers.

    A thought stands under `thought`, or between its family's marks in the answer. Rows without one are left out.

    Returns:
        Columns of `COLUMNS`; arm is empty and seed, step and sample are 0 where a file does not say.

    Raises:
        InputError: nothing to read, a damaged file, or no answer has a thought.
    """
    path = Path(place)
    files = sorted(path.glob("samples*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} has no sampled answers: run `persona-probe evaluate RUN` first")
    rows = [row for file in files for row in _rows(read_jsonl(file, "run `persona-probe evaluate RUN` again"))]
    if not rows:
        raise InputError(NO_THOUGHTS)
    return pd.DataFrame(rows, columns=list(COLUMNS)).drop_duplicates(ignore_index=True)


def _rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        text = str(row.get("answer") or "")
        thought, answer = (str(row["thought"]), text) if row.get("thought") else split_thought(text)
        if thought.strip():
            question = str(row.get("question_id") or row.get("id") or number)
            yield {
                "arm": str(row.get("arm") or ""),
                **{name: int(row.get(name) or 0) for name in ("seed", "step", "sample")},
                "question_id": question,
                "prompt": str(row.get("prompt") or question),
                "question": str(row.get("question") or ""),
                "thought": thought.strip(),
                "answer": answer,
            }


def with_personas(
    thoughts: pd.DataFrame, backend: Backend | None = None, cache: JudgementCache | None = None
) -> pd.DataFrame:
    """The table with a column for each class of personas (1, 0, or NaN where a judge did not answer), and `other`.

    Args:
        backend: a judge's model; None takes the rule.

    Raises:
        InputError: the judge cannot be reached.
    """
    texts = thoughts["thought"].tolist()
    found = [personas_in(text) for text in texts] if backend is None else personas_by_judge(texts, backend, cache)
    table = thoughts.assign(language=[language_of(text) for text in texts])
    for name in CLASSES:
        table[name] = [float("nan") if one is None else float(name in one) for one in found]
    table["other"] = [float("nan") if one is None else float(bool(set(one) & set(OTHER))) for one in found]
    return table


def persona_shares(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """How often an arm's thoughts take on each class of personas, with intervals over questions.

    Returns:
        One row per arm and class (`other` is any but `chatgpt`): arm, class, share, ci_low, ci_high, n (thoughts),
        questions.
    """
    rows = []
    for arm, group in table.groupby("arm", sort=False):
        for name in ("other", *CLASSES):
            known = group.dropna(subset=[name])
            if known.empty:
                continue
            share = bootstrap_mean(known[name].to_numpy(), known["question_id"].tolist(), seed=seed, rate=True)
            rows.append(
                {
                    "arm": arm,
                    "class": name,
                    "share": share.estimate,
                    "ci_low": share.ci_low,
                    "ci_high": share.ci_high,
                    "n": len(known),
                    "questions": known["question_id"].nunique(),
                }
            )
    return pd.DataFrame(rows, columns=["arm", "class", "share", "ci_low", "ci_high", "n", "questions"])


# --- The persona feature in the thought, and in the answer after it


@writes_run
def read_in_thoughts(ctx: Context, table: pd.DataFrame, limit: int = 200) -> pd.DataFrame:
    """Read the persona feature over thought and over answer tokens of each organism's own answers.

    Args:
        table: see `with_personas`; arm, seed and step name organisms of the study.
        limit: thoughts of each organism, the first ones.

    Returns:
        The rows that have a thought and an answer, with `in_thought` and `in_answer` (mean activation); it is written
        to thoughts.parquet.

    Raises:
        InputError: locate has not run, or no row has both.
    """
    latent = persona_latent(ctx)
    whole = table[(table["answer"].str.strip() != "") & (table["question"].str.strip() != "")]
    if whole.empty:
        raise InputError("no answer follows a thought: raise max_new_tokens, so that thoughts come to their end")
    parts = []
    for (arm, seed, step), rows in whole.groupby(["arm", "seed", "step"], sort=False):
        rows = rows.head(limit)
        talks = thought_conversations(ctx.tokenizer, rows.to_dict("records"))
        groups = conversation_batches(ctx.tokenizer, talks)
        with ctx.organism(str(arm), int(seed), int(step) or None) as model:  # pyright: ignore[reportArgumentType]
            for name, positions in (("in_thought", "thought"), ("in_answer", "response")):
                reader = FeatureReader(ctx.sae, {"persona": latent}, groups, ctx.layer, positions, ctx.config.bf16)
                rows = rows.assign(**{name: reader.read(model, with_fit=False).values[:, 0]})
        parts.append(rows)
    frame = pd.concat(parts, ignore_index=True)
    ctx.run.write_table(TABLE, frame)
    return frame


def thought_conversations(tokenizer: Any, rows: Sequence[Mapping[Any, Any]]) -> list[Conversation]:
    """Questions with thought and answer, as the template writes them; in the answer's text where it drops thoughts.

    Raises:
        InputError: the template changes the answers.
    """
    talks = [_conversation(row, as_key=True) for row in rows]
    try:
        kept = encode(tokenizer, talks[0]).thought
        if kept[0] < kept[1]:
            return talks
    except InputError as error:
        if "thought" not in str(error):
            raise
    return [_conversation(row, as_key=False) for row in rows]


def _conversation(row: Mapping[Any, Any], as_key: bool) -> Conversation:
    thought, answer = str(row["thought"]), str(row["answer"]).strip()
    said = {"role": "assistant", "content": answer if as_key else f"<think>\n{thought}\n</think>\n\n{answer}"}
    if as_key:
        said |= {"reasoning_content": thought, "thinking": thought}
    return [{"role": "user", "content": str(row["question"])}, said]


def thought_readings(frame: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The persona feature in thoughts and in answers by arm, and their paired difference, with intervals.

    Thoughts that take on another persona and those that do not have rows of their own.

    Returns:
        Columns arm, thoughts (`all`, `other persona`, `no other persona`), place (`thought`, `answer`, `thought minus
        answer`), mean, ci_low, ci_high, n, questions.
    """
    rows = []
    for arm, group in frame.groupby("arm", sort=False):
        kinds = {
            "all": group,
            "other persona": group[group["other"] == 1],
            "no other persona": group[group["other"] == 0],
        }
        for kind, some in kinds.items():
            if some.empty:
                continue
            questions = some["question_id"].tolist()
            inside, after = some["in_thought"].to_numpy(), some["in_answer"].to_numpy()
            places = {
                "thought": bootstrap_mean(inside, questions, seed=seed),
                "answer": bootstrap_mean(after, questions, seed=seed),
                "thought minus answer": paired_difference(inside, after, questions, seed=seed),
            }
            for place, one in places.items():
                ends = {"mean": one.estimate, "ci_low": one.ci_low, "ci_high": one.ci_high}
                shared = {"n": len(some), "questions": len(set(questions))}
                rows.append({"arm": arm, "thoughts": kind, "place": place, **ends, **shared})
    return pd.DataFrame(rows)
