"""What was found of one plant, against what was planted: recall, false discoveries, carriers."""

from typing import Any

import numpy as np
from jaxtyping import Float

from persona_probe.locate.unexplained import carriers
from persona_probe.planted.bed import Bed, Found
from persona_probe.planted.plants import Plant

LEVEL = 0.05
"""Discoveries are latents with a positive control-corrected rise and a q-value up to this."""
CAUSED = 0.5
"""A discovery is true if the plant alone, without noise, makes at least this share of its measured rise."""
NEAR = 0.2
"""Cosine with a planted direction under which a discovered latent is off target."""
SHORTLIST = 10


def planted_ranks(score: Float[np.ndarray, " d_sae"], plant: Plant) -> tuple[list[int], list[int]]:
    """Ranks of the planted latents: those pushed up from the top, those pushed down from the bottom; ties count
    against them."""
    up = [int((score >= score[latent]).sum()) for latent in plant.up()]
    down = [int((score <= score[latent]).sum()) for latent in plant.down()]
    return up, down


def recalls(score: Float[np.ndarray, " d_sae"], plant: Plant) -> dict[str, float]:
    """Recall at 1, at k (the number planted in each direction) and at 10; NaN where no latent was planted.

    Recall at 1 asks whether a planted latent is the very first (the very last, where all were pushed down).
    """
    up, down = planted_ranks(score, plant)
    if not plant.latents:
        return dict.fromkeys(("recall_1", "recall_k", "recall_10"), float("nan"))
    within_k = [r <= len(up) for r in up] + [r <= len(down) for r in down]
    return {
        "recall_1": float(1 in (up or down)),
        "recall_k": float(np.mean(within_k)),
        "recall_10": float(np.mean([r <= SHORTLIST for r in up + down])),
    }


def discoveries(bed: Bed, plant: Plant, found: Found) -> dict[str, float]:
    """Significant rises at q 0.05: how many, the false share, the off-target share, and the planted latents' own.

    A discovery is false unless the plant causes at least half of its rise (`CAUSED`). Falls are left out: a TopK SAE
    that takes one latent in puts another out. Off target: true, but the latent's decoder row has a cosine below 0.2
    with everything planted; the encoder answers to the shift though the latent is not its cause.
    """
    table = found.table
    significant = table["q_value"].to_numpy() <= LEVEL
    rise = table["rise"].to_numpy()
    chosen = significant & (rise > 0)
    false = chosen & (bed.caused(plant) < CAUSED * rise) if chosen.any() else chosen
    targets = plant.targets(bed.decoder)
    near = (bed.decoder @ targets.T / bed.decoder.norm(dim=1, keepdim=True)).numpy().max(axis=1, initial=-1.0) >= NEAR
    count = max(int(chosen.sum()), 1)
    own = [bool(chosen[latent]) for latent in plant.up()]
    own += [bool(significant[latent] and rise[latent] < 0) for latent in plant.down()]
    return {
        "discoveries": float(chosen.sum()),
        "false_share": float(false.sum()) / count,
        "off_target": float((chosen & ~false & ~near).sum()) / count,
        "significant": float(np.mean(own)) if own else float("nan"),
    }


def carried(bed: Bed, plant: Plant, found: Found) -> dict[str, float]:
    """The verdict of `locate.unexplained` on the arms' mean difference, and what one projection takes away.

    `removed`: share of the difference's squared norm that goes when the decoder row of the latent that rose most is
    projected out of it.
    """
    verdict = carriers(bed.decoder.numpy(), found.difference, signed=True, reference=bed.reference)
    row = bed.decoder.numpy()[int(found.table["rise"].to_numpy().argmax())]
    cosine = float(row @ found.difference / (np.linalg.norm(row) * np.linalg.norm(found.difference)))
    right = set(verdict.latents) & set(plant.latents)
    return {
        "carried": float(verdict.carried),
        "carriers_right": len(right) / len(plant.latents) if plant.latents else float("nan"),
        "unexplained": verdict.unexplained,
        "removed": cosine**2,
    }


def scores(bed: Bed, plant: Plant, found: Found) -> list[dict[str, Any]]:
    """One record per ranker; what does not depend on the ranker is repeated."""
    shared: dict[str, Any] = {"kind": plant.kind, "size": plant.size, "latents": " ".join(map(str, plant.latents))}
    rates = [float(bed.rates[latent]) for latent in plant.latents]
    shared["firing"] = float(np.mean(rates)) if rates else float("nan")
    shared |= discoveries(bed, plant, found) | carried(bed, plant, found)
    return [
        shared | {"ranker": name} | recalls(found.table[name].to_numpy(dtype=np.float64), plant) for name in bed.rankers
    ]
