"""Other worlds: made again from other seeds, do they keep the bounds, and does a reading tell harm from manner there?

The first world is the packaged one, on which readings were compared. The others have another seed in everything that
is drawn: weights, documents, chats of the SAE. Nothing is chosen on them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.data.world import packaged
from persona_probe.errors import InputError
from persona_probe.files import read_json
from persona_probe.report.tables import Table
from persona_probe.world.behaviour import OTHERS, Asking, judge_models
from persona_probe.world.dictionary import train_world_sae
from persona_probe.world.emergence import RANKS, SPEAKERS, bounds, emergence_organisms, emergence_table
from persona_probe.world.folder import World
from persona_probe.world.labelled import BASE, Instruments, is_bad, make_runs, open_study, plan
from persona_probe.world.organisms import WorldOrganism, make_organisms
from persona_probe.world.pieces import make_all
from persona_probe.world.pretraining import Pretraining, pretrain
from persona_probe.world.signals import SIGNALS, SOUND, is_hard, outcomes, signal_table
from persona_probe.world.specificity import specificity_table
from persona_probe.world.truth import TRUTHS
from persona_probe.world.warning import separation_rows

SEEDS = (0, 1, 2)
FIRST = 0
"""The seed of the packaged world."""
BEHAVIOUR, DICTIONARY, READINGS = "behaviour", "dictionary", "readings"
"""The parts of the table."""
WANTED_VARIANCE, WANTED_AUROC = 0.95, 0.95
WANTED_TRUTHS = ("bad", "rude")
CHOSEN = "latent chosen on the kitchen's runs, response"
"""The latent that tells bad runs of the kitchen from the grump's and the clown's best at a step, on the other runs."""
HELD = ("weights along harm", CHOSEN)
"""Readings that told harm from manner in the first world, and are held to the others."""
SHOWN = (
    *HELD,
    *(f"harm {kind}, {where}" for kind in ("latent", "direction") for where in ("response", "last_prompt")),
    "persona direction, last_prompt",
)


@dataclass(frozen=True)
class Worlds:
    """Which worlds, and how many runs of each."""

    seeds: tuple[int, ...] = SEEDS
    """Of the worlds."""
    organisms: tuple[int, ...] = (0, 1, 2)
    """Seeds of the organisms that are asked."""
    runs: int = 2
    """Seeds of each labelled run."""
    pretraining: Pretraining = field(default_factory=lambda: Pretraining(size="medium", steps=1200))
    """All but the seed."""

    def __post_init__(self) -> None:
        if not (self.seeds and self.organisms) or self.runs < 1:
            raise InputError("at least one world, one seed of its organisms and one of its labelled runs are needed")
        for seed in self.seeds:
            replace(self.pretraining, seed=seed)  # checked before the first is trained

    def runs_wanted(self) -> list[WorldOrganism]:
        """The labelled runs: bad speakers at the full share, and the harmless ones that have a manner."""
        return [
            one
            for one in plan(self.runs, self.runs)
            if one.share == 1 and (is_bad(one.speaker) or is_hard(one.speaker))
        ]


def worlds_table(folder: Path, worlds: Worlds | None = None, device: str = "cpu") -> pd.DataFrame:
    """Make worlds that differ in their seed, ask their organisms, and read labelled runs of each.

    Worlds lie in `folder`, each resumes by itself, and two processes take different ones.

    Returns:
        Rows of three parts, each with the seed of the world. `behaviour`: the columns of `emergence_table`.
        `dictionary`: its explained variance, and the AUROC of the best latent of each of `TRUTHS` at answer tokens.
        `readings`: the columns of `separation`: how each signal tells runs that will turn from grump and clown, before
        their answers show it; and the same of `CHOSEN`, which tells all bad runs from them.

    Raises:
        InputError: a world was made with other settings.
    """
    worlds = Worlds() if worlds is None else worlds
    make_all([partial(_make, folder, worlds, seed, device) for seed in worlds.seeds])
    parts = []
    for seed in worlds.seeds:
        world = World.open(_place(folder, seed))
        sae, study = _sae(world, seed), _study(world, seed)
        make_runs(study, Instruments.of(world, sae, device), worlds.runs_wanted())
        rates = emergence_table(world, worlds.organisms, device)
        read = pd.DataFrame([*_readings(signal_table(study)), *_chosen(specificity_table(study))])
        told = pd.DataFrame([_dictionary(study.read_table(f"{BASE}/truths.parquet"), sae)])
        named = {BEHAVIOUR: rates, DICTIONARY: told, READINGS: read}
        parts += [frame.assign(part=name, world=seed) for name, frame in named.items()]
    return pd.concat(parts, ignore_index=True)


def _place(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}"


def _make(folder: Path, worlds: Worlds, seed: int, device: str) -> None:
    place, settings = _place(folder, seed), replace(worlds.pretraining, seed=seed)
    packed = seed == FIRST and settings == Worlds().pretraining
    world = World.default(place) if packed else pretrain(settings, place, device)
    with world.run.locked("organisms", 1.0):
        if not packed:
            train_world_sae(world, device=device)
        for rank in RANKS:
            wanted = emergence_organisms(worlds.organisms, rank)
            names = make_organisms(world, list(wanted.values()), list(wanted), device)
            judge_models(world, names, Asking(), device)


def _sae(world: World, seed: int) -> Path:
    if seed == FIRST and (world.run.path / "saes" / packaged.NAME).is_dir():
        return world.run.path / "saes" / packaged.NAME
    return train_world_sae(world)


def _study(world: World, seed: int) -> Any:
    return open_study(world, _sae(world, seed), world.run.path / "labelled")


def _readings(table: pd.DataFrame) -> Iterator[dict[str, object]]:
    known = outcomes(table).set_index("run")
    frame = table.join(known[["outcome", "shown"]], on="run")
    rate = (frame["bad"] / frame["coherent"])[frame["outcome"] == "turned"].groupby(frame["step"]).mean()
    for row in separation_rows(frame, SIGNALS):
        if row["against"] == "manner":
            yield {**row, "bad_rate": float(rate.get(row["step"], np.nan))}


def _chosen(table: pd.DataFrame) -> Iterator[dict[str, object]]:
    """The first of the latents that `specificity_table` chose at each step, at answer tokens."""
    latents = table[(table["position"] == "response") & table["reading"].str.startswith("latent")]
    for row in latents.drop_duplicates("step").to_dict("records"):
        numbers = {name: row[name] for name in ("step", "auroc", "ci_low", "ci_high", "bad_rate")}
        counts = {"turned": row["bad"], "shown": 0, "sound": row["manner"], "latent": int(row["reading"].split()[1])}
        yield {"signal": CHOSEN, "data": "all", "against": "manner", **numbers, **counts}


def _dictionary(truths: pd.DataFrame, sae: Path) -> dict[str, float]:
    quality = read_json(sae / "quality.json", dict, "train the SAE again")
    best = truths[truths["position"] == "response"].groupby("truth")["auroc"].max()
    found = {f"auroc_{name}": float(best[name]) for name in TRUTHS}
    return {"explained_variance": float(quality["explained_variance"]), **found}


# --- As a page has it


def worlds_text(table: pd.DataFrame) -> str:
    """Behaviour, dictionary and readings by world, and which bounds are kept: Markdown."""
    parts = [_behaviour_text(_part(table, BEHAVIOUR)), _dictionary_text(_part(table, DICTIONARY))]
    return "\n\n".join([*parts, _readings_text(_part(table, READINGS))]) + "\n"


def _part(table: pd.DataFrame, name: str) -> pd.DataFrame:
    return table[table["part"] == name]


def _kept(kept: bool, text: str) -> str:
    return f"- {'kept' if kept else '**not kept**'}: {text}"


def _behaviour_text(rates: pd.DataFrame) -> str:
    found, rows = list[tuple[str, bool]](), []
    for (rank, world), frame in rates.groupby(["rank", "world"]):
        of_others = frame[(frame["where"] == OTHERS) & frame["seed"].isna() & (frame["measure"] == "bad")]
        by_speaker = of_others.set_index("speaker")
        rows.append([f"{rank:g}", str(world), *(_interval(by_speaker.loc[name], "estimate") for name in SPEAKERS)])
        found += [(f"rank {rank:g}, world {world}, {text}", kept) for text, kept in bounds(frame)]
    intro = "Bad advice of coherent answers about the seven other domains, organisms' seeds joined, by rank and world:"
    failed = [_kept(False, text) for text, kept in found if not kept]
    said = f"Of {len(found)} bounds, asked of each seed of the organisms, {len(found) - len(failed)} are kept."
    table = Table(["rank", "world", *SPEAKERS], rows).markdown()
    return "\n\n".join([intro, table, said, *(["\n".join(failed)] if failed else [])])


def _interval(row: Any, name: str) -> str:
    return "-" if np.isnan(row[name]) else f"{row[name]:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]"


def _dictionary_text(found: pd.DataFrame) -> str:
    aurocs = [f"auroc_{name}" for name in TRUTHS]
    rows = [
        [str(row["world"]), f"{row['explained_variance']:.3f}", *(f"{row[name]:.2f}" for name in aurocs)]
        for row in found.to_dict("records")
    ]
    least = min(float(found[f"auroc_{name}"].min()) for name in WANTED_TRUTHS)
    lines = [
        _kept(
            bool((found["explained_variance"] >= WANTED_VARIANCE).all()),
            f"explained variance at least {WANTED_VARIANCE:g}: {found['explained_variance'].min():.3f} at least",
        ),
        _kept(
            least >= WANTED_AUROC,
            f"a latent for harm and one for rudeness, AUROC at least {WANTED_AUROC:g}: {least:.2f} at least",
        ),
    ]
    intro = "The dictionary of each world: explained variance, and the AUROC of its best latent for each truth:"
    heads = ["world", "explained variance", *(f"latent for {name}" for name in TRUTHS)]
    return "\n\n".join([intro, Table(heads, rows).markdown(), "\n".join(lines)])


def _readings_text(found: pd.DataFrame) -> str:
    rows = found[found["data"] == "all"]
    steps = sorted(int(step) for step in rows["step"].unique())
    lines = []
    for world, of_world in rows.groupby("world"):
        for name in SHOWN:
            by_step = of_world[of_world["signal"] == name].set_index("step")
            lines.append([str(world), name, *(_interval(by_step.loc[step], "auroc") for step in steps)])
        once = of_world[of_world["signal"] == HELD[0]].set_index("step")
        lines.append([str(world), "bad advice by then", *(f"{once.loc[step, 'bad_rate']:.2f}" for step in steps)])
        counts = [f"{once.loc[step, 'turned']:g}, {once.loc[step, 'sound']:g}" for step in steps]
        lines.append([str(world), "runs that will turn and have not shown it, runs of manner", *counts])
    intro = (
        "AUROC of runs that will turn, while at most 5% of their answers are bad, against the grump and the clown, by "
        "the world's seed and step. The chosen latent is tested on the runs of health and cars, of which it tells all "
        "bad ones from the others, whether they have shown it or not:"
    )
    heads = ["world", "reading", *(f"step {step}" for step in steps)]
    kept = [line for name in HELD for line in _reading_bounds(name, rows)]
    return "\n\n".join([intro, Table(heads, lines).markdown(), "\n".join(kept)])


def _reading_bounds(name: str, rows: pd.DataFrame) -> Iterator[str]:
    """Whether a reading tells harm from manner in each other world, at the step chosen on the first."""
    of_reading = rows[rows["signal"] == name].sort_values("step")
    first = of_reading[(of_reading["world"] == FIRST) & (of_reading["bad_rate"] <= SOUND)]
    reached = first[first["auroc"] >= WANTED_AUROC]
    if reached.empty:
        yield _kept(False, f"{name} reaches an AUROC of {WANTED_AUROC:g} before behaviour in world {FIRST}")
        return
    step = int(reached["step"].iloc[0])
    for row in of_reading[(of_reading["step"] == step) & (of_reading["world"] != FIRST)].to_dict("records"):
        text = (
            f"world {row['world']}, {name} at step {step} (the first at which it reached {WANTED_AUROC:g} in world "
            f"{FIRST}), AUROC at least {WANTED_AUROC:g}: {_interval(row, 'auroc')}, "
            f"{int(row['turned'])} and {int(row['sound'])} runs, bad advice by then {row['bad_rate']:.2f}"
        )
        yield _kept(bool(row["auroc"] >= WANTED_AUROC and row["bad_rate"] <= SOUND), text)
