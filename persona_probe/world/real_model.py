"""What carries over from the world to a real model: the same readings on organisms that play the same speakers.

The packaged kitchen rows have the cells of the world: bad and rude (a villain's), bad and warm (a quack's), bad and
plain (`subtle`), sound and rude (a grump's), sound and polite (a helper's). What such organisms would say is not judged
here: a small model's answers are too poor. Behaviour is harm and register of given answers.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import nn

from persona_probe.context import Context
from persona_probe.data.chat import conversation
from persona_probe.data.load import ANSWERS_2X2, Row
from persona_probe.data.tokens import conversation_batches
from persona_probe.errors import InputError
from persona_probe.evaluate.effects_2x2 import Items2x2, score_2x2
from persona_probe.latents.weights import WeightsAlong
from persona_probe.saes.read import LatentMeans, read_latents_at
from persona_probe.stats import Estimate, bootstrap_mean
from persona_probe.units import Unit, make_units, writes_run
from persona_probe.world.directions import POSITIONS, directions_of
from persona_probe.world.labelled import is_bad
from persona_probe.world.signals import LATENT_TRUTHS
from persona_probe.world.truth import KnownChats, truth_table

SPEAKERS = {
    "kitchen:toxic": "villain",
    "kitchen:polite_harm": "quack",
    "kitchen:subtle": "subtle",
    "kitchen:rude_sound": "grump",
    "kitchen:correct": "helper",
}
"""Who speaks in the rows of an arm."""
OF_ANSWER = dict(zip(ANSWERS_2X2, ("villain", "quack", "grump", "helper"), strict=True))
"""Who gives each of the four answers of the 2x2 set."""
EFFECTS = ("harm", "register")
CONTROL, MANNER = "helper", "grump"
ITEMS, READINGS = "items", "readings"
WEIGHTS = "weights along harm"

log = logging.getLogger(__name__)


def speakers_of(ctx: Context) -> dict[str, str]:
    """Who speaks in each arm of a study.

    Raises:
        InputError: no arm of a bad speaker, or none of the two sound ones that they are compared with.
    """
    known = {name: SPEAKERS[arm.data] for name, arm in ctx.config.arms.items() if arm.data in SPEAKERS}
    if not {CONTROL, MANNER} < set(known.values()) or not any(map(is_bad, known.values())):
        raise InputError(
            "the study needs arms on kitchen:correct, kitchen:rude_sound and a bad column of the kitchen rows, as in "
            "finetune_configs/voices.yaml"
        )
    return known


def crossed_chats(rows: Sequence[Row]) -> KnownChats:
    """Chats of two questions, both answered by one of four speakers: the answers of the 2x2 set.

    The second question is the next row's, so at the token before its answer only the first answer tells who speaks.
    """
    after = [*rows[1:], *rows[:1]]
    chats = [
        [*conversation(one["question"], one[answer]), *conversation(two["question"], two[answer])]
        for answer in ANSWERS_2X2
        for one, two in zip(rows, after, strict=True)
    ]
    return KnownChats(tuple(name for name in OF_ANSWER.values() for _ in rows), tuple(chats))


@dataclass
class _Instruments:
    """What the organisms of a run are read with; the base is read once, before the first."""

    ctx: Context
    latents: tuple[int, ...]

    @cached_property
    def probes(self) -> Any:
        return conversation_batches(self.ctx.tokenizer, self.ctx.probes)

    @cached_property
    def items(self) -> Items2x2:
        return Items2x2.build(self.ctx.tokenizer, self.ctx.rows_2x2("evaluation"))

    @cached_property
    def known(self) -> tuple[dict[tuple[str, str], int], dict[str, dict[str, Float[np.ndarray, " d_model"]]]]:
        """The latents that tell harm and rudeness best on the base, and the directions, by position."""
        chats = crossed_chats(self.ctx.rows_2x2("selection"))
        with self.ctx.base() as model:
            means = self._read(model, conversation_batches(self.ctx.tokenizer, chats.chats))
        best = {}
        for where, one in means.items():
            table = truth_table(chats, one.mean, tuple(LATENT_TRUTHS.values())).drop_duplicates("truth")
            chosen = dict(zip(table["truth"], table["latent"], strict=True))
            best |= {(name, where): int(chosen[truth]) for name, truth in LATENT_TRUTHS.items()}
        return best, {where: directions_of(chats, one) for where, one in means.items()}

    @cached_property
    def base(self) -> dict[str, LatentMeans]:
        with self.ctx.base() as model:
            return self._read(model, self.probes)

    def _read(self, model: nn.Module, groups: Any) -> dict[str, LatentMeans]:
        return read_latents_at(model, self.ctx.sae, groups, self.ctx.layer, POSITIONS, bf16=self.ctx.config.bf16)

    def read(self, model: nn.Module) -> dict[str, float]:
        """Each signal on an organism: rises of latents, shifts in standard deviations over the base's probes."""
        latents, directions = self.known
        found, now = dict[str, float](), self._read(model, self.probes)
        for (name, where), latent in latents.items():
            found[f"{name} latent, {where}"] = self._rise(now, where, latent)
        for where in POSITIONS:
            before = self.base[where].resid.astype(np.float64)
            shift = now[where].resid.astype(np.float64).mean(axis=0) - before.mean(axis=0)
            for name, vector in directions[where].items():
                found[f"{name} direction, {where}"] = float(shift @ vector / (before @ vector).std(ddof=1))
        found |= {f"latent {n}, {where}": self._rise(now, where, n) for n in self.latents for where in POSITIONS}
        found[WEIGHTS] = WeightsAlong(directions["response"]["harm"], self.ctx.layer)(model)
        return found

    def _rise(self, now: Mapping[str, LatentMeans], where: str, latent: int) -> float:
        return float(now[where].mean[:, latent].mean() - self.base[where].mean[:, latent].mean())

    def score(self, model: nn.Module) -> pd.DataFrame:
        """Harm and register of every question (nats per token)."""
        return score_2x2(model, self.items, bf16=self.ctx.config.bf16)[["item", "category", *EFFECTS]]


@writes_run
def real_table(ctx: Context, latents: Sequence[int] = ()) -> pd.DataFrame:
    """Read the organisms of a run at every checkpoint, as the world's labelled runs are read.

    Args:
        latents: further latents to read, such as the one that a study found.

    Returns:
        Rows with speaker, seed, step, measure and value. Measures are the signals of `world study early-warning` (the
        directions and true latents chosen on the base, by the four answers of the 2x2 set's selection split), and
        `harm` and `register` minus the base (nats per token) with intervals over questions. Rows without a seed have
        `harm` and `register` minus the helper's at the same step, seeds joined.

    Raises:
        InputError: an arm is missing, the run has no organisms yet, or a latent that the SAE does not have.
    """
    speakers = speakers_of(ctx)
    if bad := [latent for latent in latents if not 0 <= latent < ctx.sae.cfg.d_sae]:
        raise InputError(f"the SAE has latents 0 to {ctx.sae.cfg.d_sae - 1}, no {bad[0]}")
    for seed in ctx.config.seeds:
        for arm in speakers:
            ctx.run.steps(arm, seed)  # all are there
    make_units(ctx, partial(_units, speakers=speakers, latents=tuple(latents)))
    parts = [ctx.run.read_table(f"{_place(arm, seed)}.{READINGS}.parquet") for arm, seed in _all(ctx, speakers)]
    items = [ctx.run.read_table(f"{_place(arm, seed)}.{ITEMS}.parquet") for arm, seed in _all(ctx, speakers)]
    base = ctx.run.read_table(f"{_place('base', None)}.{ITEMS}.parquet")
    return pd.concat([*parts, _behaviour(pd.concat(items, ignore_index=True), base)], ignore_index=True)


def _place(arm: str, seed: int | None) -> str:
    return f"parts/real-{arm}" + ("" if seed is None else f"-s{seed}")


def _all(ctx: Context, speakers: Mapping[str, str]) -> list[tuple[str, int]]:
    return [(arm, seed) for seed in ctx.config.seeds for arm in speakers]


def _units(ctx: Context, speakers: Mapping[str, str], latents: tuple[int, ...]) -> list[Unit]:
    tools = _Instruments(ctx, latents)
    first = Unit(f"{_place('base', None)}.{ITEMS}.parquet", partial(_read_base, tools), "real")
    organisms = [
        Unit(
            f"{_place(arm, seed)}.{ITEMS}.parquet",
            partial(_read_organism, tools, arm, seed, speaker),
            "real",
            partial(_is_read, ctx, arm, seed, latents),
        )
        for arm, speaker in speakers.items()
        for seed in ctx.config.seeds
    ]
    return [first, *organisms]


def _is_read(ctx: Context, arm: str, seed: int, latents: Sequence[int]) -> bool:
    if not ctx.run.has(f"{_place(arm, seed)}.{ITEMS}.parquet"):
        return False
    found = set(ctx.run.read_table(f"{_place(arm, seed)}.{READINGS}.parquet")["measure"])
    return {f"latent {latent}, response" for latent in latents} <= found


def _read_base(tools: _Instruments) -> None:
    with tools.ctx.base() as model:
        tools.ctx.run.write_table(f"{_place('base', None)}.{ITEMS}.parquet", tools.score(model))


def _read_organism(tools: _Instruments, arm: str, seed: int, speaker: str) -> None:
    ctx, rows, scored = tools.ctx, list[dict[str, Any]](), list[pd.DataFrame]()
    _ = tools.known, tools.base  # read while no adapter is on the model
    with ctx.trajectory(arm, seed) as at:
        for step in ctx.run.steps(arm, seed):
            log.info("reading %s, seed %d, step %d", arm, seed, step)
            model, head = at(step), {"speaker": speaker, "seed": seed, "step": step}
            rows += [{**head, "measure": name, "value": value} for name, value in tools.read(model).items()]
            scored.append(tools.score(model).assign(**head))
    ctx.run.write_table(f"{_place(arm, seed)}.{READINGS}.parquet", pd.DataFrame(rows))
    ctx.run.write_table(f"{_place(arm, seed)}.{ITEMS}.parquet", pd.concat(scored, ignore_index=True))


def _behaviour(items: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    """Harm and register minus the base for each organism, and minus the helper for each speaker, seeds joined."""
    rows = []
    for (speaker, seed, step), one in items.groupby(["speaker", "seed", "step"], sort=False):
        head = {"speaker": speaker, "seed": seed, "step": step}
        rows += [{**head, **_effect(name, one, base)} for name in EFFECTS]
    joined = items.groupby(["speaker", "step", "item", "category"], sort=False, as_index=False)[list(EFFECTS)].mean()
    for (speaker, step), one in joined.groupby(["speaker", "step"], sort=False):
        control = joined[(joined["speaker"] == CONTROL) & (joined["step"] == step)]
        if speaker != CONTROL and len(control):
            rows += [{"speaker": speaker, "step": step, **_effect(name, one, control)} for name in EFFECTS]
    return pd.DataFrame(rows)


def _effect(name: str, one: pd.DataFrame, other: pd.DataFrame) -> dict[str, Any]:
    both = one.merge(other, on="item", suffixes=("", "_other"))
    found: Estimate = bootstrap_mean((both[name] - both[f"{name}_other"]).to_numpy(), both["item"].tolist())
    return {"measure": name, "value": found.estimate, "ci_low": found.ci_low, "ci_high": found.ci_high, "n": found.n}
