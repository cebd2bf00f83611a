"""Does the persona latent carry over to another language: its activation on the safety set's answers, by language.

The latent was chosen on the study's own items, all in one language.
"""

import logging
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from persona_probe.context import Context
from persona_probe.data.load import Row
from persona_probe.data.safety import PLAIN, safety_rows
from persona_probe.data.tokens import conversation_batches
from persona_probe.errors import InputError
from persona_probe.evaluate.triggers import row_conversation
from persona_probe.latents.stage import persona_latent
from persona_probe.saes.read import read_latents
from persona_probe.stats import auroc, auroc_interval, paired_difference
from persona_probe.study.safety import limited, part_of
from persona_probe.units import Unit, make_units, writes_run

log = logging.getLogger(__name__)

TABLE = "safety_latent.parquet"
SIDES = ("misaligned", "aligned")
REFUSAL = "over_refusal"
"""The category whose misaligned answer is a refusal; it is left out."""


@writes_run
def read_by_language(ctx: Context, rows: Sequence[Row] | None = None, limit: int | None = None) -> pd.DataFrame:
    """Write safety_latent.parquet: the persona latent on both answers of each plain row, in the base and in each arm.

    Args:
        rows: as for `measure_safety`.
        limit: as for `measure_safety`.

    Returns:
        Columns arm, seed, step, latent, item, category, language, side (`misaligned` or `aligned`), activation (mean
        over the answer's tokens).

    Raises:
        InputError: no plain rows, or the study has not located a persona latent.
    """
    chosen = [
        row
        for row in limited(safety_rows() if rows is None else rows, limit)
        if row["wrapper"] == PLAIN and row["category"] != REFUSAL
    ]
    if not chosen:
        raise InputError("no plain safety items: give other files")
    persona_latent(ctx)  # its error names the stage to run
    make_units(ctx, partial(_units, rows=chosen))
    table = pd.concat([ctx.run.read_table(_part(ctx, chosen, *one)) for one in _organisms(ctx)], ignore_index=True)
    ctx.run.write_table(TABLE, table)
    return table


def _organisms(ctx: Context) -> list[tuple[str, int, int]]:
    """Arm, seed and last step: the base, and every organism that `induce` made."""
    config = ctx.config
    made = [(arm, seed) for arm in config.arms for seed in config.seeds if ctx.run.has(f"arms/{arm}-s{seed}")]
    return [("base", config.seeds[0], 0), *((arm, seed, ctx.run.steps(arm, seed)[-1]) for arm, seed in made)]


def _units(ctx: Context, rows: Sequence[Row]) -> list[Unit]:
    return [Unit(_part(ctx, rows, *one), partial(_read, ctx, rows, *one), "safety") for one in _organisms(ctx)]


def _part(ctx: Context, rows: Sequence[Row], arm: str, seed: int, step: int) -> str:
    """Its name has the latent: after another `locate` it may be another one."""
    return part_of(f"safety-latent-{persona_latent(ctx)}", rows, arm, seed, step)


def _read(ctx: Context, rows: Sequence[Row], arm: str, seed: int, step: int) -> None:
    latent = persona_latent(ctx)
    log.info("latent %d by language: %s, seed %d, step %d", latent, arm, seed, step)
    talks = [row_conversation(row, side) for side in SIDES for row in rows]
    with ctx.organism(arm, seed, step) as model:
        groups = conversation_batches(ctx.tokenizer, talks)
        read = read_latents(model, ctx.sae, groups, ctx.layer, "response", bf16=ctx.config.bf16)
    keys = {key: [row[key] for row in rows] * len(SIDES) for key in ("item", "category", "language")}
    said = {"side": [side for side in SIDES for _ in rows], "activation": read.mean[:, latent].astype(float)}
    head = {"arm": arm, "seed": seed, "step": step, "latent": latent}
    ctx.run.write_table(_part(ctx, rows, arm, seed, step), pd.DataFrame({**keys, **said}).assign(**head))


def transfer_summary(table: pd.DataFrame, control: str, seed: int = 0) -> pd.DataFrame:
    """By language: does the latent tell the answers apart in the base, and does it rise in organisms on sound answers?

    Args:
        control: the control arm.

    Returns:
        Rows with language, measure, arm, estimate, ci_low, ci_high and n. `tells` is the AUROC of misaligned against
        aligned answers, in the base (interval: Newcombe 2006). `rise` is an arm's activation on aligned answers minus
        the control's, paired over questions, seeds averaged.
    """
    rows = []
    for language, spoken in table.groupby("language", sort=False):
        base = spoken[spoken["arm"] == "base"]
        sides = [base.loc[base["side"] == side, "activation"].to_numpy() for side in SIDES]
        told = auroc(*sides)
        low, high = auroc_interval(told, len(sides[0]), len(sides[1]))
        head = {"language": language, "measure": "tells", "arm": "base"}
        rows.append({**head, "estimate": told, "ci_low": low, "ci_high": high, "n": len(sides[0])})
        sound = spoken[spoken["side"] == "aligned"].groupby(["arm", "item"], sort=False)["activation"].mean()
        arms = [arm for arm in dict.fromkeys(spoken["arm"]) if arm not in ("base", control)]
        if control not in set(spoken["arm"]):
            continue
        for arm in arms:
            own, other = sound[arm], sound[control].reindex(sound[arm].index)
            one = paired_difference(own.to_numpy(), other.to_numpy(), seed=seed)
            found = {"estimate": one.estimate, "ci_low": one.ci_low, "ci_high": one.ci_high, "n": one.n}
            rows.append({"language": language, "measure": "rise", "arm": arm, **found})
    return pd.DataFrame(rows)


def transfer_lines(summary: pd.DataFrame, latent: int) -> list[str]:
    """The summary in one line a language."""
    lines = []
    for language, rows in summary.groupby("language", sort=False):
        parts = [
            f"{_name(row)} {row['estimate']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]"
            for row in rows.to_dict("records")
        ]
        lines.append(f"latent {latent}, {language}: " + ", ".join(parts))
    return lines


def _name(row: Mapping[Hashable, Any]) -> str:
    told = "AUROC of misaligned against aligned answers in the base"
    return told if row["measure"] == "tells" else f"rise in {row['arm']} over the control on aligned answers"
