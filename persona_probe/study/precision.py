"""Low precision: does a format of few bits keep the persona, its rank, and the behaviour; or the base's alone?"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from persona_probe.config import check_seeds
from persona_probe.context import Context
from persona_probe.data.chat import conversation
from persona_probe.data.load import Row
from persona_probe.data.tokens import conversation_batches
from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.files import read_tensors
from persona_probe.latents.rankers import Evidence, score_table
from persona_probe.latents.stage import persona_latent
from persona_probe.models.adapters import frozen_in_bf16, merged_copy
from persona_probe.models.formats import FORMATS, Format, formats_named
from persona_probe.models.precision import (
    WeightChange,
    agreement_with_library,
    in_format,
    library_version,
    linear_layers,
    on_grid,
)
from persona_probe.monitor.band import Band
from persona_probe.monitor.reading import FeatureReader
from persona_probe.monitor.track import make_reader
from persona_probe.saes.read import FitMoments, LatentMeans, read_saes
from persona_probe.stats import Estimate, bootstrap_mean, paired_difference
from persona_probe.units import Unit, make_units, writes_run
from persona_probe.writing import write_tensors

log = logging.getLogger(__name__)

TABLE = "precision.parquet"
FOLDER = "parts/precision"
TOP = 20
"""Latents that are compared between a format's ranking and the reference's."""
RANKERS = ("firing_rise", "cosine")


@dataclass(frozen=True)
class PrecisionSettings:
    """What `persona-probe precision` measures."""

    formats: tuple[str, ...] = ()
    """Names of `models.formats.FORMATS`; none takes all. The weights as they are are always among them."""
    items: int = 24
    """Questions of each split, spread over the categories: the evaluation split gives the contrast index, the selection
    split the ranking."""
    seeds: tuple[int, ...] = ()
    """Of the study's organisms; none takes the first."""
    activations: bool = False
    """Round the inputs of linear layers too, in the formats that have a rule for them."""

    def __post_init__(self) -> None:
        formats_named(self.formats)
        if self.items < 4:
            raise InputError(f"--items must be at least 4, not {self.items}: intervals need several questions")
        if self.seeds:
            check_seeds(self.seeds, "--seeds")

    @property
    def chosen(self) -> list[Format]:
        """The formats, the reference first."""
        every = formats_named(self.formats)
        return [one for one in every if not self.activations or one.activations is not None]


@writes_run
def measure_precision(ctx: Context, settings: PrecisionSettings | None = None) -> pd.DataFrame:
    """Write precision.parquet: base, incorrect and control organism in every format. Finished parts are kept.

    Returns:
        The table, see `precision_table`.

    Raises:
        InputError: locate has not run, a seed that the study does not have, or an organism that cannot be merged.
    """
    settings = settings or PrecisionSettings()
    persona_latent(ctx)  # first, since its error names the stage to run
    make_units(ctx, partial(precision_units, settings=settings))
    table = precision_table(ctx, settings)
    ctx.run.write_table(TABLE, table)
    for line in warnings_of(table):
        log.warning("%s", line)
    return table


# --- Units: one organism in one format


def precision_units(ctx: Context, settings: PrecisionSettings) -> list[Unit]:
    """One unit for each organism and format, organism by organism: each is merged once."""
    bench = _Bench(ctx, settings)
    return [
        Unit(f"{place}.parquet", partial(_measure, bench, arm, seed, form, place), "precision")
        for arm, seed in organisms_of(ctx, settings)
        for form in settings.chosen
        for place in [_part(settings, form, arm, seed)]
    ]


def organisms_of(ctx: Context, settings: PrecisionSettings) -> list[tuple[str, int]]:
    """Arm and seed of what is measured: the base, and for each seed the incorrect and the control organism.

    Raises:
        InputError: a seed that the study does not have.
    """
    seeds = settings.seeds or ctx.config.seeds[:1]
    if wrong := [seed for seed in seeds if seed not in ctx.config.seeds]:
        raise unknown("seed", str(wrong[0]), [str(seed) for seed in ctx.config.seeds])
    arms = [arm for arm in dict.fromkeys((ctx.config.realign.start, ctx.config.control)) if arm != "base"]
    return [("base", ctx.config.seeds[0]), *((arm, seed) for arm in arms for seed in seeds)]


def _part(settings: PrecisionSettings, form: Format, arm: str, seed: int) -> str:
    """The name of a part, without its ending; parts of other settings lie elsewhere."""
    inputs = "-activations" if settings.activations else ""
    return f"{FOLDER}/items-{settings.items}{inputs}/{form.name}-{arm}-s{seed}"


class _Bench:
    """What all units share: items, reader, and the organism that was merged last."""

    def __init__(self, ctx: Context, settings: PrecisionSettings) -> None:
        self.ctx, self.settings = ctx, settings
        self._merged: tuple[tuple[str, int], nn.Module] | None = None

    @cached_property
    def evaluation(self) -> ContrastItems:
        return ContrastItems.build(self.ctx.tokenizer, self.rows("evaluation"), batch_size=32)

    def rows(self, split: str) -> list[Row]:
        return spread(self.ctx.contrast_rows(split), self.settings.items)

    @cached_property
    def selection(self) -> list[Any]:
        sides = ("aligned", "misaligned")
        talks = [conversation(row["question"], row[side]) for row in self.rows("selection") for side in sides]
        return conversation_batches(self.ctx.tokenizer, talks)

    @cached_property
    def reader(self) -> FeatureReader:
        return make_reader(self.ctx, {"persona": persona_latent(self.ctx)})

    @cached_property
    def base(self) -> nn.Module:
        """The base with plain weights, to compare an organism's with."""
        return merged_copy(self.ctx.model, None).requires_grad_(False)

    def organism(self, arm: str, seed: int) -> nn.Module:
        """An organism with its adapter merged; the one before is dropped."""
        if arm == "base":
            return self.base
        if self._merged is None or self._merged[0] != (arm, seed):
            self._merged = None  # one at a time in memory
            checkpoint = self.ctx.run.checkpoint(arm, seed, self.ctx.last_step(arm, seed))
            self._merged = ((arm, seed), merged_copy(self.ctx.model, checkpoint).requires_grad_(False))
        return self._merged[1]

    @contextmanager
    def in_format(self, arm: str, seed: int, form: Format) -> Iterator[tuple[nn.Module, WeightChange]]:
        ctx, model = self.ctx, self.organism(arm, seed)
        with (
            in_format(model, form, self.settings.activations, None if arm == "base" else self.base) as change,
            frozen_in_bf16(model, ctx.device == "cpu" and ctx.config.bf16),
        ):
            yield model, change


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """The first `count` rows, taking categories in turn; all of them if they are fewer."""
    by_category: dict[str, list[Row]] = {}
    for row in rows:
        by_category.setdefault(str(row.get("category", "")), []).append(row)
    longest = max(map(len, by_category.values()), default=0)
    turns = [group[n] for n in range(longest) for group in by_category.values() if n < len(group)]
    return turns[:count]


def _measure(bench: _Bench, arm: str, seed: int, form: Format, place: str) -> None:
    """Write a part: the latents' means as tensors, then the items and, repeated on each row, the reading."""
    ctx, log_name = bench.ctx, f"{form.name}: {arm}, seed {seed}"
    log.info("precision: %s", log_name)
    with bench.in_format(arm, seed, form) as (model, change):
        [by_position] = read_saes(
            model, ctx.saes[:1], bench.selection, [ctx.config.locate.positions], bf16=ctx.config.bf16
        )
        snapshot = bench.reader.read(model)
        frame = contrast_index(model, bench.evaluation, bf16=ctx.config.bf16)
    _write_means(ctx.run.path / f"{place}.safetensors", by_position[ctx.config.locate.positions])
    reading = {k: v for k, v in snapshot.rows()[0].items() if k not in ("feature", "latent", "maximum")}
    reading["base_sd"] = float(snapshot.values[:, 0].std(ddof=1))
    reading |= {"kept": change.kept, "noise": change.noise, "parameters": change.parameters}
    reading["step"] = 0 if arm == "base" else ctx.last_step(arm, seed)
    if arm == "base":
        reading["library_equal"] = agreement_with_library(linear_layers(bench.base), form)
        reading["base_on_grid"] = on_grid(bench.base, form)
    ctx.run.write_table(f"{place}.parquet", frame.assign(**reading))


MEANS = ("mean", "firing", "maximum", "resid")


def _write_means(path: Path, means: LatentMeans) -> None:
    import torch

    write_tensors(path, {name: torch.from_numpy(np.float32(getattr(means, name))) for name in MEANS})


def _read_means(path: Path) -> LatentMeans:
    tensors = read_tensors(path, MEANS, "move it elsewhere and run `persona-probe precision RUN` again")
    return LatentMeans(*(tensors[name].numpy() for name in MEANS), fit=FitMoments())


# --- The table


@dataclass(frozen=True)
class _Parts:
    """The parts of one format."""

    frames: dict[tuple[str, int], pd.DataFrame]
    means: dict[tuple[str, int], LatentMeans] = field(default_factory=dict)


def precision_table(ctx: Context, settings: PrecisionSettings) -> pd.DataFrame:
    """One row per format, arm and seed, from the parts that `measure_precision` wrote.

    Returns:
        Columns: format, bits, activations, arm, seed, step; kept, noise, parameters (see `WeightChange`), erased,
        base_on_grid; reading, ci_low, ci_high (persona feature on the monitor's probes), firing_rate,
        explained_variance; band_low, band_high (the base band read in that format) and state, reference_state (where
        the reading lies in it, and in the band of the weights as they are); index with ends (nats per token), aligned
        (log-probability of aligned answers, nats per token), index_minus_control with ends (paired, over questions),
        n (questions); rise_rank, firing_rise_rank, cosine_rank (of the persona latent, incorrect against control),
        shared_20 and rise_correlation with the reference's ranking; library, library_equal (share of one weight's
        elements that the library rounds to the same value).
    """
    parts = {form.name: _read_parts(ctx, settings, form) for form in settings.chosen}
    reference = next(iter(parts.values()))
    rankings = {name: _ranking(ctx, settings, part) for name, part in parts.items()}
    rows = []
    for form in settings.chosen:
        part, ranks = parts[form.name], _ranks(ctx, rankings[form.name], next(iter(rankings.values())))
        for arm, seed in part.frames:
            rows.append(
                {
                    "format": form.name,
                    "bits": form.bits,
                    "activations": settings.activations,
                    "arm": arm,
                    "seed": seed,
                    **_reading(ctx, part, reference, arm, seed),
                    **_behaviour(ctx, part, arm, seed),
                    **ranks.get(seed, ranks[next(iter(ranks))] if arm == "base" else {}),
                    "library": library_version(form.name),
                    "library_equal": float(part.frames[_base(part)]["library_equal"].iloc[0]),
                }
            )
    return pd.DataFrame(rows)


def _read_parts(ctx: Context, settings: PrecisionSettings, form: Format) -> _Parts:
    places = {one: _part(settings, form, *one) for one in organisms_of(ctx, settings)}
    frames = {one: ctx.run.read_table(f"{place}.parquet") for one, place in places.items()}
    return _Parts(frames, {one: _read_means(ctx.run.path / f"{place}.safetensors") for one, place in places.items()})


def _base(part: _Parts) -> tuple[str, int]:
    return next(one for one in part.frames if one[0] == "base")


def _reading(ctx: Context, part: _Parts, reference: _Parts, arm: str, seed: int) -> dict[str, Any]:
    """Weights, reading, and where it lies in the band of the base in the same format and of the base as it is."""
    frame = part.frames[arm, seed]
    row = {str(name): value for name, value in frame.iloc[0].items()}
    bases = [one.frames[_base(one)].iloc[0] for one in (part, reference)]
    width, mean = ctx.config.monitor.band_sd, float(row["mean"])
    band, old = (Band.of(float(base["mean"]), float(base["base_sd"]), width) for base in bases)
    kept = float(row["kept"])
    return {
        "step": int(row["step"]),
        **{name: float(row[name]) for name in ("kept", "noise", "parameters")},
        "erased": bool(kept < 0.5),
        "base_on_grid": bool(part.frames[_base(part)]["base_on_grid"].iloc[0]),
        "reading": mean,
        **{name: float(row[name]) for name in ("ci_low", "ci_high", "firing_rate", "explained_variance")},
        "band_low": band.low,
        "band_high": band.high,
        "state": _state(mean, band),
        "reference_state": _state(mean, old),
    }


def _state(reading: float, band: Band) -> str:
    if not np.isfinite([reading, band.low, band.high]).all():
        return "not finite"
    return "below" if reading < band.low else "above" if reading > band.high else "inside"


def _behaviour(ctx: Context, part: _Parts, arm: str, seed: int) -> dict[str, Any]:
    """The contrast index, and its paired difference to the control arm's in the same format."""
    frame = part.frames[arm, seed]
    index = bootstrap_mean(frame["value"].to_numpy(), seed=ctx.seed)
    control = part.frames.get((ctx.config.control, seed)) if arm != "base" else None
    if ctx.config.control == "base" and arm != "base":
        control = part.frames[_base(part)]
    against = Estimate(float("nan"), float("nan"), float("nan"), 0)
    if control is not None and arm != ctx.config.control:
        against = paired_difference(frame["value"].to_numpy(), control["value"].to_numpy(), seed=ctx.seed)
    return {
        **_ends("index", index),
        "aligned": float(frame["aligned_logprob"].mean()),
        **_ends("index_minus_control", against),
        "n": len(frame),
    }


def _ends(name: str, one: Estimate) -> dict[str, float]:
    return {name: one.estimate, f"{name}_ci_low": one.ci_low, f"{name}_ci_high": one.ci_high}


def _ranking(ctx: Context, settings: PrecisionSettings, part: _Parts) -> dict[int, pd.DataFrame]:
    """The latents of each seed in one format, ordered by the rise of the incorrect organism over the control."""
    rows = spread(ctx.contrast_rows("selection"), settings.items)
    at, start, control = ctx.config.locate.positions, ctx.config.realign.start, ctx.config.control
    decoder = ctx.sae.W_dec.detach().float().cpu().numpy()
    base = part.means[_base(part)]
    tables = {}
    for seed in dict.fromkeys(seed for arm, seed in part.frames if arm == start):
        other = base if control == "base" else part.means[control, seed]
        evidence = Evidence(
            {at: base},
            {at: part.means[start, seed]},
            {at: other},
            decoder,
            [row["id"] for row in rows for _ in range(2)],
            np.tile([False, True], len(rows)),
            at,
            seed=ctx.seed,
        )
        tables[seed] = score_table(evidence, RANKERS)
    return tables


def _ranks(
    ctx: Context, tables: dict[int, pd.DataFrame], reference: dict[int, pd.DataFrame]
) -> dict[int, dict[str, float]]:
    """The persona latent's ranks in each seed's table, and how the table agrees with the reference's."""
    latent, ranks = persona_latent(ctx), {}
    for seed, table in tables.items():
        whole = reference[seed]
        row = table[table["latent"] == latent].iloc[0]
        both = table.merge(whole, on="latent", suffixes=("", "_reference"))
        alive = both[both["alive"] | both["alive_reference"]]
        shared = set(table["latent"].head(TOP)) & set(whole["latent"].head(TOP))
        correlation = np.corrcoef(alive["rise"], alive["rise_reference"])[0, 1] if len(alive) > 2 else np.nan
        ranks[seed] = {
            "rise_rank": int(row["rank"]),
            **{f"{name}_rank": int(row[f"{name}_rank"]) for name in RANKERS},
            "shared_20": len(shared),
            "rise_correlation": float(correlation),
        }
    return ranks


# --- What the table says


def warnings_of(table: pd.DataFrame) -> list[str]:
    """One line for each format that erases the fine-tune: a reading in it is a false all-clear."""
    lines = []
    for name, rows in table[table["erased"].astype(bool)].groupby("format", sort=False):
        kept = ", ".join(f"{row['arm']} {row['kept']:.0%}" for row in rows.to_dict("records"))
        grid = " The base's weights lie on this format's grid already." if bool(rows["base_on_grid"].all()) else ""
        lines.append(
            f"{name} keeps little of the fine-tune's change of the weights ({kept}).{grid} What is read in it is the "
            "base, not the organism: a quiet reading is a false all-clear. Read the organism before it is quantised"
        )
    return lines


def described(name: str) -> str:
    """What a format is, in words."""
    return FORMATS[name].what if name in FORMATS else name
