"""Causal effects from a sweep: the strength that each direction bears, odd parts, ablation, sets of latents."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from persona_probe.locate.sweep import Direction, Sweep
from persona_probe.stats import Estimate, bootstrap_mean


def bearable(
    sweep: Sweep, directions: Sequence[Direction], strengths: Sequence[float], refine: int = 0
) -> dict[str, float]:
    """The largest strength at which both signs of a push keep neutral perplexity within the sweep's bound.

    The grid is tried from above, for all directions together; then `refine` bisections (in log strength) between the
    last strength that held and the next of the grid that did not. NaN where no strength of the grid holds.
    """
    grid = sorted(strengths, reverse=True)
    found: dict[str, float] = {}
    for strength in grid:
        pending = [d for d in directions if d.name not in found]
        held = sweep.within_bound(pending, strength) if pending else []
        found |= {d.name: strength for d, ok in zip(pending, held, strict=True) if ok}
    above = {low: high for high, low in pairwise(grid)}
    limits = {d.name: above[found[d.name]] for d in directions if found.get(d.name) in above}
    for _ in range(refine if limits else 0):
        _bisect(sweep, [d for d in directions if d.name in limits], found, limits)
    return {d.name: found.get(d.name, float("nan")) for d in directions}


def _bisect(sweep: Sweep, directions: Sequence[Direction], low: dict[str, float], high: dict[str, float]) -> None:
    for direction in directions:
        middle = float(np.sqrt(low[direction.name] * high[direction.name]))
        held = sweep.within_bound([direction], middle)[0]
        (low if held else high)[direction.name] = middle


def effects(
    sweep: Sweep, directions: Sequence[Direction], strengths: Sequence[float], label: str, refine: int = 0
) -> pd.DataFrame:
    """Causal effects of many directions, each at the largest strength that it bears.

    The effect is the odd part of the contrast index, (index at +strength - index at -strength) / 2, with its bootstrap
    interval over questions, in nats per token: damage, which both signs do, cancels.

    Returns:
        Columns name, kind, latent, effect, effect_low, effect_high, strength; NaN where no strength holds.
    """
    strength = bearable(sweep, directions, strengths, refine)
    bearing = [d for d in directions if np.isfinite(strength[d.name])]
    sweep.push_all([(d, sign * strength[d.name]) for d in bearing for sign in (1, -1)], label)
    odd = {d.name: sweep.odd_values(d, strength[d.name]) for d in bearing}
    return pd.DataFrame([_row(d, odd.get(d.name), sweep.items.clusters, strength[d.name]) for d in directions])


def _row(direction: Direction, odd: np.ndarray | None, clusters: Sequence[str], strength: float) -> dict[str, Any]:
    effect = None if odd is None else bootstrap_mean(odd, clusters)
    row = {"name": direction.name, "kind": direction.kind, "latent": direction.latent}
    return {**row, **columns("effect", effect), "strength": strength}


def columns(name: str, estimate: Estimate | None) -> dict[str, float]:
    """An estimate as the columns `name`, `name_low`, `name_high`; NaN without one."""
    values = (estimate.estimate, estimate.ci_low, estimate.ci_high) if estimate else (np.nan,) * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def ablations(sweep: Sweep, spans: Sequence[Sequence[Direction]]) -> pd.DataFrame:
    """How far the contrast index falls when directions are projected out: unsteered minus ablated, with intervals.

    Args:
        spans: one or several directions each; several are projected out together.

    Returns:
        Columns name, ablation, ablation_low, ablation_high (nats per token; positive is repair).
    """
    rows = []
    for span in tqdm(spans, desc="projecting out"):
        fall = bootstrap_mean(sweep.unsteered - sweep.ablate(span), sweep.items.clusters)
        rows.append({"name": joint(span).name if len(span) > 1 else span[0].name, **columns("ablation", fall)})
    return pd.DataFrame(rows)


def exceeds_random(low: Mapping[int, float], random: Sequence[float], quantile: float = 0.95) -> set[int]:
    """Latents whose interval lies wholly above what random latents do (that quantile of their effects' sizes).

    Args:
        low: latent to the lower end of its effect's interval.
        random: the random latents' effects; only their size counts.
    """
    sizes = np.abs(np.asarray(random, dtype=np.float64))
    sizes = sizes[np.isfinite(sizes)]
    if not sizes.size:
        return set()
    limit = float(np.quantile(sizes, quantile))
    return {latent for latent, value in low.items() if value > limit}


def joint(directions: Sequence[Direction]) -> Direction:
    """The sum of unit vectors, pushed with the same norm as a single direction."""
    vector = torch.stack([d.vector / d.vector.norm() for d in directions]).sum(dim=0)
    name = " + ".join(str(d.latent) if d.latent >= 0 else d.name for d in directions)
    return Direction(f"set {name}", "set", vector)


def greedy_sets(
    sweep: Sweep, directions: Sequence[Direction], size: int, strengths: Sequence[float]
) -> list[list[Direction]]:
    """Sets of 1, 2, ... `size` latents, each with the next latent that raises their joint effect the most.

    The search is on `sweep`'s own items (the selection split); measure the sets on the evaluation split. Every set is
    pushed with the same norm, so a set wins by its direction and not by its size.
    """
    chosen: list[Direction] = []
    sets = []
    while len(chosen) < min(size, len(directions)):
        names = {d.name for d in chosen}
        options = [d for d in directions if d.name not in names]
        together = [joint([*chosen, d]) for d in options]
        scored = effects(sweep, together, strengths, f"sets of {len(chosen) + 1}")["effect"].fillna(-np.inf)
        chosen = [*chosen, options[int(scored.to_numpy().argmax())]]
        sets.append(chosen)
    return sets
