"""The planted-truth benchmark's tables, as markdown: aims, recall of each ranker, and results of the tests."""

from itertools import product

import numpy as np
import pandas as pd

from persona_probe.errors import InputError
from persona_probe.latents.planted.plant import KINDS
from persona_probe.report.tables import Table
from persona_probe.stats import clopper_pearson

AIM_SIZE = 0.5
AIM_RECALL = 0.95
RISES = {
    "rise": "control-corrected rise",
    "rise_t": "the same in standard errors (rise_t)",
    "relative_rise": "the same over the root of the mean activation (relative_rise)",
    "cosine": "decoder cosine, the default order of pp.locate",
}
"""The rankers that must reach the aims on recall, in words."""
AIM_FDR = 0.05
COLUMNS = {"plant", "kind", "size", "ranker", "recall_1", "false_share", "carriers_right"}

RECALL = (
    "Recall at 1: a planted latent is the very first. At k: the share of the planted latents among the k best, k being "
    "their number. At 10: among the ten best. Fires on: share of answer tokens in the base, before planting."
)
TESTS = (
    "q at most 0.05, control-corrected rise. FDR: mean share of the discoveries that the plant did not cause. Off "
    "target: share that it caused in latents whose decoder row is not near it (cosine below 0.2). Carried: the arms' "
    "mean difference is attributed to one or few latents. Named: share of the planted latents among the eight decoder "
    "rows that fit it best; unexplained: what these leave over. Removed: share of it that projecting out the first "
    "latent takes away. Restored: how much of the change in the answers' log-probabilities a push back along the found "
    "latents undoes (in brackets, the best of the random latents)."
)


def format_table(frame: pd.DataFrame) -> str:
    """What `run_planted` returns, as markdown: aims, rankers by kind and size, tests by kind and size.

    Raises:
        InputError: the frame has no rows, or is not from `run_planted`.
    """
    if frame.empty or not set(frame.columns) >= COLUMNS:
        raise InputError("no planted results to show: give the frame that run_planted returns")
    plants = frame.drop_duplicates("plant")
    parts = [
        f"{len(plants)} plants. Sizes are residual standard deviations.",
        "### Aims",
        _aims_table(frame),
        "### What each ranker finds",
        RECALL,
        _ranker_table(frame),
        "### What the tests say",
        TESTS,
        _test_table(plants),
    ]
    return "\n\n".join(parts) + "\n"


def _percent(values: pd.Series) -> str:
    """The mean as a percentage; a dash if nothing was measured."""
    known = values.dropna()
    return "-" if known.empty else f"{known.mean():.0%}"


def _ranker_table(frame: pd.DataFrame) -> str:
    """Recall at 1, k and 10 of each ranker, by kind and size."""
    planted = frame[frame["recall_1"].notna()]
    rankers = list(dict.fromkeys(frame["ranker"]))
    rows = []
    for kind, size, group in _groups(planted):
        cells = []
        for name in rankers:
            ranker_rows = group[group["ranker"] == name]
            cells.append(" / ".join(_percent(ranker_rows[c]) for c in ("recall_1", "recall_k", "recall_10")))
        rows.append([KINDS[kind], f"{size:g}", str(group["plant"].nunique()), f"{group['firing'].mean():.1%}", *cells])
    heads = ["planted", "size", "plants", "fires on", *(f"{name}: at 1 / k / 10" for name in rankers)]
    return Table(heads, rows).markdown()


def _test_table(plants: pd.DataFrame) -> str:
    """What does not depend on the ranker, by kind and size."""
    rows = []
    for kind, size, group in _groups(plants):
        confirmed = group["confirmed"].dropna() if "confirmed" in group else pd.Series(dtype=float)
        rows.append(
            [
                KINDS[kind],
                f"{size:g}",
                str(len(group)),
                _percent(group["significant"]),
                f"{group['discoveries'].median():.0f}",
                _percent(group["false_share"]),
                _percent(group["off_target"]),
                _percent(group["carried"]),
                _percent(group["carriers_right"]),
                _percent(group["unexplained"]),
                _percent(group["removed"]),
                _restored(group),
                f"{confirmed.sum():.0f} of {len(confirmed)}" if len(confirmed) else "-",
            ]
        )
    heads = ["planted", "size", "plants", "planted latent significant", "discoveries (median)", "FDR", "off target"]
    heads += ["carried", "named", "unexplained", "removed", "restored (random)", "causal test confirms"]
    return Table(heads, rows).markdown()


def _restored(group: pd.DataFrame) -> str:
    if "restored" not in group or group["restored"].isna().all():
        return "-"
    return f"{_percent(group['restored'])} ({_percent(group['restored_random'])})"


def _groups(frame: pd.DataFrame) -> list[tuple[str, float, pd.DataFrame]]:
    groups = []
    for kind in KINDS:
        rows = frame[frame["kind"] == kind]
        groups += [(kind, float(size), rows[rows["size"] == size]) for size in sorted(rows["size"].unique())]
    return groups


def _aims_table(frame: pd.DataFrame) -> str:
    """Every aim, the result with its 95% interval over plants, and whether the aim was met or missed."""
    at = frame[frame["size"] == AIM_SIZE]
    plants = frame.drop_duplicates("plant")
    rows = []
    for kind, ranker in product(("latent", "rare latent"), RISES):
        label = f"{KINDS[kind]}, {AIM_SIZE:g} sd: first by {RISES[ranker]}"
        recall = at[(at["kind"] == kind) & (at["ranker"] == ranker)]["recall_1"]
        rows.append(_aim(label, recall, AIM_RECALL, at_least=True))
    planted = plants[plants["kind"] != "nothing"]
    for label, group in (
        ("false discovery rate, all plants", planted),
        (f"false discovery rate, plants of {AIM_SIZE:g} sd", planted[planted["size"] == AIM_SIZE]),
        ("false discovery rate, nothing planted", plants[plants["kind"] == "nothing"]),
    ):
        rows.append(_aim(label, group["false_share"], AIM_FDR, at_least=False))
    uncarried = plants[plants["kind"] == "no latent"]
    label = f"{KINDS['no latent']}: reported as not carried"
    rows.append(_aim(label, 1 - uncarried["carried"], AIM_RECALL, at_least=True))
    heads = ["aim", "wanted", "found", "95% interval", "plants", "verdict"]
    return Table(heads, [row for row in rows if row]).markdown()


def _aim(label: str, values: pd.Series, aim: float, at_least: bool) -> list[str]:
    known = values.dropna().to_numpy(dtype=np.float64)
    if not len(known):
        return []
    low, high = interval(known)
    met = known.mean() >= aim if at_least else known.mean() <= aim
    sign = "at least" if at_least else "at most"
    verdict = "met" if met else "missed"
    return [label, f"{sign} {aim:.0%}", f"{known.mean():.1%}", f"{low:.1%} to {high:.1%}", str(len(known)), verdict]


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% interval of a mean of shares over plants: Clopper and Pearson's if all are 0 or 1, else a normal one."""
    n, total = len(values), float(values.sum())
    if np.isin(values, (0.0, 1.0)).all():
        return clopper_pearson(total, n)
    half = 1.96 * float(values.std(ddof=1)) / n**0.5
    return max(float(values.mean()) - half, 0.0), min(float(values.mean()) + half, 1.0)
