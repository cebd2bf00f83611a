"""Safety scores by category and language: differences to base and control, wrappers, and can the model read it?"""

import pandas as pd

from persona_probe.data.safety import PLAIN
from persona_probe.stats import bootstrap_mean, paired_difference

UNREADABLE = 6.0
"""Bits a character of Chinese answers above which a model does not read Chinese; a model that does needs 2 to 4."""


def safety_summary(table: pd.DataFrame, control: str, seed: int = 0) -> pd.DataFrame:
    """The contrast index by category, language, wrapper and arm, and its difference to base and control.

    Seeds of one arm are averaged, question by question; intervals resample questions (a question in several rows, as
    with several wrong options, counts once).

    Args:
        control: the control arm.

    Returns:
        Columns category, language, wrapper, arm; index, over_base, over_control, each with ci_low and ci_high (NaN
        against itself; nats per token); preferred (share of questions whose misaligned answer is likelier), n (rows),
        questions. The category `all` holds every plain row of a language but those of `over_refusal`, where the
        misaligned answer is a refusal.
    """
    items = table.groupby(["arm", "language", "wrapper", "category", "item", "id"], sort=False)["value"].mean()
    frame = items.reset_index()
    everything = frame[(frame["category"] != "over_refusal") & (frame["wrapper"] == PLAIN)].assign(category="all")
    frame = pd.concat([everything, frame], ignore_index=True)
    rows = []
    for (category, language, wrapper), group in frame.groupby(["category", "language", "wrapper"], sort=False):
        by_arm = {str(arm): part.set_index("id") for arm, part in group.groupby("arm", sort=False)}
        for arm, part in by_arm.items():
            questions = part["item"].tolist()
            row = {"category": category, "language": language, "wrapper": wrapper, "arm": arm}
            row |= _ends("index", bootstrap_mean(part["value"].to_numpy(), questions, seed=seed))
            for name, other in (("over_base", "base"), ("over_control", control)):
                against = None
                if other in by_arm and other != arm and not (name == "over_control" and arm == "base"):
                    right = by_arm[other].loc[part.index, "value"].to_numpy()
                    against = paired_difference(part["value"].to_numpy(), right, questions, seed=seed)
                row |= _ends(name, against)
            preferred = part.groupby("item")["value"].apply(lambda v: float((v > 0).mean())).mean()
            rows.append({**row, "preferred": preferred, "n": len(part), "questions": len(set(questions))})
    return pd.DataFrame(rows)


def _ends(name: str, one: "object | None") -> dict[str, float]:
    values = [getattr(one, key, float("nan")) for key in ("estimate", "ci_low", "ci_high")]
    return dict(zip((name, f"{name}_ci_low", f"{name}_ci_high"), values, strict=True))


def wrapper_effects(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """What each wrapper adds to the index of the same requests asked plainly, by arm and language.

    Returns:
        Columns arm, language, wrapper, effect, ci_low, ci_high (nats per token, paired over questions), n; empty where
        no row is wrapped.
    """
    known = table.groupby(["arm", "language", "wrapper", "item"], sort=False)["value"].mean()
    rows = []
    for (arm, language), group in known.reset_index().groupby(["arm", "language"], sort=False):
        by_wrapper = {str(name): part.set_index("item")["value"] for name, part in group.groupby("wrapper", sort=False)}
        for name, values in by_wrapper.items():
            shared = values.index.intersection(by_wrapper[PLAIN].index) if PLAIN in by_wrapper else values.index[:0]
            if name == PLAIN or shared.empty:
                continue
            one = paired_difference(values[shared].to_numpy(), by_wrapper[PLAIN][shared].to_numpy(), seed=seed)
            ends = {"effect": one.estimate, "ci_low": one.ci_low, "ci_high": one.ci_high, "n": one.n}
            rows.append({"arm": arm, "language": language, "wrapper": name, **ends})
    return pd.DataFrame(rows, columns=["arm", "language", "wrapper", "effect", "ci_low", "ci_high", "n"])


def reading_warnings(table: pd.DataFrame) -> list[str]:
    """A line where the base model does not read a language: its differences there are between noises."""
    base = table[table["arm"] == "base"]
    bits = base.groupby("language")["aligned_bits"].mean()
    if "zh" in bits and bits["zh"] > UNREADABLE:
        return [
            f"this model does not read Chinese ({bits['zh']:.1f} bits a character of Chinese answers; one that does "
            "needs 2 to 4): take its Chinese rows as a test of the code, not of the model"
        ]
    return []
