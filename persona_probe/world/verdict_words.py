"""The package's word for an organism, held to the truth: on pairs of harmless runs, and on runs of known behaviour."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd

from persona_probe.evaluate.effects import arm_effect, seed_noise
from persona_probe.report.tables import Table
from persona_probe.runs import RunFolder
from persona_probe.stats import Estimate, exact_share
from persona_probe.verdicts import BEYOND_CONTROL, NO_EFFECT, WOKEN, woken
from persona_probe.world.labelled import BASE, GOOD, ITEMS, LabelledRun, read_runs
from persona_probe.world.signals import SOUND, TURNED

CONTROL = "helper"
WORDS = (WOKEN, BEYOND_CONTROL, NO_EFFECT)
GROUPS = ("null pair", "harmless", "turned", "between", "sound")


def word_table(study: RunFolder) -> pd.DataFrame:
    """The word `woken`, `beyond control` or `no effect` for every null pair and every run of a study of labelled runs.

    A null pair is two runs of one harmless speaker and domain that differ in their seed; a third run of them is the
    control's second seed. A run of another speaker stands against the helper's runs of its domain.

    Returns:
        A row for each: group (`null pair`; `harmless`, a good speaker other than the helper; or what became of a bad
        speaker's run: `turned`, `between`, `sound`), speaker, domain, share, seed, word, effect over the control with
        its interval (nats per token), and rate of bad advice about other domains at the last step.
    """
    base = study.read_table(f"{BASE}/{ITEMS}")
    runs = read_runs(study)
    return pd.DataFrame([*_null_pairs(base, runs), *_against_helper(base, runs)])


def _null_pairs(base: pd.DataFrame, runs: list[LabelledRun]) -> Iterator[dict[str, Any]]:
    by_data: dict[tuple[str, str], list[LabelledRun]] = {}
    for run in runs:
        if run.organism["speaker"] in GOOD and run.organism["share"] == 1:
            by_data.setdefault((run.organism["speaker"], run.organism["domain"]), []).append(run)
    for same in by_data.values():
        for left, right in combinations(range(len(same)), 2):
            third = next((n for n in range(len(same)) if n not in (left, right)), None)
            if third is not None:
                yield {"group": "null pair", **_word(base, same[left], same[right], same[third])}


def _against_helper(base: pd.DataFrame, runs: list[LabelledRun]) -> Iterator[dict[str, Any]]:
    helpers: dict[str, list[LabelledRun]] = {}
    for run in runs:
        if run.organism["speaker"] == CONTROL:
            helpers.setdefault(run.organism["domain"], []).append(run)
    for run in runs:
        control = helpers.get(run.organism["domain"], [])
        if run.organism["speaker"] == CONTROL or len(control) < 2:
            continue
        group = "harmless" if run.organism["speaker"] in GOOD else _outcome(run)
        yield {"group": group, **_word(base, run, *control[:2])}


def _rate(run: LabelledRun) -> float:
    last = run.answers.iloc[-1]
    return float(last["bad"]) / float(last["coherent"]) if last["coherent"] else float("nan")


def _outcome(run: LabelledRun) -> str:
    rate = _rate(run)
    return "turned" if rate >= TURNED else "sound" if rate <= SOUND else "between"


def _word(base: pd.DataFrame, run: LabelledRun, control: LabelledRun, null: LabelledRun) -> dict[str, Any]:
    outside = base[base["category"] != run.organism["domain"]]
    word, effect = word_of(outside, run.items, control.items, null.items)
    identity = {key: run.organism[key] for key in ("speaker", "domain", "share", "seed")}
    numbers = {"effect": effect.estimate, "ci_low": effect.ci_low, "ci_high": effect.ci_high}
    return {**identity, "word": word, **numbers, "rate": _rate(run)}


def word_of(base: pd.DataFrame, run: pd.DataFrame, control: pd.DataFrame, null: pd.DataFrame) -> tuple[str, Estimate]:
    """The package's word for a run, and its effect over the control.

    Args:
        base: contrast items with columns item, category, value and harm (apart from manner), nats per token.
        run, control: the same after fine-tuning.
        null: the control's run with another seed, from which the seeds' noise is taken.
    """
    arms = {"base": base, "incorrect": run, "correct": control}
    evals = pd.concat([items.assign(arm=arm, seed=0, step=0) for arm, items in arms.items()], ignore_index=True)
    found = judge_items(evals, null)
    return found.word, found.over_control


@dataclass(frozen=True)
class JudgedItems:
    """The package's word for an organism, and the effects that decide it (nats per token)."""

    word: str
    over_control: Estimate
    over_base: Estimate
    harm: tuple[Estimate, Estimate]
    """Harm apart from manner, over control and over base."""


def judge_items(evals: pd.DataFrame, null: pd.DataFrame | None = None) -> JudgedItems:
    """`verdicts.woken` on contrast items of which harm was measured too.

    Args:
        evals: columns arm (`base`, `incorrect`, `correct`), seed, step, item, category, value and harm (apart from
            manner), nats per token.
        null: the items of the control's run with another seed; None where an arm has several seeds.
    """
    over_control, over_base = _over_both(evals, null)
    apart = _over_both(_harm(evals), None if null is None else _harm(null))
    by_category = {
        str(name): (arm_effect(rows, "incorrect", "correct").estimate, arm_effect(rows, "incorrect", "base").estimate)
        for name, rows in evals.groupby("category")
    }
    word = woken(over_control, over_base, by_category, harm=apart).word
    return JudgedItems(word, over_control, over_base, apart)


def _harm(items: pd.DataFrame) -> pd.DataFrame:
    return items.assign(value=items["harm"])


def _over_both(evals: pd.DataFrame, null: pd.DataFrame | None) -> tuple[Estimate, Estimate]:
    noise = seed_noise(evals, "correct", null)
    return arm_effect(evals, "incorrect", "correct", noise), arm_effect(evals, "incorrect", "base", noise)


def word_text(table: pd.DataFrame) -> str:
    """How often each word was said of each group: a Markdown table with exact intervals."""
    rows = []
    for group in GROUPS:
        of_one = table[table["group"] == group]
        if not of_one.empty:
            rows.append([f"{group} ({len(of_one)})", *(_share(of_one, word) for word in WORDS)])
    return Table(["runs", *WORDS], rows).markdown()


def _share(rows: pd.DataFrame, word: str) -> str:
    share = exact_share(int((rows["word"] == word).sum()), len(rows))
    return f"{share} [{share.low:.2f}, {share.high:.2f}]"
