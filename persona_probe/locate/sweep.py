"""The causal sweep: steer one model along many directions and read the contrast index and the damage."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation
from persona_probe.evaluate.answers import answer_batches
from persona_probe.evaluate.contrast import ContrastItems, SteeredContrast
from persona_probe.evaluate.suffix import SuffixScorer
from persona_probe.models.taps import orthonormal, project_out, resolve_push
from persona_probe.stats import bootstrap_mean

AT_ONCE = 8
"""Pushes computed together; the scorer splits them further where they would not fit."""
Request = tuple[str, float]
"""Name of a direction and a signed strength."""


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
        self._ratios: dict[Request, float] = {}
        self._done: dict[Request, Pushed] = {}

    def _vectors(self, requests: Sequence[tuple[Direction, float]]) -> Float[Tensor, "k d_model"]:
        reference = None if self.unit == "raw" else self.reference_norm
        return torch.stack([resolve_push(d.vector, s, self.unit, reference).vector for d, s in requests])

    def ratios(self, requests: Sequence[tuple[Direction, float]]) -> list[float]:
        """Perplexity of neutral answers, pushed to unpushed, for each direction and signed strength."""
        new = [r for r in requests if _key(*r) not in self._ratios]
        if new:
            losses = -self.neutral.logprobs_many(self._vectors(new)).mean(axis=1)
            found = np.exp(losses - self._neutral_loss)
            self._ratios |= {_key(*r): float(ratio) for r, ratio in zip(new, found, strict=True)}
        return [self._ratios[_key(*r)] for r in requests]

    def push_all(self, requests: Sequence[tuple[Direction, float]], label: str | None = None) -> list[Pushed]:
        """Item values and perplexity ratios of many pushes; each is computed once, `AT_ONCE` in one go."""
        new = list({_key(*r): r for r in requests if _key(*r) not in self._done}.values())
        with tqdm(total=len(new), desc=label, disable=label is None) as bar:
            for start in range(0, len(new), AT_ONCE):
                part = new[start : start + AT_ONCE]
                values = self.contrast.values_many(self._vectors(part))
                for request, row, ratio in zip(part, values, self.ratios(part), strict=True):
                    self._done[_key(*request)] = Pushed(*request, row, ratio)
                bar.update(len(part))
        return [self._done[_key(*r)] for r in requests]

    def push(self, direction: Direction, strength: float) -> Pushed:
        """Item values and perplexity ratio at one signed strength; computed once."""
        return self.push_all([(direction, strength)])[0]

    def ablate(self, directions: Sequence[Direction]) -> Float[np.ndarray, " items"]:
        """Item values with the span of the directions projected out of the layer's output (Arditi et al. 2024)."""
        basis = orthonormal(torch.stack([d.vector for d in directions]))
        return self.contrast.values_edited(partial(project_out, basis=basis))

    def within_bound(self, directions: Sequence[Direction], strength: float) -> list[bool]:
        """For each direction whether both signs keep neutral answers' perplexity bounded."""
        ratios = self.ratios([(d, sign * strength) for d in directions for sign in (1, -1)])
        return [max(pair) <= self.bound for pair in zip(ratios[::2], ratios[1::2], strict=True)]

    def odd_values(self, direction: Direction, strength: float) -> Float[np.ndarray, " items"]:
        """Half the difference between the two signs, per item: damage, which both signs do, cancels."""
        return (self.push(direction, strength).values - self.push(direction, -strength).values) / 2

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


def _key(direction: Direction, strength: float) -> Request:
    return direction.name, strength


def unit_vector(direction: Float[np.ndarray, " d_model"]) -> Float[Tensor, " d_model"]:
    """A numpy direction as a unit torch vector."""
    vector = torch.tensor(direction, dtype=torch.float32)
    return vector / vector.norm()
