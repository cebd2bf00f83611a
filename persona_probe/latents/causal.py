"""The causal test of latents: does a push along a direction change which answers the model prefers?

What is tested: single latents, sets of latents, and named directions. How: both signs of a push at the largest strength
that leaves neutral answers intact, and projecting the direction out; the effect is read on the contrast index. By what
yardstick: the same test of random latents and random directions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import SuffixScorer, answer_batches
from persona_probe.evaluate.contrast import ContrastItems, SteeredContrast
from persona_probe.models.taps import orthonormal, project_out, resolve_push
from persona_probe.stats import Estimate, bootstrap_mean

# --- What is tested: directions, and sets of them


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


def joint(directions: Sequence[Direction]) -> Direction:
    """A set as one direction: the sum of its unit vectors, pushed with the same norm as a single direction."""
    vector = torch.stack([d.vector / d.vector.norm() for d in directions]).sum(dim=0)
    name = " + ".join(str(d.latent) if d.latent >= 0 else d.name for d in directions)
    return Direction(f"set {name}", "set", vector)


# --- How: pushes along a direction, read on the contrast index, and neutral answers that bound their strength

AT_ONCE = 8
"""Pushes computed together; the scorer splits them further if they would not fit."""
Request = tuple[str, float]
"""Name of a direction and a signed strength."""


@dataclass(frozen=True)
class Pushed:
    """The result of one push."""

    direction: Direction
    strength: float
    values: Float[np.ndarray, " items"]
    """The contrast index, item by item (nats per token)."""
    perplexity_ratio: float
    """Perplexity of neutral answers, pushed to unpushed."""


class Sweep:
    """Pushes one model at one layer. The layers below run once for all contrast items and neutral answers.

    Args:
        neutral: everyday conversations with answers; their perplexity bounds the strength.
        reference_norm: raw size of strength 1 (for `x_delta`, the norm of the mean difference).
        bound: largest allowed perplexity ratio of neutral answers, steered to unsteered.
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
        bf16: bool = True,
    ) -> None:
        self.items, self.unit, self.reference_norm, self.bound = items, unit, reference_norm, bound
        self.contrast = SteeredContrast(model, items, layer, bf16=bf16)
        self.neutral = SuffixScorer(model, layer, answer_batches(tokenizer, neutral), bf16=bf16)
        self.unsteered = self.contrast.values(None)
        self._neutral_loss = -float(self.neutral.logprobs(None).mean())
        self._ratios: dict[Request, float] = {}
        self._pushes: dict[Request, Pushed] = {}

    def _vectors(self, requests: Sequence[tuple[Direction, float]]) -> Float[Tensor, "k d_model"]:
        reference = None if self.unit == "raw" else self.reference_norm
        return torch.stack([resolve_push(d.vector, s, self.unit, reference).vector for d, s in requests])

    def ratios(self, requests: Sequence[tuple[Direction, float]]) -> list[float]:
        """Perplexity of neutral answers, pushed to unpushed, for each direction and signed strength."""
        new = [r for r in requests if _key(*r) not in self._ratios]
        if new:
            losses = -self.neutral.logprobs_many(self._vectors(new)).mean(axis=1)
            new_ratios = np.exp(losses - self._neutral_loss)
            self._ratios |= {_key(*r): float(ratio) for r, ratio in zip(new, new_ratios, strict=True)}
        return [self._ratios[_key(*r)] for r in requests]

    def push_all(self, requests: Sequence[tuple[Direction, float]], label: str | None = None) -> list[Pushed]:
        """Item values and perplexity ratios of many pushes, `AT_ONCE` at a time; each push is computed once."""
        new = list({_key(*r): r for r in requests if _key(*r) not in self._pushes}.values())
        with tqdm(total=len(new), desc=label, disable=label is None) as bar:
            for start in range(0, len(new), AT_ONCE):
                part = new[start : start + AT_ONCE]
                values = self.contrast.values_many(self._vectors(part))
                for request, row, ratio in zip(part, values, self.ratios(part), strict=True):
                    self._pushes[_key(*request)] = Pushed(*request, row, ratio)
                bar.update(len(part))
        return [self._pushes[_key(*r)] for r in requests]

    def push(self, direction: Direction, strength: float) -> Pushed:
        """Item values and perplexity ratio at one signed strength; computed once."""
        return self.push_all([(direction, strength)])[0]

    def ablate(self, directions: Sequence[Direction]) -> Float[np.ndarray, " items"]:
        """Item values with the span of the directions projected out of the layer's output (Arditi et al. 2024)."""
        basis = orthonormal(torch.stack([d.vector for d in directions]))
        return self.contrast.values_edited(partial(project_out, basis=basis))

    def within_bound(self, directions: Sequence[Direction], strength: float) -> list[bool]:
        """Whether both signs keep the perplexity of neutral answers within the bound, for each direction."""
        ratios = self.ratios([(d, sign * strength) for d in directions for sign in (1, -1)])
        return [max(pair) <= self.bound for pair in zip(ratios[::2], ratios[1::2], strict=True)]

    def odd_values(self, direction: Direction, strength: float) -> Float[np.ndarray, " items"]:
        """Half the difference between the two signs, per item: damage, which both signs do, cancels."""
        return (self.push(direction, strength).values - self.push(direction, -strength).values) / 2

    def table(self, model_name: str) -> pd.DataFrame:
        """Every push so far, as rows of `steering.parquet`."""
        rows = []
        for pushed in self._pushes.values():
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


def bearable(
    sweep: Sweep, directions: Sequence[Direction], strengths: Sequence[float], refine: int = 0
) -> dict[str, float]:
    """The largest strength at which both signs of a push keep neutral perplexity within the sweep's bound.

    All directions try the grid of strengths together, from the largest down. Then `refine` bisections (in log strength)
    follow between the largest strength within the bound and the next one of the grid. NaN if no strength is within.
    """
    grid = sorted(strengths, reverse=True)
    largest: dict[str, float] = {}
    for strength in grid:
        pending = [d for d in directions if d.name not in largest]
        within = sweep.within_bound(pending, strength) if pending else []
        largest |= {d.name: strength for d, ok in zip(pending, within, strict=True) if ok}
    above = {low: high for high, low in pairwise(grid)}
    limits = {d.name: above[largest[d.name]] for d in directions if largest.get(d.name) in above}
    for _ in range(refine if limits else 0):
        _bisect(sweep, [d for d in directions if d.name in limits], largest, limits)
    return {d.name: largest.get(d.name, float("nan")) for d in directions}


def _bisect(sweep: Sweep, directions: Sequence[Direction], low: dict[str, float], high: dict[str, float]) -> None:
    for direction in directions:
        middle = float(np.sqrt(low[direction.name] * high[direction.name]))
        within = sweep.within_bound([direction], middle)[0]
        (low if within else high)[direction.name] = middle


def effects(
    sweep: Sweep, directions: Sequence[Direction], strengths: Sequence[float], label: str, refine: int = 0
) -> pd.DataFrame:
    """Causal effects of many directions, each at its largest strength within the bound (`bearable`).

    The effect is the odd part of the contrast index, (index at +strength - index at -strength) / 2, with its bootstrap
    interval over questions, in nats per token. Damage, which both signs do, cancels.

    Returns:
        Columns name, kind, latent, effect, effect_low, effect_high, strength; NaN if no strength is within the bound.
    """
    strength = bearable(sweep, directions, strengths, refine)
    bearing = [d for d in directions if np.isfinite(strength[d.name])]
    sweep.push_all([(d, sign * strength[d.name]) for d in bearing for sign in (1, -1)], label)
    odd = {d.name: sweep.odd_values(d, strength[d.name]) for d in bearing}
    return pd.DataFrame([_row(d, odd.get(d.name), sweep.items.clusters, strength[d.name]) for d in directions])


def _row(direction: Direction, odd: np.ndarray | None, clusters: Sequence[str], strength: float) -> dict[str, Any]:
    effect = None if odd is None else bootstrap_mean(odd, clusters)
    row = {"name": direction.name, "kind": direction.kind, "latent": direction.latent}
    return {**row, **_columns("effect", effect), "strength": strength}


def _columns(name: str, estimate: Estimate | None) -> dict[str, float]:
    """An estimate as the columns `name`, `name_low`, `name_high`; NaN without one."""
    values = (estimate.estimate, estimate.ci_low, estimate.ci_high) if estimate else (np.nan,) * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def ablations(sweep: Sweep, spans: Sequence[Sequence[Direction]]) -> pd.DataFrame:
    """How far the contrast index falls when directions are projected out: unsteered minus ablated, with intervals.

    Args:
        spans: each holds one or several directions, which are projected out together.

    Returns:
        Columns name, ablation, ablation_low, ablation_high (nats per token; positive is less misaligned).
    """
    rows = []
    for span in tqdm(spans, desc="projecting out"):
        fall = bootstrap_mean(sweep.unsteered - sweep.ablate(span), sweep.items.clusters)
        rows.append({"name": joint(span).name if len(span) > 1 else span[0].name, **_columns("ablation", fall)})
    return pd.DataFrame(rows)


def greedy_sets(
    sweep: Sweep, directions: Sequence[Direction], size: int, strengths: Sequence[float]
) -> list[list[Direction]]:
    """Sets of 1, 2, ... `size` latents, each with the next latent that raises their joint effect the most.

    The search uses the items of `sweep` (the selection split); measure the sets on the evaluation split. Every set is
    pushed with the same norm, so a set wins by its direction and not by its size.
    """
    members: list[Direction] = []
    sets: list[list[Direction]] = []
    while len(members) < min(size, len(directions)):
        names = {d.name for d in members}
        options = [d for d in directions if d.name not in names]
        together = [joint([*members, d]) for d in options]
        scores = effects(sweep, together, strengths, f"sets of {len(members) + 1}")["effect"].fillna(-np.inf)
        members = [*members, options[int(scores.to_numpy().argmax())]]
        sets.append(members)
    return sets


# --- By what yardstick: random latents that fire as often, random directions, and the verdict

POOL = 12
"""A control is drawn from this many latents with the nearest firing rate."""
MOVED = 100
"""The latents that training moved most are no controls."""


def matched_latents(table: pd.DataFrame, tested: list[int], count: int, seed: int) -> list[int]:
    """Random latents with firing rates like the candidates', none of them a candidate or among the most moved.

    Each candidate in turn gets one of the `POOL` latents nearest to it in log firing rate on the tuned arm. Every push
    has the same norm, so decoder norms need no matching.

    Raises:
        InputError: the dictionary has too few live latents.
    """
    top_movers = set(
        table.reindex(table["rise"].abs().sort_values(ascending=False).index)["latent"].head(MOVED).tolist()
    )
    rate = table.set_index("latent")["firing_incorrect"]
    live = [int(i) for i in rate.index[rate > 0] if i not in top_movers and i not in tested]
    if len(live) < count:
        live = [int(i) for i in rate.index if i not in tested]
    if len(live) < count:
        raise InputError(f"the SAE has only {len(live)} latents for {count} random controls: lower random_latents")
    rng = np.random.default_rng(seed)
    logs = {i: float(np.log10(rate[i] + 1e-6)) for i in [*live, *tested]}
    controls: list[int] = []
    for number in range(count):
        target = logs[tested[number % len(tested)]]
        pool = sorted((i for i in live if i not in controls), key=lambda i: (abs(logs[i] - target), i))[:POOL]
        controls.append(int(rng.choice(pool)))
    return controls


def random_directions(d_model: int, count: int, seed: int) -> list[Float[Tensor, " d_model"]]:
    """Isotropic unit directions."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, d_model, generator=generator)
    return list(rows / rows.norm(dim=1, keepdim=True))


def exceeds_random(low: Mapping[int, float], random: Sequence[float], quantile: float = 0.95) -> set[int]:
    """Latents whose interval lies wholly above this quantile of the sizes of random latents' effects.

    Args:
        low: the lower end of each latent's interval.
        random: the random latents' effects; their sign does not count.
    """
    sizes = np.abs(np.asarray(random, dtype=np.float64))
    sizes = sizes[np.isfinite(sizes)]
    if not sizes.size:
        return set()
    limit = float(np.quantile(sizes, quantile))
    return {latent for latent, value in low.items() if value > limit}


def causal(table: pd.DataFrame) -> pd.Series:
    """Whether each latent induces misalignment in the base and carries it in the organism.

    Three intervals must lie above the 95th percentile of the sizes of random latents' effects: base steered up,
    organism steered down, and organism with the latent projected out.
    """
    random, candidates = table[table["kind"] == "random"], table[table["kind"] == "candidate"].set_index("latent")
    exceeding = [
        exceeds_random(
            {int(str(i)): low for i, low in candidates[f"{column}_low"].dropna().items()}, random[column].tolist()
        )
        for column in ("effect_base", "effect_organism", "ablation")
    ]
    return table["latent"].isin(set.intersection(*exceeding))
