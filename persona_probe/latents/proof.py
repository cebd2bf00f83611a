"""What the causal test shows: each latent's effects against the control organism and against random latents."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.latents.causal import BestOf
from persona_probe.stats import Estimate, bootstrap_mean
from persona_probe.verdicts import MINIMUM_CONTROLS, monte_carlo_p, rank_among

# --- Difference in differences: what a push or a removal does in the organism beyond what it does in the control


def item_differences(organism: pd.DataFrame, control: pd.DataFrame | None) -> pd.DataFrame:
    """Effects in the organism minus those in the control organism, paired by contrast item.

    Args:
        organism: columns name, item, question, odd, fall: every direction's odd effect and fall, item by item.
        control: the same of the control organism; None (a study without one) gives NaN.

    Returns:
        Latent (index), effect_difference and ablation_difference, each with _low and _high, clustered by question.
    """
    own = organism[organism["name"].str.fullmatch(r"latent \d+")]
    if control is not None:
        own = own.merge(control[["name", "item", "odd", "fall"]], on=["name", "item"], suffixes=("", "_control"))
    rows = []
    for name, part in own.groupby("name", sort=False):
        row: dict[str, Any] = {"latent": int(str(name).removeprefix("latent "))}
        for column, target in (("odd", "effect_difference"), ("fall", "ablation_difference")):
            values = None if control is None else (part[column] - part[f"{column}_control"]).to_numpy()
            row |= _ends(target, values, part["question"].tolist())
        rows.append(row)
    return pd.DataFrame(rows).set_index("latent")


def _ends(name: str, values: np.ndarray | None, clusters: Sequence[str]) -> dict[str, float]:
    if values is None or not np.isfinite(values).all():
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), float("nan"))
    estimate = bootstrap_mean(values, clusters)
    return {name: estimate.estimate, f"{name}_low": estimate.ci_low, f"{name}_high": estimate.ci_high}


# --- By how much a latent's effect exceeds what random latents do


@dataclass(frozen=True)
class Standing:
    """One effect of one latent among the random latents' effects."""

    effect: Estimate
    """Nats per token, evaluation split."""
    rank: int
    """Place by size among itself and the random latents; 1 is the largest."""
    controls: int
    """Random latents that were tested the same way."""
    p: float
    """(1 + random latents at least as large) / (1 + random latents)."""
    best_of: int
    """Candidates that the latent was chosen from."""
    limit: float
    """What the best of as many random latents stays below in 95 of 100 sets; NaN without random latents."""
    p_best: float
    """Share of such sets whose best reaches the latent's effect."""
    moved: int
    """Place by size among itself and the latents that training moved as much."""
    n_moved: int

    @property
    def beyond(self) -> bool:
        """Whether the whole interval lies above the limit and above zero, with enough random latents to say so."""
        return self.controls >= MINIMUM_CONTROLS and self.effect.ci_low > max(self.limit, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: the estimate's keys, rank, controls, p, best_of, limit, p_best, moved, n_moved."""
        values = {k: v for k, v in asdict(self).items() if k != "effect"}
        return {**self.effect.to_dict(), **values, "beyond": self.beyond}


TESTS = {
    "base": "effect_base",
    "organism": "effect_organism",
    "organism_difference": "effect_difference",
    "removal": "ablation",
    "removal_difference": "ablation_difference",
}
"""The causal tests of a latent, and the columns of latents.parquet that hold them."""


def standing(table: pd.DataFrame, latent: int, test: str, tries: int, n: int = 0) -> Standing | None:
    """How one effect of a latent stands among random latents; None where it was not measured.

    Args:
        table: latents.parquet.
        test: a key of `TESTS`.
        tries: candidates that the latent was chosen from.
        n: items behind the estimate.
    """
    column = TESTS[test]
    row = table[table["latent"] == latent].iloc[0]
    if column not in table or not np.isfinite(row[column]):
        return None
    random, moved = (table[table["kind"] == kind] for kind in ("random", "moved"))
    sizes = random[column].abs().to_numpy(dtype=float)
    estimate = Estimate(float(row[column]), float(row[f"{column}_low"]), float(row[f"{column}_high"]), n)
    best = BestOf.of(*_both_splits(random, column, removal=column.startswith("ablation")), tries)
    rank, _ = rank_among(estimate.estimate, sizes.tolist())
    moved_rank, n_moved = rank_among(estimate.estimate, moved[column].abs().tolist())
    return Standing(
        effect=estimate,
        rank=rank,
        controls=int(np.isfinite(sizes).sum()),
        p=monte_carlo_p(estimate.estimate, sizes.tolist()),
        best_of=best.tries,
        limit=best.limit(),
        p_best=best.p(estimate.estimate),
        moved=moved_rank,
        n_moved=n_moved - 1,
    )


def _both_splits(random: pd.DataFrame, column: str, removal: bool) -> tuple[list[float], list[float]]:
    """Effects on the selection split, and on the evaluation split; a removal has no direction, so its size counts."""
    selection, evaluation = random["effect_selection"], random[column]
    return (
        (selection.abs().tolist(), evaluation.abs().tolist())
        if removal
        else (
            selection.tolist(),
            evaluation.tolist(),
        )
    )


def with_verdict(table: pd.DataFrame, tries: int) -> pd.DataFrame:
    """Add the columns `moves`, `needed` and `causal`, true of candidates only.

    `moves` (sufficient): pushing the latent moves the contrast index of base and organism beyond what the best of as
    many random latents does. `needed` (necessary): projecting it out lowers the organism's index more than the control
    organism's, beyond random latents likewise. `causal` is both.
    """
    proven = table[(table["kind"] == "candidate") & table["effect_base"].notna()]["latent"].tolist()
    beyond = {test: {i for i in proven if _is_beyond(table, i, test, tries)} for test in TESTS}
    moves = beyond["base"] & beyond["organism"]
    needed = beyond["removal_difference"]
    columns = {"moves": moves, "needed": needed, "causal": moves & needed}
    return table.assign(**{name: table["latent"].isin(list(members)) for name, members in columns.items()})


def _is_beyond(table: pd.DataFrame, latent: int, test: str, tries: int) -> bool:
    found = standing(table, latent, test, tries)
    return found is not None and found.beyond
