"""What a ranking does not know: a change that lies in no latent, seed noise, rankings that disagree."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from persona_probe.latents.rankers import NOT_MEASURED, Evidence, mean_difference
from persona_probe.latents.unexplained import carriers

TOP, FAR = 10, 100
"""A latent is noted where it is among the first `TOP` by rise or cosine, and beyond place `FAR` by the other."""
K = 8
RANDOM_DIRECTIONS = 200


@dataclass(frozen=True)
class Explained:
    """How much of the mean change the dictionary explains."""

    by_reconstruction: float
    """Share of the mean difference's squared norm that the SAE's reconstructions change by too (at most 1; 0 where the
    change of the reconstructions is no nearer to the mean difference than nothing is)."""
    by_latents: float
    """Share that the best eight decoder rows explain."""
    carried: bool
    """Whether one or few latents carry it, see `latents.unexplained.Carriers`."""
    statement: str


def explained_change(evidence: Evidence) -> Explained | None:
    """How much of the mean difference between organism and control lies in latents; None where there is none."""
    tuned, control = evidence.at("tuned"), evidence.at("control")
    change = mean_difference(tuned, control)
    total = float(change @ change)
    if total == 0:
        return None
    latents = (tuned.mean.astype(np.float64) - control.mean).mean(axis=0)
    left = change - latents @ evidence.decoder
    found = carriers(
        evidence.decoder,
        change,
        min(K, len(evidence.decoder)),
        signed=True,
        null=evidence.null_difference,
        n_random=RANDOM_DIRECTIONS,
        seed=evidence.seed,
    )
    captured = max(0.0, 1 - float(left @ left) / total)
    return Explained(captured, 1 - found.unexplained, found.carried, str(found))


def add_caveats(table: pd.DataFrame, evidence: Evidence) -> list[str]:
    """Add the column `note` and attrs to a table of `score_table`, and return the warnings as sentences.

    attrs: `explained_change` and `explained_by_latents` (shares of the mean difference's squared norm), `carried`,
    `carriers` (a sentence), `disagreement` (a sentence, or empty). `note` marks latents that are among the first ten by
    rise or cosine, and beyond place 100 by the other.
    """
    warnings = [NOT_MEASURED] if evidence.null is None else []
    explained = explained_change(evidence)
    if explained is None:
        warnings.append("the two models do not differ on these conversations: there is nothing to rank")
    else:
        table.attrs |= {
            "explained_change": explained.by_reconstruction,
            "explained_by_latents": explained.by_latents,
            "carried": explained.carried,
            "carriers": explained.statement,
        }
        shares = (
            f"the SAE's reconstructions explain {explained.by_reconstruction:.0%} of the mean change, the best {K} "
            f"decoder rows {explained.by_latents:.0%}"
        )
        if not explained.carried:
            warnings.append(f"{explained.statement}; {shares}: the ranking may name latents that are not the change")
    table.attrs["disagreement"] = _note_disagreement(table)
    if table.attrs["disagreement"]:
        warnings.append(table.attrs["disagreement"])
    return warnings


def _note_disagreement(table: pd.DataFrame) -> str:
    """Fill `note`, and say what became of the first latent of each ranking in the other."""
    live = table[table["alive"]]
    ranks = {name: live.set_index("latent")[name].rank(ascending=False, method="first") for name in ("rise", "cosine")}
    notes: dict[int, str] = {}
    said = []
    for name, other in (("cosine", "rise"), ("rise", "cosine")):
        far = ranks[name].index[(ranks[name] <= TOP) & (ranks[other] > FAR)]
        notes |= {
            latent: f"{ranks[name][latent]:.0f} by {name}, {ranks[other][latent]:.0f} by {other}" for latent in far
        }
        said += [
            f"latent {latent} is first by {name}, but {ranks[other][latent]:.0f} by {other}"
            for latent in far
            if ranks[name][latent] == 1
        ]
    table["note"] = table["latent"].map(notes).fillna("")
    return "; ".join(said)
