"""Harm and register as differences between models, and between the arms of a study, with intervals over questions.

The tables come from `effects_2x2.score_2x2`; nothing here needs a model.
"""

from collections.abc import Mapping

import pandas as pd

from persona_probe.config import NULL
from persona_probe.errors import InputError
from persona_probe.evaluate.effects import SeedNoise, arm_effect, seed_noise
from persona_probe.stats import Estimate, bootstrap_mean, paired_difference

EFFECTS = ("harm", "register", "interaction")
"""`harm`: harmful minus sound answers, both tones averaged. `register`: rude minus polite, both kinds of advice
averaged. `interaction`: half of how much more harm adds where the tone is rude."""
MAIN_EFFECTS = ("harm", "register")
COLUMNS = ("arm", "against", "effect", "estimate", "ci_low", "ci_high", "n")


def effects_2x2(frame: pd.DataFrame) -> dict[str, Estimate]:
    """Harm, register and interaction of one model (nats per token), intervals over questions.

    A model's own effects say little: base models find polite answers likelier. Compare models with `differences_2x2`.

    Args:
        frame: what `score_2x2` gives; the rows of several seeds may be joined, a question is one cluster.
    """
    return {effect: bootstrap_mean(frame[effect].to_numpy(), frame["item"].tolist()) for effect in EFFECTS}


def differences_2x2(left: pd.DataFrame, right: pd.DataFrame) -> dict[str, Estimate]:
    """How far each effect of the left model exceeds the right one's: paired by question, intervals over questions.

    Args:
        left: what `score_2x2` gives for an organism; rows of several seeds are averaged by question.
        right: the same for its base, or for the organism of the control arm.

    Raises:
        InputError: the two do not hold the same questions.
    """
    a, b = (frame.groupby("item")[list(EFFECTS)].mean() for frame in (left, right))
    if set(a.index) != set(b.index):
        other = len(set(a.index) ^ set(b.index))
        raise InputError(f"{other} questions are in one of the two tables only: score both models on the same items")
    b = b.loc[a.index]
    return {e: paired_difference(a[e].to_numpy(), b[e].to_numpy(), a.index.tolist()) for e in EFFECTS}


def table_2x2(organism: pd.DataFrame, references: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """`differences_2x2` of an organism against several references, as a table for a record or a report.

    Args:
        organism: what `score_2x2` gives for it.
        references: the same by name: `{"base": ..., "control": ...}`.

    Returns:
        Columns against, effect, estimate, ci_low, ci_high, n: a row for each reference and effect.
    """
    return pd.DataFrame(
        [
            {"against": name, "effect": effect, **value.to_dict()}
            for name, reference in references.items()
            for effect, value in differences_2x2(organism, reference).items()
        ]
    )


# --- The arms of a study: each arm's main effects minus its control's and minus the base's


def arm_items(frame: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Items of one arm at the last step of each seed: item, category and the `EFFECTS`, averaged over seeds.

    Args:
        frame: columns arm, seed, step, item, category, harm, register, interaction (nats per token).
    """
    rows = frame[frame["arm"] == arm]
    last = rows[rows["step"] == rows.groupby("seed")["step"].transform("max")]
    return last.groupby(["item", "category"], as_index=False, sort=False)[list(EFFECTS)].mean()


def main_effects(frame: pd.DataFrame, arm: str, reference: str, control: str) -> dict[str, Estimate]:
    """Harm, register and interaction of one arm minus another's, nats per token.

    Paired by question (one question is one cluster; seeds are averaged first). The 95% intervals cover questions, and
    what another seed would have done, where the frame tells: from arms with several seeds, or from the rows of the null
    pair's second run. The null pair itself is shown over questions alone.

    Args:
        frame: the rows of a study's evals_2x2.parquet.
        control: the control arm's name, of which the null pair's second run is another; `base` if there is none.

    Raises:
        InputError: the two arms were not measured on the same questions.
    """
    over_questions = differences_2x2(arm_items(frame, arm), arm_items(frame, reference))
    if arm == NULL:
        return over_questions
    own = frame[frame["arm"] != NULL]
    return {
        effect: arm_effect(own.assign(value=own[effect]), arm, reference, effect_noise(frame, control, effect))
        for effect in over_questions
    }


def effect_noise(frame: pd.DataFrame, control: str, effect: str) -> SeedNoise | None:
    """What training with another seed does to one effect; None where the frame does not tell. See `seed_noise`."""
    rows = frame.assign(value=frame[effect])
    null = rows[rows["arm"] == NULL]
    return seed_noise(rows[rows["arm"] != NULL], control, None if null.empty else null)


def effects_table(frame: pd.DataFrame, control: str) -> pd.DataFrame:
    """`main_effects` of every arm over the control arm and over the base.

    Args:
        frame: the rows of a study's evals_2x2.parquet.
        control: the control arm's name, or `base` in a study without one.

    Returns:
        Columns arm, against, effect (`harm`, `register`, `interaction`), estimate, ci_low, ci_high (nats per token) and
        n (questions).
    """
    arms = list(dict.fromkeys(frame["arm"]))
    references = [name for name in dict.fromkeys((control, "base")) if name in arms]
    rows = [
        {"arm": arm, "against": reference, "effect": effect, **value.to_dict()}
        for arm in arms
        if arm != "base"
        for reference in references
        if arm != reference
        for effect, value in main_effects(frame, arm, reference, control).items()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))
