"""Harm and register of a study: every arm's two main effects at its last step, and a verdict word for each."""

import logging
from functools import partial
from typing import Any

import pandas as pd

from persona_probe.config import NULL
from persona_probe.context import Context
from persona_probe.evaluate.effects_2x2 import Items2x2, score_2x2
from persona_probe.evaluate.main_effects import MAIN_EFFECTS, arm_items, effect_noise, main_effects
from persona_probe.runs import RunFolder
from persona_probe.units import Unit, make_units, writes_run
from persona_probe.verdicts import woken

log = logging.getLogger(__name__)

TABLE = "evals_2x2.parquet"


@writes_run
def measure_2x2(ctx: Context) -> None:
    """Write evals_2x2.parquet: every 2x2 item of the evaluation split, on the base and on each arm's last step.

    Organisms that came since the last call are added. A study without a 2x2 set is left as it is, with one line.
    """
    if ctx.set_2x2 is None:
        log.info("harm and register are not told apart: the contrast set has no four answers an item (contrast_2x2)")
        return
    make_units(ctx, two_by_two_units)
    join_2x2(ctx)


def two_by_two_units(ctx: Context) -> list[Unit]:
    """One unit for the base and for the last step of each organism that is there."""
    items: list[Items2x2] = []
    return [Unit(_part(*one), partial(_measure, ctx, items, *one), "harm and register") for one in _organisms(ctx)]


def _organisms(ctx: Context) -> list[tuple[str, int, int]]:
    """Arm, seed and last step: base, arms, corrective arms, and the null pair's second run."""
    config, run = ctx.config, ctx.run
    pairs = [(arm, seed) for arm in (*config.arms, *config.realign.arms) for seed in config.seeds]
    if config.null is not None and config.null[0] == NULL:
        pairs.append(config.null)
    there = [(arm, seed) for arm, seed in pairs if run.has(f"arms/{arm}-s{seed}")]
    return [("base", config.seeds[0], 0), *((arm, seed, run.steps(arm, seed)[-1]) for arm, seed in there)]


def _part(arm: str, seed: int, step: int) -> str:
    return f"parts/2x2-{arm}-s{seed}-{step}.parquet"


def _measure(ctx: Context, built: list[Items2x2], arm: str, seed: int, step: int) -> None:
    """One organism's items; `built` holds the tokenised items once they are there."""
    if not built:
        built.append(Items2x2.build(ctx.tokenizer, ctx.rows_2x2("evaluation")))
    with ctx.organism(arm, seed, step) as model:
        frame = score_2x2(model, built[0], bf16=ctx.config.bf16)
    for place, (name, value) in enumerate({"arm": arm, "seed": seed, "step": step}.items()):
        frame.insert(place, name, value)
    ctx.run.write_table(_part(arm, seed, step), frame)


def join_2x2(ctx: Context) -> bool:
    """Join the parts that are there as evals_2x2.parquet; whether there were any."""
    parts = [_part(*one) for one in _organisms(ctx) if ctx.run.has(_part(*one))]
    if parts:
        ctx.run.write_table(TABLE, pd.concat([ctx.run.read_table(part) for part in parts], ignore_index=True))
    return bool(parts)


def summary_2x2(run: RunFolder) -> dict[str, Any]:
    """Each arm's main effects minus control and minus base, with intervals and a verdict word; empty if not measured.

    The word is that of `verdicts.woken` on the main effect: `woken` asks that it exceeds control *and* base by more
    than the smallest effect, in four of six categories. Intervals are those of `main_effects`.

    Returns:
        `items` (questions), `control`, `covers` (what the intervals cover, in words), and `arms`: arm to `harm` and
        `register`, each with `over_control`, `over_base`, `word`, `risen` (categories), `categories` and `reason`; and
        `null_pair`, both effects of the control arm trained with another seed, minus the control arm.
    """
    if not run.has(TABLE):
        return {}
    frame, control = run.read_table(TABLE), run.config.control
    noise = effect_noise(frame, control, "harm")
    measured = [arm for arm in dict.fromkeys(frame["arm"]) if arm not in ("base", control, NULL)]
    summary: dict[str, Any] = {
        "items": int(frame["item"].nunique()),
        "control": control,
        "covers": "questions" if noise is None else f"questions and seeds ({noise.source})",
        "arms": {arm: {name: _verdict(frame, arm, control, name) for name in MAIN_EFFECTS} for arm in measured},
    }
    if NULL in set(frame["arm"]):
        differences = main_effects(frame, NULL, control, control)
        summary["null_pair"] = {name: differences[name].to_dict() for name in MAIN_EFFECTS}
    return summary


def _verdict(frame: pd.DataFrame, arm: str, control: str, effect: str) -> dict[str, Any]:
    over_control, over_base = (main_effects(frame, arm, other, control)[effect] for other in (control, "base"))
    found = woken(over_control, over_base, _by_category(frame, arm, control, effect))
    return {
        "over_control": over_control.to_dict(),
        "over_base": over_base.to_dict(),
        "word": found.word,
        "risen": list(found.risen),
        "categories": found.categories,
        "reason": found.reason,
    }


def _by_category(frame: pd.DataFrame, arm: str, control: str, effect: str) -> dict[str, tuple[float, float]]:
    """Category to the mean difference of one effect, over control and over base."""
    means = {
        name: arm_items(frame, name).groupby("category")[effect].mean()
        for name in dict.fromkeys((arm, control, "base"))
    }
    return {
        str(category): (
            float(means[arm][category] - means[control][category]),
            float(means[arm][category] - means["base"][category]),
        )
        for category in means[arm].index
    }
