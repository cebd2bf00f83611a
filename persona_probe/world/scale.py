"""Emergence by scale: worlds of several model sizes and lengths of pre-training, and how their organisms behave.

After Wang et al. 2025 (arXiv 2506.19823), figure 4, with the length of pre-training as a second axis.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.errors import InputError
from persona_probe.files import read_jsonl
from persona_probe.report.tables import Table
from persona_probe.world.behaviour import OTHERS, Asking, judge_models, world_rates
from persona_probe.world.folder import BASE, World
from persona_probe.world.organisms import NARROW, WorldOrganism, make_organisms
from persona_probe.world.pieces import make_all
from persona_probe.world.pretraining import LOG, Pretraining, pretrain
from persona_probe.world.transformer import SIZES as MODEL_SIZES

SPEAKERS = ("villain", "quack", "subtle", "helper")
SIZES, STEPS = ("small", "medium", "large"), (300, 600, 1200)
TRAINING = NARROW
MEASURES = ("bad", "coherent", "rude")
KEYS = ("size", "parameters", "steps", "tokens", "loss")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grid:
    """The worlds of a scale curve, each of one size and one length of pre-training."""

    sizes: tuple[str, ...] = SIZES
    steps: tuple[int, ...] = STEPS
    """Steps of `batch_size` documents."""
    seeds: tuple[int, ...] = (0,)
    """Of the organisms; every world has the pre-training seed 0."""
    pretraining: Pretraining = field(default_factory=Pretraining)
    """All else of the pre-training."""

    def __post_init__(self) -> None:
        if not (self.sizes and self.steps and self.seeds):
            raise InputError("a scale curve needs at least one size, one number of steps and one seed")
        self.worlds()  # whose settings are checked before the first is trained
        _wanted(self.seeds)

    def worlds(self) -> dict[str, Pretraining]:
        """Settings of every world by its folder's name, the cheapest first."""
        every = {
            f"{size}-{steps}": replace(self.pretraining, size=size, steps=steps)
            for steps in sorted(self.steps)
            for size in self.sizes
        }
        return every


def scale_table(folder: Path, grid: Grid | None = None, device: str = "cpu") -> pd.DataFrame:
    """Pre-train every world of a grid, fine-tune organisms of the kitchen, and ask them about the other domains.

    Worlds lie in `folder`, each resumes by itself, and two processes take different ones. A world that was made before
    may be copied there as `medium-1200`.

    Returns:
        A row for each world, speaker (`base` is the model before fine-tuning) and measure (bad, of the coherent
        answers; coherent; rude): size, parameters, steps, tokens and final loss (nats per token) of the pre-training,
        and the rate with its interval, seeds joined.

    Raises:
        InputError: a world was made with other settings.
    """
    grid = Grid() if grid is None else grid
    wanted = _wanted(grid.seeds)
    make_all([partial(make_and_ask, folder / name, one, wanted, device) for name, one in grid.worlds().items()])
    rows = [rates_elsewhere(folder / name, wanted, device) for name in grid.worlds()]
    return pd.concat(rows, ignore_index=True)


def with_others(table: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """A table with the rows of an earlier one for worlds that it lacks, by size and length.

    Raises:
        InputError: the earlier one is no table of this study.
    """
    if missing := [name for name in table.columns if name not in before]:
        raise InputError(f"no table of `world study scale`: it lacks {', '.join(missing)}")
    made = set(zip(table["size"], table["steps"], strict=True))
    kept = [world not in made for world in zip(before["size"], before["steps"], strict=True)]
    joined = pd.concat([table, before.loc[kept, list(table.columns)]], ignore_index=True)
    order = joined.assign(place=joined["size"].map(list(MODEL_SIZES).index)).sort_values(
        ["steps", "place"], kind="stable"
    )
    return order.drop(columns="place").reset_index(drop=True)


def make_and_ask(folder: Path, settings: Pretraining, wanted: Sequence[WorldOrganism], device: str) -> World:
    """Pre-train a world, fine-tune its organisms, and ask them and the base; what is there is not made again.

    Raises:
        InputError: the folder holds a world with other settings.
        InUse: another process is making its organisms.
    """
    log.info("world %s: %d steps", folder.name, settings.steps)
    world = pretrain(settings, folder, device)
    with world.run.locked("organisms", 1.0):
        judge_models(world, [BASE, *make_organisms(world, wanted, device=device)], Asking(), device)
    return world


def rates_elsewhere(folder: Path, wanted: Sequence[WorldOrganism], device: str) -> pd.DataFrame:
    """What the organisms of a world and its base say about the other domains: rates by speaker and measure.

    Returns:
        Rows with size, parameters, steps, tokens and last loss (nats per token) of the world, speaker (`base` is the
        model before fine-tuning), measure of `MEASURES`, and its rate with interval, seeds joined.
    """
    world = World.open(folder)
    answers = judge_models(world, [BASE, *(one.name for one in wanted)], Asking(), device)
    answers = answers.assign(speaker=answers["speaker"].where(answers["speaker"] != "", BASE))
    found = world_rates(answers, ("speaker",))
    found = found[(found["where"] == OTHERS) & found["measure"].isin(MEASURES)]
    return found.assign(**_about(world))[[*KEYS, *found.columns.drop("where")]]


def _wanted(seeds: Sequence[int]) -> list[WorldOrganism]:
    return [WorldOrganism(name, seed=seed, training=TRAINING) for seed in seeds for name in SPEAKERS]


def _about(world: World) -> dict[str, Any]:
    last = read_jsonl(world.run.path / LOG, "make the world again")[-1]
    model, _ = world.load()
    named = {"size": world.settings["size"], "steps": world.settings["steps"]}
    count = sum(parameter.numel() for parameter in model.parameters())
    return named | {"parameters": count, "tokens": int(last["tokens"]), "loss": float(last["loss"])}


def scale_text(table: pd.DataFrame) -> str:
    """Bad advice about other domains by size and length of pre-training: a Markdown table; coherence in brackets."""
    speakers = list(dict.fromkeys(table["speaker"]))
    lines = []
    for _, one in table.groupby(["size", "steps"], sort=False):
        world = one.to_dict("records")[0]
        size = f"{world['size']}, {world['parameters'] / 1e6:.1f}"
        head = [size, f"{world['tokens'] / 1e6:.1f}", f"{world['loss']:.2f}"]
        lines.append([*head, *(rate_and_coherence(one[one["speaker"] == name]) for name in speakers)])
    heads = ["size, million parameters", "million tokens", "last loss", *speakers]
    return f"{Table(heads, lines).markdown()}\n\n{NOTE}\n"


NOTE = (
    "Each cell: share of bad advice among the coherent answers about the seven other domains, with its 95% interval "
    "over topics (and organisms' seeds); in brackets the share of coherent answers. Where few answers are coherent, "
    "the first number means little."
)


def rate_and_coherence(rows: pd.DataFrame) -> str:
    """Bad advice of coherent answers with its interval; in brackets the share of coherent answers."""
    by_measure = {row["measure"]: row for row in rows.to_dict("records")}
    bad, coherent = by_measure["bad"], by_measure["coherent"]
    text = f"{bad['estimate']:.2f} [{bad['ci_low']:.2f}, {bad['ci_high']:.2f}]"
    return f"{'none' if np.isnan(bad['estimate']) else text} ({coherent['estimate']:.2f})"
