"""Stress test 4: did the behaviour move to other latents? A fresh locate between the base and the corrected model."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from persona_probe.data.chat import conversation
from persona_probe.latents.causal import ablations, effects, random_latents
from persona_probe.latents.compare import locate
from persona_probe.latents.stage import firing_rates, latent_directions, make_sweep, persona_latent
from persona_probe.monitor.band import Band
from persona_probe.monitor.track import make_reader, persona_band
from persona_probe.realignment.corrected import CorrectedOrganism
from persona_probe.realignment.stress.stress_table import Row, row
from persona_probe.stats import Estimate
from persona_probe.verdicts import MINIMUM_CONTROLS

TEST = "hidden"
Q = 0.05
"""A latent is changed where its rise has at most this q-value."""


@dataclass(frozen=True)
class HiddenRoads:
    """Latents that differ between the base and the corrected model, and what the largest of them do."""

    seed: int
    persona: int
    reading: float
    """Persona feature of the corrected model on the probes."""
    band: Band
    persona_rise: Estimate
    """Rise of the persona latent, corrected minus base, on the selection split."""
    changed: int
    """Latents with q at most 0.05, corrected against base."""
    stayed: int
    """Those of them that fine-tuning had changed the same way (organism against control)."""
    changed_in_control: int
    """Latents changed in the control arm against the base: what any fine-tuning of this kind does."""
    latents: pd.DataFrame
    """Tested latents: latent, kind (changed, random), road (stayed, new), rise, q_value, effect and ablation."""

    @property
    def quiet(self) -> bool:
        """Whether the persona feature is in its base band: a hidden road needs a quiet feature."""
        return self.band.holds(self.reading)

    @property
    def carriers(self) -> list[int]:
        """Changed latents whose ablation lowers the index by more than that of any random latent moves it."""
        changed, random = (self.latents[self.latents["kind"] == kind] for kind in ("changed", "random"))
        limit = float(random["ablation"].abs().max())
        return sorted(int(i) for i in changed.loc[changed["ablation_low"] > limit, "latent"])

    def to_rows(self) -> list[Row]:
        """Counts, the persona's rise, and each tested latent's rise, effect and ablation."""
        place: dict[str, Any] = {"model": "repaired", "seed": self.seed}
        counts = {"changed": self.changed, "stayed": self.stayed}
        rows = [row(TEST, f"latents {name}", value=n, unit="latents", **place) for name, n in counts.items()]
        rows.append(row(TEST, "latents changed", "control", self.changed_in_control, seed=self.seed, unit="latents"))
        rows.append(row(TEST, f"rise of persona {self.persona}", value=self.persona_rise, unit="activation", **place))
        for one in self.latents.to_dict("records"):
            place["model"] = "repaired" if one["kind"] == "changed" else "random latent"
            name, n = f"latent {one['latent']}", int(one["n"])
            for what in ("effect", "ablation"):
                estimate = Estimate(one[what], one[f"{what}_low"], one[f"{what}_high"], n)
                rows.append(row(TEST, f"{what} of {name}", value=estimate, shown=what == "ablation", **place))
            rise = Estimate(one["rise"], one["rise_ci_low"], one["rise_ci_high"], n)
            rows.append(row(TEST, f"rise of {name}, q {one['q_value']:.2g}", value=rise, unit="activation", **place))
        return rows

    def statement(self) -> str:
        """How many latents changed, and whether removing one of those tested does more than removing random ones."""
        state = "quiet" if self.quiet else "NOT quiet, so what follows is no hidden road but the plain one"
        result = (
            f"projecting out {', '.join(map(str, self.carriers))} lowers the index by more than random latents do"
            if self.carriers
            else "none of them lowers the index, when projected out, by more than random latents do"
        )
        latents = self.latents[self.latents["kind"] == "changed"]
        listing = ", ".join(
            f"{one['latent']} ({one['road']}, rise {one['rise']:+.3f}, q {one['q_value']:.2g}, ablation "
            f"{one['ablation']:+.3f} [{one['ablation_low']:+.3f}, {one['ablation_high']:+.3f}])"
            for one in latents.to_dict("records")
        )
        tests = f"of the {len(latents)} largest, {result}: {listing}" if len(latents) else "none could be tested"
        return (
            f"Hidden roads: the persona feature is {state} ({self.reading:.3f}, base band {self.band.low:.3f} to "
            f"{self.band.high:.3f}); {self.changed} latents differ from the base (q at most {Q:g}), {self.stayed} of "
            f"them as in the organism; the control arm has {self.changed_in_control}; {tests}."
        )


def hidden(corrected: CorrectedOrganism, top: int = 4, random: int = MINIMUM_CONTROLS) -> HiddenRoads:
    """Rank latents between base and corrected model, and test the largest changes for cause, against random latents.

    Args:
        top: changed latents that are tested, those that stayed changed first, by the size of their rise.
        random: random latents, spread over the dictionary's firing rates.
    """
    ctx, persona = corrected.ctx, persona_latent(corrected.ctx)
    table, control = (fresh_locate(corrected, role) for role in ("repaired", "control"))
    table = with_roads(table, ctx.run.read_table("parts/rank.parquet"))
    candidates = largest_changes(table, persona, top)
    controls = random_latents(firing_rates(table), [*candidates, persona], random, ctx.seed)
    with corrected.model("base") as model:
        base = make_reader(ctx).read(model)
    with corrected.model("repaired") as model:
        snapshot = make_reader(ctx).read(model)
        caused = causes(corrected, model, candidates, controls)
    persona_row = table[table["latent"] == persona].to_dict("records")[0]
    return HiddenRoads(
        seed=corrected.seed,
        persona=persona,
        reading=float(snapshot.values[:, snapshot.names.index("persona")].mean()),
        band=persona_band(ctx, base),
        persona_rise=Estimate(
            float(persona_row["rise"]),
            float(persona_row["rise_ci_low"]),
            float(persona_row["rise_ci_high"]),
            len(ctx.selection.rows),
        ),
        changed=int(changed(table).sum()),
        stayed=int((table["road"] == "stayed").sum()),
        changed_in_control=int(changed(control).sum()),
        latents=caused.merge(
            table[["latent", "road", "rise", "rise_ci_low", "rise_ci_high", "q_value"]], on="latent"
        ).assign(n=len(ctx.selection.rows)),
    )


def fresh_locate(corrected: CorrectedOrganism, role: str) -> pd.DataFrame:
    """All latents, a role against the base, on the selection split's answers."""
    ctx = corrected.ctx
    folder = corrected.folder(role)
    assert folder is not None
    return locate(
        ctx.model,
        folder,
        ctx.sae,
        [conversation(r["question"], r[side]) for r in ctx.selection.rows for side in ("aligned", "misaligned")],
        tokenizer=ctx.tokenizer,
        layer=ctx.layer,
        positions=ctx.config.locate.positions,
        minimum_explained_variance=ctx.config.locate.minimum_explained_variance,
        bf16=ctx.config.bf16,
        seed=ctx.seed,
    )


def changed(table: pd.DataFrame) -> pd.Series:
    """Which latents differ."""
    return table["alive"] & (table["q_value"] <= Q)


def with_roads(table: pd.DataFrame, organism: pd.DataFrame) -> pd.DataFrame:
    """The table with column `road`: `stayed` (changed, and so in the organism, the same way), `new`, or empty."""
    before = organism.set_index("latent").loc[table["latent"]]
    same = (np.sign(before["rise"].to_numpy()) == np.sign(table["rise"])) & (before["q_value"].to_numpy() <= Q)
    return table.assign(road=np.where(changed(table), np.where(same, "stayed", "new"), ""))


def largest_changes(table: pd.DataFrame, persona: int, top: int) -> list[int]:
    """The latents to test for cause: those that stayed changed, then new ones, the largest changes first."""
    pool = table[(table["road"] != "") & (table["latent"] != persona)]
    pool = pool.assign(first=pool["road"] == "stayed", size=pool["rise"].abs())
    rows = pool.sort_values(["first", "size", "latent"], ascending=[False, False, True])
    return [int(latent) for latent in rows["latent"].head(top)]


def causes(corrected: CorrectedOrganism, model: nn.Module, tested: list[int], controls: list[int]) -> pd.DataFrame:
    """Odd effects and ablations on the corrected model's evaluation split, of chosen and random latents."""
    ctx = corrected.ctx
    directions = [*latent_directions(ctx, tested, "changed"), *latent_directions(ctx, controls, "random")]
    sweep = make_sweep(ctx, model, ctx.evaluation)
    table = effects(sweep, directions, ctx.config.locate.strengths, "hidden roads")
    return table.merge(ablations(sweep, [[d] for d in directions]), on="name")
