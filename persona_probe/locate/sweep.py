"""The causal sweep: steer one model along many directions and read the contrast index and the damage."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation
from persona_probe.evaluate.answers import SuffixScorer, answer_batches
from persona_probe.evaluate.contrast import ContrastItems, SteeredContrast
from persona_probe.models.taps import resolve_push
from persona_probe.stats import Estimate, bootstrap_mean


@dataclass(frozen=True)
class Direction:
    """A named direction to push along."""

    name: str
    kind: str
    """`candidate`, `random`, `mean_difference` or `random_direction`."""
    vector: Float[Tensor, " d_model"]
    latent: int = -1


def latent_direction(decoder: Float[Tensor, "d_sae d_model"], latent: int, kind: str) -> Direction:
    """The decoder row of a latent."""
    return Direction(f"latent {latent}", kind, decoder[latent].detach().float().cpu(), latent)


@dataclass(frozen=True)
class Pushed:
    """What one push did."""

    direction: Direction
    strength: float
    values: Float[np.ndarray, " items"]
    perplexity_ratio: float


class Sweep:
    """Pushes one model at one layer; contrast items and neutral answers are captured once.

    Args:
        reference_norm: what strength 1 means, in raw units (the norm of the mean difference, for `x_delta`).
        bound: largest allowed ratio of neutral answers' perplexity, steered to unsteered.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        items: ContrastItems,
        neutral: Sequence[Conversation],
        layer: int,
        *,
        unit: str,
        reference_norm: float,
        bound: float,
        mixed_precision: bool = True,
    ) -> None:
        self.items, self.unit, self.reference_norm, self.bound = items, unit, reference_norm, bound
        self.contrast = SteeredContrast(model, items, layer, mixed_precision=mixed_precision)
        self.neutral = SuffixScorer(model, layer, answer_batches(tokenizer, neutral), mixed_precision=mixed_precision)
        self.unsteered = self.contrast.values(None)
        self._neutral_loss = -float(self.neutral.logprobs(None).mean())
        self._done: dict[tuple[str, float], Pushed] = {}

    def push(self, direction: Direction, strength: float) -> Pushed:
        """Item values and perplexity ratio at one signed strength; computed once."""
        key = (direction.name, strength)
        if key not in self._done:
            reference = None if self.unit == "raw" else self.reference_norm
            vector = resolve_push(direction.vector, strength, self.unit, reference).vector
            loss = -float(self.neutral.logprobs(vector).mean())
            ratio = float(np.exp(loss - self._neutral_loss))
            self._done[key] = Pushed(direction, strength, self.contrast.values(vector), ratio)
        return self._done[key]

    def within_bound(self, direction: Direction, strength: float) -> bool:
        """Whether both signs keep neutral answers' perplexity bounded."""
        return all(self.push(direction, sign * strength).perplexity_ratio <= self.bound for sign in (1, -1))

    def causal_effect(self, direction: Direction, strengths: Iterable[float]) -> tuple[Estimate | None, float]:
        """The odd part of the effect, at the largest strength within the bound, with its interval over questions.

        (effect at +strength - effect at -strength) / 2: damage, which both signs do, cancels.

        Returns:
            The estimate (nats per token) and the strength; (None, nan) where no strength is within the bound.
        """
        for strength in sorted(strengths, reverse=True):
            if self.within_bound(direction, strength):
                return bootstrap_mean(self.odd_values(direction, strength), self.items.clusters), strength
        return None, float("nan")

    def odd_values(self, direction: Direction, strength: float) -> Float[np.ndarray, " items"]:
        """Half the difference between the two signs, per item."""
        return (self.push(direction, strength).values - self.push(direction, -strength).values) / 2

    def effects(self, directions: Sequence[Direction], strengths: Sequence[float], label: str) -> pd.DataFrame:
        """Causal effects of many directions: name, kind, latent, effect, effect_low, effect_high, strength."""
        rows = []
        for direction in tqdm(directions, desc=label):
            effect, strength = self.causal_effect(direction, strengths)
            rows.append(
                {
                    "name": direction.name,
                    "kind": direction.kind,
                    "latent": direction.latent,
                    "effect": effect.estimate if effect else np.nan,
                    "effect_low": effect.ci_low if effect else np.nan,
                    "effect_high": effect.ci_high if effect else np.nan,
                    "strength": strength,
                }
            )
        return pd.DataFrame(rows)

    def table(self, model_name: str) -> pd.DataFrame:
        """Every push so far, as rows of `steering.parquet`."""
        rows = []
        for pushed in self._done.values():
            level = bootstrap_mean(pushed.values, self.items.clusters)
            rows.append(
                {
                    "model": model_name,
                    "kind": pushed.direction.kind,
                    "name": pushed.direction.name,
                    "latent": pushed.direction.latent,
                    "strength": pushed.strength,
                    "unit": self.unit,
                    "estimate": level.estimate,
                    "ci_low": level.ci_low,
                    "ci_high": level.ci_high,
                    "delta": level.estimate - float(self.unsteered.mean()),
                    "n_items": level.n,
                    "perplexity_ratio": pushed.perplexity_ratio,
                    "within_bound": pushed.perplexity_ratio <= self.bound,
                }
            )
        return pd.DataFrame(rows)


def unit_vector(direction: Float[np.ndarray, " d_model"]) -> Float[Tensor, " d_model"]:
    """A numpy direction as a unit torch vector."""
    vector = torch.tensor(direction, dtype=torch.float32)
    return vector / vector.norm()
