"""Safety by category and language: the contrast index of base and organisms on the bilingual set or published files."""

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import partial
from math import log as ln

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from persona_probe.context import Context
from persona_probe.data.load import Row
from persona_probe.data.safety import safety_rows
from persona_probe.errors import InputError
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.evaluate.safety import reading_warnings
from persona_probe.units import Unit, make_units, writes_run

log = logging.getLogger(__name__)

TABLE = "safety.parquet"


@writes_run
def measure_safety(ctx: Context, rows: Sequence[Row] | None = None, limit: int | None = None) -> pd.DataFrame:
    """Write safety.parquet: each row's answers scored on the base and on every organism's last step.

    Finished organisms are kept.

    Args:
        rows: as `data.safety.safety_rows` or `data.safety_files.read_safety_file` give them; None takes our own set.
        limit: questions of each category, language and wrapper, the first ones; None takes all.

    Returns:
        Columns arm, seed, step, id, item (the question: what intervals resample), category, language, wrapper,
        aligned_logprob, misaligned_logprob, value (misaligned minus aligned, nats per token), aligned_bits (bits a
        character of the aligned answer).

    Raises:
        InputError: no rows, or nothing was trained yet.
    """
    chosen = limited(safety_rows() if rows is None else rows, limit)
    if not chosen:
        raise InputError("no safety items: give other languages, categories or files")
    make_units(ctx, partial(safety_units, rows=chosen))
    table = pd.concat([ctx.run.read_table(_part(chosen, *one)) for one in measured_organisms(ctx)], ignore_index=True)
    ctx.run.write_table(TABLE, table)
    for line in reading_warnings(table):
        log.warning("%s", line)
    return table


def limited(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """The rows of the first `limit` questions of each category, language and wrapper."""
    seen: dict[tuple[str, str, str], set[str]] = {}
    kept = []
    for row in rows:
        items = seen.setdefault((row["category"], row["language"], row["wrapper"]), set())
        if limit is None or row["item"] in items or len(items) < limit:
            items.add(row["item"])
            kept.append(row)
    return kept


def measured_organisms(ctx: Context) -> list[tuple[str, int, int]]:
    """Arm, seed and last step: the base, the arms and the corrective arms that are there.

    Raises:
        InputError: nothing was trained yet.
    """
    config, run = ctx.config, ctx.run
    pairs = [(arm, seed) for arm in (*config.arms, *config.realign.arms) for seed in config.seeds]
    there = [(arm, seed) for arm, seed in pairs if run.has(f"arms/{arm}-s{seed}")]
    if not there:
        raise InputError("nothing was trained yet: run `persona-probe induce CONFIG` first")
    return [("base", config.seeds[0], 0), *((arm, seed, run.steps(arm, seed)[-1]) for arm, seed in there)]


def safety_units(ctx: Context, rows: Sequence[Row]) -> list[Unit]:
    """One unit for the base and for each organism's last step."""
    built: list[ContrastItems] = []
    return [
        Unit(_part(rows, *one), partial(_measure, ctx, rows, built, *one), "safety") for one in measured_organisms(ctx)
    ]


def _part(rows: Sequence[Row], arm: str, seed: int, step: int) -> str:
    return part_of("safety", rows, arm, seed, step)


def part_of(kind: str, rows: Sequence[Row], arm: str, seed: int, step: int) -> str:
    """A part's name in the run; other rows have other parts."""
    content = json.dumps([[row[key] for key in ("id", "question", "aligned", "misaligned")] for row in rows])
    return f"parts/{kind}/{hashlib.sha256(content.encode()).hexdigest()[:8]}-{arm}-s{seed}-{step}.parquet"


def _measure(ctx: Context, rows: Sequence[Row], built: list[ContrastItems], arm: str, seed: int, step: int) -> None:
    """One organism's items; `built` holds the tokenised items once they are there."""
    if not built:
        built.append(ContrastItems.build(ctx.tokenizer, rows, batch_size=32))
    log.info("safety: %s, seed %d, step %d, %d items", arm, seed, step, len(rows))
    with ctx.organism(arm, seed, step) as model:
        frame = contrast_index(model, built[0], bf16=ctx.config.bf16)
    head = {"arm": arm, "seed": seed, "step": step}
    columns = {key: [row[key] for row in rows] for key in ("id", "item", "category", "language", "wrapper")}
    scores = frame[["aligned_logprob", "misaligned_logprob", "value"]]
    bits = {"aligned_bits": _bits(ctx.tokenizer, rows, frame["aligned_logprob"].to_numpy())}
    ctx.run.write_table(_part(rows, arm, seed, step), pd.DataFrame({**columns, **scores, **bits}).assign(**head))


def _bits(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], logprobs: np.ndarray) -> list[float]:
    """Bits a character of the aligned answers: tokenizers differ, characters do not."""
    tokens = [len(tokenizer.encode(row["aligned"], add_special_tokens=False)) for row in rows]
    return [
        float(-value * count / len(row["aligned"]) / ln(2))
        for row, count, value in zip(rows, tokens, logprobs, strict=True)
    ]
