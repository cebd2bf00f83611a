"""Does the causal test confirm a find? Steer the planted model back along what was found, and along random latents."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import answer_logprobs
from persona_probe.evaluate.suffix import SuffixScorer
from persona_probe.planted.bed import Bed, Found
from persona_probe.planted.draw import draw_latents
from persona_probe.planted.plants import Plant, graft
from persona_probe.stats import bootstrap_mean

RANDOM_SETS = 3


@dataclass(frozen=True)
class Repair:
    """How far a push back along what was found takes the planted model's answers to the base's."""

    restored: float
    """1 - |change after the push| / |change by the plant|, of the answers' mean log-probabilities."""
    restored_random: float
    """The same for the best of the random latents, pushed as hard."""
    confirmed: bool
    """Whether the push leaves less change than that of every random set, by 95% intervals over questions."""


class CausalBed:
    """Answers (of questions that selected nothing) that the planted models must score.

    Args:
        groups: what `evaluate.answers.answer_batches` gives.
        clusters: the question of every conversation.
    """

    def __init__(self, model: nn.Module, layer: int, groups: list[Batch], clusters: list[str]) -> None:
        self.model, self.layer, self.groups, self.clusters = model, layer, groups, clusters
        # Full precision: bfloat16's rounding is as large as what a small plant does.
        self.before = answer_logprobs(model, groups, mixed_precision=False)

    def repair(self, bed: Bed, plant: Plant, found: Found, generator: torch.Generator) -> Repair:
        """Graft the plant into the model, then push back along the found latents by the shift measured along them."""
        latents = found_latents(plant, found)
        rows = unit_rows(bed, latents)
        pushes = random_pushes(bed, latents, found, generator)
        with graft(self.model, self.layer, plant):
            scorer = SuffixScorer(self.model, self.layer, self.groups, mixed_precision=False)
            planted = np.abs(scorer.unpushed - self.before)
            after = np.abs(scorer.logprobs(-sum_of_shifts(rows, found)) - self.before)
            others = [np.abs(scorer.logprobs(p) - self.before) for p in pushes]
        gains = [bootstrap_mean(other - after, self.clusters) for other in others]
        best = min(float(other.mean()) for other in others)
        return Repair(
            1 - float(after.mean() / planted.mean()),
            1 - best / float(planted.mean()),
            all(gain.ci_low > 0 for gain in gains),
        )


def found_latents(plant: Plant, found: Found) -> list[int]:
    """The latents that the control-corrected rise names: as many as were planted, at each end of the ranking.

    Where none was planted, the one that rose most.
    """
    order = [int(latent) for latent in found.table["rise"].sort_values(ascending=False).index]
    down = len(plant.down())
    return [*order[: max(len(plant.up()), 1 - down)], *order[len(order) - down :]]


def unit_rows(bed: Bed, latents: list[int]) -> Float[Tensor, "latents d_model"]:
    """Decoder rows of norm 1."""
    rows = bed.decoder[latents]
    return rows / rows.norm(dim=1, keepdim=True)


def sum_of_shifts(rows: Float[Tensor, "found d_model"], found: Found) -> Float[Tensor, " d_model"]:
    """The part of the arms' mean difference that lies along each row, added up."""
    return (rows @ torch.tensor(found.difference, dtype=rows.dtype)) @ rows


def random_pushes(
    bed: Bed, latents: list[int], found: Found, generator: torch.Generator
) -> list[Float[Tensor, " d_model"]]:
    """Pushes down along random frequent latents: others than those found, as many of them, and each as hard.

    Raises:
        InputError: the SAE has too few frequent latents besides those found.
    """
    pool = [latent for latent in bed.pools["frequent"] if latent not in latents]
    if len(pool) < len(latents):
        raise InputError(f"only {len(pool)} frequent latents are left as random controls: set causal to 0")
    sizes = (unit_rows(bed, latents) @ torch.tensor(found.difference, dtype=bed.decoder.dtype)).abs()
    sets = [draw_latents(pool, len(latents), len(bed.decoder), generator) for _ in range(RANDOM_SETS)]
    return [-(sizes @ unit_rows(bed, list(chosen))) for chosen in sets]
