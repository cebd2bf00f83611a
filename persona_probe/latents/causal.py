"""The causal test of latents: does a push along a direction change which answers the model prefers?

What is tested: single latents, sets of latents, and named directions. How: both signs of a push at the largest strength
that leaves neutral answers intact, and projecting the direction out; the effect is read on the contrast index. By what
yardstick: the same test of random latents and random directions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import pairwise
from math import comb
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
        return self.ablate_all([directions])[0]

    def ablate_all(
        self, spans: Sequence[Sequence[Direction]], label: str | None = None
    ) -> list[Float[np.ndarray, " items"]]:
        """`ablate` for several spans, `AT_ONCE` at a time."""
        bases = [orthonormal(torch.stack([d.vector for d in span])) for span in spans]
        values = list[Float[np.ndarray, " items"]]()
        with tqdm(total=len(bases), desc=label, disable=label is None) as bar:
            for start in range(0, len(bases), AT_ONCE):
                part = [partial(project_out, basis=basis) for basis in bases[start : start + AT_ONCE]]
                values += list(self.contrast.values_edited_many(part))
                bar.update(len(part))
        return values

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


def effects_at(sweep: Sweep, directions: Sequence[Direction], strength: float, label: str) -> pd.DataFrame:
    """Causal effects of many directions, all pushed with the same norm, so that they can be compared.

    Args:
        strength: of every push, within the bound or not; NaN if nothing could be pushed at all.

    Returns:
        The columns of `effects`, and within_bound: whether both signs left neutral answers intact.
    """
    if not np.isfinite(strength):
        return pd.DataFrame(
            [_row(d, None, sweep.items.clusters, strength) | {"within_bound": False} for d in directions]
        )
    sweep.push_all([(d, sign * strength) for d in directions for sign in (1, -1)], label)
    within = sweep.within_bound(directions, strength)
    rows = [_row(d, sweep.odd_values(d, strength), sweep.items.clusters, strength) for d in directions]
    return pd.DataFrame([row | {"within_bound": ok} for row, ok in zip(rows, within, strict=True)])


def falls(sweep: Sweep, spans: Sequence[Sequence[Direction]]) -> dict[str, Float[np.ndarray, " items"]]:
    """How far each item falls when directions are projected out: unsteered minus ablated, nats per token.

    Args:
        spans: each holds one or several directions, which are projected out together.

    Returns:
        Name of the direction, or of the set, to one value an item; positive is less misaligned.
    """
    ablated = sweep.ablate_all(spans, "projecting out")
    return {_span_name(span): sweep.unsteered - values for span, values in zip(spans, ablated, strict=True)}


def _span_name(span: Sequence[Direction]) -> str:
    return joint(span).name if len(span) > 1 else span[0].name


def ablations(sweep: Sweep, spans: Sequence[Sequence[Direction]]) -> pd.DataFrame:
    """`falls` averaged over items, with intervals: columns name, ablation, ablation_low, ablation_high."""
    return fall_table(falls(sweep, spans), sweep.items.clusters)


def fall_table(falls: Mapping[str, Float[np.ndarray, " items"]], clusters: Sequence[str]) -> pd.DataFrame:
    """Falls by name as rows: columns name, ablation, ablation_low, ablation_high."""
    rows = [{"name": name, **_columns("ablation", bootstrap_mean(fall, clusters))} for name, fall in falls.items()]
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


# --- By what yardstick: random latents, random directions, and what the best of as many random latents reaches

STRATA = 4
"""Quartiles of firing rate that random latents are spread over."""
QUOTA = 1.5
"""No stratum gives more than this many times its even share."""
MOVED = 16
"""Latents that training moved most, the candidates aside, that are tested beside the random ones."""


def random_latents(firing: pd.Series, excluded: Sequence[int], count: int, seed: int) -> list[int]:
    """Random latents of the live dictionary, spread over its firing rates; the same on every machine.

    Latents are taken in the order of a hash of seed and index, which no measurement enters, so rounding on another
    processor does not change the draw. A latent is passed over if it is silent, or if its quartile of firing rate
    already gave `QUOTA` times its share. What training moved is not left out, since candidates were moved too.

    Args:
        firing: firing rate by latent index; silent latents have 0.
        excluded: latents that are tested themselves.

    Raises:
        InputError: the dictionary has too few live latents.
    """
    live = firing[(firing > 0) & ~firing.index.isin(list(excluded))]
    if len(live) < count:
        raise InputError(f"the SAE has only {len(live)} latents for {count} random controls: lower random_latents")
    strata = (live.rank(method="first") * STRATA / (len(live) + 1)).astype(int)
    room = dict.fromkeys(range(STRATA), int(np.ceil(QUOTA * count / STRATA)))
    drawn: list[int] = []
    for latent in sorted((int(str(i)) for i in live.index), key=partial(_hashed, seed)):
        if len(drawn) < count and room[stratum := int(strata[latent])] > 0:
            room[stratum] -= 1
            drawn.append(latent)
    return drawn


def _hashed(seed: int, latent: int) -> bytes:
    return sha256(f"{seed}:{latent}".encode()).digest()


def moved_latents(rise: pd.Series, excluded: Sequence[int], count: int = MOVED) -> list[int]:
    """The latents whose activation training changed most, in either direction, the excluded ones aside."""
    sizes = rise.drop(index=[i for i in excluded if i in rise.index]).abs()
    return [int(i) for i in sizes.sort_values(ascending=False, kind="stable").index[:count]]


def random_directions(d_model: int, count: int, seed: int) -> list[Float[Tensor, " d_model"]]:
    """Isotropic unit directions."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, d_model, generator=generator)
    return list(rows / rows.norm(dim=1, keepdim=True))


@dataclass(frozen=True)
class BestOf:
    """What the best of `tries` random latents reaches, if it is chosen as the persona latent was.

    The persona latent has the largest effect of several candidates on the selection split. So each set of as many
    random latents has a best one on that split too; its effect on the evaluation split is what chance gives. All sets
    are weighed at once: the latent in place r of n is the best of a set with probability C(n - r, k - 1) / C(n, k).
    """

    values: Float[np.ndarray, " n"]
    """Sizes on the evaluation split, best on the selection split first."""
    tries: int

    @classmethod
    def of(cls, selection: Sequence[float], evaluation: Sequence[float], tries: int) -> "BestOf":
        """From the random latents' effects on both splits; a latent counts in the direction that selection favours."""
        chosen, tested = np.asarray(selection, dtype=float), np.asarray(evaluation, dtype=float)
        kept = np.isfinite(chosen) & np.isfinite(tested)
        order = np.argsort(-np.abs(chosen[kept]), kind="stable")
        signed = tested[kept] * np.where(chosen[kept] < 0, -1.0, 1.0)
        return cls(signed[order], max(1, min(tries, int(kept.sum()))))

    @property
    def weights(self) -> Float[np.ndarray, " n"]:
        """Probability that each latent is the best of its set."""
        n, k = len(self.values), self.tries
        return np.array([comb(n - rank, k - 1) / comb(n, k) for rank in range(1, n + 1)])

    def limit(self, quantile: float = 0.95) -> float:
        """What the best of `tries` random latents stays below in this share of sets; NaN without random latents."""
        if not len(self.values):
            return float("nan")
        order = np.argsort(self.values, kind="stable")
        reached = np.cumsum(self.weights[order])
        return float(self.values[order][min(int(np.searchsorted(reached, quantile - 1e-12)), len(order) - 1)])

    def p(self, value: float) -> float:
        """Share of sets whose best random latent reaches at least `value`."""
        return float(self.weights[self.values >= value].sum())
