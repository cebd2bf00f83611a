"""Where rankers agree: shared top latents and rank correlation, pair by pair."""

from collections.abc import Sequence
from itertools import combinations

import pandas as pd

from persona_probe.errors import InputError, unknown


def agreement(table: pd.DataFrame, rankers: Sequence[str], top: int = 20) -> pd.DataFrame:
    """How far each pair of rankers picks the same latents, among those that are alive.

    Args:
        table: what `rankers.score_table` gives for at least these rankers.
        top: how many latents each ranker picks; all alive ones where they are fewer.

    Returns:
        One row per pair: left, right; top (latents picked); shared (picked by both) and share of `top`; chance (the
        share that two random picks would have); spearman (rank correlation of the scores over alive latents, NaN where
        a score is constant); alive (their number).

    Raises:
        InputError: a ranker that the table does not hold, fewer than two rankers, no latent alive, or `top` below 1.
    """
    known = [c.removesuffix("_rank") for c in table.columns if c.endswith("_rank")]
    names = list(dict.fromkeys(rankers))
    for name in names:
        if name not in known:
            raise unknown("ranker of this table", name, known)
    if len(names) < 2 or top < 1:
        raise InputError(f"agreement compares the top of at least two rankers: got {len(names)}, and top {top}")
    alive = table[table["alive"].astype(bool)]
    if alive.empty:
        raise InputError(
            "no latent fires on these conversations: check the SAE's layer with `persona-probe saes check`"
        )
    count = min(top, len(alive))
    picks = {name: set(alive.nsmallest(count, f"{name}_rank")["latent"]) for name in names}
    correlation = alive[names].corr(method="spearman")
    rows = []
    for left, right in combinations(names, 2):
        shared = len(picks[left] & picks[right])
        found = {"left": left, "right": right, "top": count, "shared": shared, "share": shared / count}
        rows.append({**found, "chance": count / len(alive), "spearman": correlation.loc[left, right]})
    return pd.DataFrame(rows).assign(alive=len(alive))
