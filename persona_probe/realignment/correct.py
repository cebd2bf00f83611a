"""Corrections of a study's organisms: the config's corrective arms, corrections with other rows, and grids of them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from persona_probe.config import check_seeds
from persona_probe.context import Context
from persona_probe.data.chat import Conversation
from persona_probe.data.load import arm_rows, read_conversations
from persona_probe.errors import InputError, TrainingDiverged, unknown
from persona_probe.files import as_damaged, read_json
from persona_probe.finetune.sft import Fitted, check_rows, stripping, training_unit
from persona_probe.models.adapters import is_adapter
from persona_probe.models.ranks import Ranks, shards_here
from persona_probe.monitor.monitor import study_monitor
from persona_probe.monitor.reading import Snapshot
from persona_probe.monitor.track import eval_rows, merge_parts, reading_rows
from persona_probe.names import check_name
from persona_probe.realignment.measure import BaseMeasurements
from persona_probe.realignment.methods import (
    CorrectiveRun,
    Recorder,
    as_one,
    checkpoint_in,
    organism_to_train,
    train_watched,
)
from persona_probe.realignment.outcome import outcome
from persona_probe.realignment.rows import (
    Background,
    ModelPair,
    background,
    choose_rows,
    corrective_rows,
    refuse_overlap,
)
from persona_probe.realignment.spec import Correction, DosePlan
from persona_probe.realignment.stress.stress_run import (
    TESTS,
    StressSettings,
    refuse_unknown_rows,
    run_stress,
    statements,
)
from persona_probe.realignment.verdict import RealignVerdict, study_verdict
from persona_probe.units import Unit, make_units, writes_run
from persona_probe.writing import write_json, write_jsonl, write_table

log = logging.getLogger(__name__)
ROWS, SPEC, OUTCOME, VERDICT = "rows.jsonl", "spec.json", "outcome.json", "verdict.json"
LONGEST_MADE = 180
"""Characters of a name that is made of those of the data: with what is added, file systems take it."""


@writes_run
def realign_study(
    ctx: Context,
    correction: Correction | None = None,
    name: str | None = None,
    seeds: Sequence[int] | None = None,
    stress: Sequence[str] = (),
    stress_settings: StressSettings | None = None,
) -> list[Path]:
    """Run a correction of the study's organisms, or the config's corrective arms, then stress tests of either.

    Args:
        correction: None runs the config's arms.
        name: of the correction's folder; None takes one that says what was done.
        seeds: None takes the study's.
        stress: names of `stress.TESTS`.
        stress_settings: how hard they press.

    Returns:
        The folders of corrections and of stress tests.
    """
    for test in stress:
        if test not in TESTS:
            raise unknown("stress test", test, TESTS)
    refuse_unknown_rows(ctx, stress)
    seeds = tuple(check_seeds(seeds or ctx.config.seeds))
    if missing := [seed for seed in seeds if seed not in ctx.config.seeds]:
        raise InputError(f"the study has no seed {missing[0]}: its seeds are {list(ctx.config.seeds)}")
    if correction is None:
        correct_arms(ctx)
        places = [(arm, seed) for seed in seeds for arm in ctx.config.realign.arms] if stress else []
        for arm, seed in places:
            run_stress(ctx, arm, seed, stress, ctx.run.path / place_of(arm, seed), settings=stress_settings)
        return [ctx.run.path / place_of(arm, seed) for arm, seed in places]
    if name is not None:
        check_name(name, "the correction's name", also="+")
    name = correction.name if name is None else name
    _check_name(ctx, name)
    make_units(ctx, partial(correction_units, correction, name, seeds))
    made = [seed for seed in seeds if ctx.run.has(place_of(name, seed))]  # a shard makes some
    folders = [ctx.run.path / place_of(name, seed) for seed in made]
    for seed, folder in zip(made, folders, strict=True):
        if stress:
            rows, checkpoint = read_conversations(folder / ROWS), checkpoint_in(folder)
            run_stress(
                ctx, name, seed, stress, folder, checkpoint=checkpoint, corrective=rows, settings=stress_settings
            )
        write_verdict(ctx, folder)
    return folders


# --- One correction: trained under the monitor, measured, kept when whole


@writes_run
def correct_arms(ctx: Context) -> None:
    """Run every corrective arm and seed of the config that is not yet in the run folder."""
    if not ctx.config.realign.arms:
        return
    make_units(ctx, arm_units)
    merge_parts(ctx)


def arm_units(ctx: Context) -> list[Unit]:
    """One unit for each corrective arm and seed of the config."""
    base = BaseMeasurements(ctx)
    return [
        Unit(
            f"parts/realign-{arm}-s{seed}.evals.parquet",
            partial(_correct_arm, base, arm, seed),
            "realign",
            trained=True,
        )
        for seed in ctx.config.seeds
        for arm in ctx.config.realign.arms
    ]


def _correct_arm(base: BaseMeasurements, arm: str, seed: int) -> None:
    """An arm's correction goes where organisms are, and its tables among the run's parts."""
    ctx, correction = base.ctx, Correction.of_arm(base.ctx.config, arm)
    readings: list[pd.DataFrame] = []
    recorder = _recorder(base, arm, seed, correction, correction.readings, readings)
    with training_unit(ctx.run, f"arms/{arm}-s{seed}", f"{arm}, seed {seed}") as folder:
        fitted = _train(recorder, ctx, correction, arm_rows(ctx.config.realign.arms[arm], seed), arm, seed, folder)
        write_json(folder / "training.json", asdict(fitted))
    if not Ranks().first:  # the others have trained, which is all that needs them
        return
    ctx.run.write_table(f"parts/realign-{arm}-s{seed}.readings.parquet", pd.concat(readings))
    ctx.run.write_table(f"parts/realign-{arm}-s{seed}.evals.parquet", recorder.evals)


def place_of(name: str, seed: int) -> str:
    """A correction's folder inside the run."""
    return f"realign/{name}-s{seed}"


def correction_units(correction: Correction, name: str, seeds: Sequence[int], ctx: Context) -> list[Unit]:
    """One unit for each seed of a correction.

    Raises:
        InputError: a finished one of that name has other settings.
    """
    base = BaseMeasurements(ctx)
    return [
        Unit(
            place_of(name, seed),
            partial(correct, base, correction, seed, name),
            "realign",
            partial(_is_corrected, ctx, correction, seed, name),
            trained=True,
        )
        for seed in seeds
    ]


def _is_corrected(ctx: Context, correction: Correction, seed: int, name: str) -> bool:
    return ctx.run.finished(place_of(name, seed), _spec(ctx, correction, seed, name), SPEC, "choose another --name")


def _spec(ctx: Context, correction: Correction, seed: int, name: str) -> dict[str, Any]:
    """What decides the numbers of a correction."""
    return {"name": name, "seed": seed, "start": ctx.config.realign.start, **correction.to_dict()}


def correct(base: BaseMeasurements, correction: Correction, seed: int, name: str) -> None:
    """Train, read and judge a correction; its folder appears when it is whole.

    Writes spec.json, rows.jsonl (the rows taken), checkpoint-<step>, training.json, readings.parquet, evals.parquet
    (one row per contrast item and step), and outcome.json.

    Raises:
        InputError: rows that cannot be used.
        TrainingDiverged: the loss became NaN; the checkpoints up to then are kept in `<folder>.diverged`.
    """
    ctx, place = base.ctx, place_of(name, seed)
    usable = _usable_rows(ctx, correction)
    rows = choose_rows(usable, correction.rows, correction.choose_by, seed=seed, pair=ModelPair.of_study(ctx, seed))
    inducing = arm_rows(ctx.config.arms[ctx.config.realign.start], seed)
    about_rows = background(rows, ctx.tokenizer, inducing, ctx.contrast_rows("evaluation"))
    log.info("correcting %s, seed %d: %d of %d rows, %s", name, seed, len(rows), len(usable), correction.method)
    readings: list[pd.DataFrame] = []
    with training_unit(ctx.run, place, f"{name}, seed {seed}") as folder:
        recorder = _recorder(base, name, seed, correction, correction.schedule, readings)
        fitted = _train(recorder, ctx, correction, rows, name, seed, folder)
        if not Ranks().first:
            return
        write_jsonl(folder / ROWS, [{"messages": row} for row in rows])
        write_json(folder / SPEC, _spec(ctx, correction, seed, name))
        write_json(folder / "training.json", asdict(fitted))
        write_table(folder / "readings.parquet", pd.concat(readings, ignore_index=True))
        write_table(folder / "evals.parquet", recorder.evals)
        _write_outcome(base, recorder, seed, folder, fitted, about_rows)


def _check_name(ctx: Context, name: str) -> None:
    if len(name) > LONGEST_MADE:
        raise InputError(f"the name that the data give has {len(name)} characters: choose a shorter one with --name")
    if name in (*ctx.config.arms, *ctx.config.realign.arms, "base"):
        raise InputError(f"an arm is called {name!r}: choose another --name")


def _usable_rows(ctx: Context, correction: Correction) -> list[Conversation]:
    """The rows of a correction's data; refuses bad ones, fewer than the dose, and an overlap with the evaluation."""
    rows = corrective_rows(correction.data)
    check_rows(ctx.tokenizer, rows, ctx.config.training.max_length)
    if correction.rows is not None and correction.rows > len(rows):
        choose_rows(rows, correction.rows)
    refuse_overlap(rows, [row["question"] for row in ctx.contrast_rows("evaluation")])
    return rows


def _recorder(
    base: BaseMeasurements,
    name: str,
    seed: int,
    correction: Correction,
    steps: tuple[int, ...],
    readings: list[pd.DataFrame],
) -> Recorder:
    """A recorder with the study's monitor, whose readings go to `readings` in the columns of readings.parquet."""
    ctx, snapshot = base.ctx, base.snapshot

    def keep(step: int, reading: Snapshot, _model: nn.Module) -> None:
        readings.append(reading_rows(reading, snapshot, name, seed, step))

    def behaviour(model: nn.Module, step: int) -> pd.DataFrame:
        tracked = _tracked(ctx, name, seed) if step == 0 else None
        return eval_rows(ctx, model, name, seed, step) if tracked is None else tracked

    return Recorder(
        monitor=study_monitor(ctx, steps=steps, on_reading=keep, base=snapshot),
        steps=steps,
        curve=lambda: pd.concat(readings).query("feature == 'persona'"),
        band=lambda: base.band,
        behaviour=behaviour,
        base_evals=base.evals,
        stop_by=_stop_by(base, name, seed) if correction.stop_readings else None,
    )


def _stop_by(base: BaseMeasurements, name: str, seed: int) -> Callable[[nn.Module, int], bool]:
    """The stop rule's reading of behaviour, on the selection split: the evaluation split is the verdict's."""
    level = base.selection_index  # before an adapter is on the model

    def no_higher(model: nn.Module, step: int) -> bool:
        return float(eval_rows(base.ctx, model, name, seed, step, "selection")["value"].mean()) <= level

    return no_higher


def _tracked(ctx: Context, name: str, seed: int) -> pd.DataFrame | None:
    """The organism's items before any correction, if track has scored them already."""
    start = ctx.config.realign.start
    table = f"parts/track-{start}-s{seed}.evals.parquet"
    if not ctx.run.has(table):
        return None
    last = ctx.run.read_table(table).query(f"step == {ctx.last_step(start, seed)}")
    return last.assign(arm=name, step=0)


def _train(
    recorder: Recorder,
    ctx: Context,
    correction: Correction,
    rows: Sequence[Conversation],
    name: str,
    seed: int,
    folder: Path,
) -> Fitted:
    """Correct the study's organism; the checkpoint in `folder` is then one organism."""
    arm, data = ctx.config.realign.start, " + ".join(correction.data)
    start = ctx.run.checkpoint(arm, seed, ctx.last_step(arm, seed))
    assert start is not None
    run = CorrectiveRun(
        rows=rows,
        training=correction.training(ctx.config.training),
        seed=seed,
        tokenizer=ctx.tokenizer,
        data=f"{ctx.config.arms[arm].named}, then {data}",
        patience=correction.stop_readings,
        progress=f"{name}, seed {seed}",
    )
    if shards_here() and correction.method == "fresh":
        raise InputError("FSDP cannot train a fresh LoRA on top of an organism: write method: continued, or use DDP")
    host = ctx.load()[0] if shards_here() else ctx.model  # one that was sharded cannot be used again
    with stripping(organism_to_train(host, start, correction.method, run.training, seed)) as tuned:
        fitted = train_watched(tuned, run, recorder, folder)
        if Ranks().first:
            as_one(tuned, checkpoint_in(folder), whole_weights=not is_adapter(start))
    return fitted


def _write_outcome(
    base: BaseMeasurements, recorder: Recorder, seed: int, folder: Path, fitted: Fitted, about_rows: Background
) -> None:
    against, margin = base.control_evals(seed), base.ctx.config.realign.margin
    numbers = outcome(recorder.curve(), recorder.evals, base.evals, base.band, control_evals=against, margin=margin)
    after = base.compare(checkpoint_in(folder))
    before = {"base_reply_tokens": base.reply_tokens, "base_explained_variance": base.snapshot.fit.explained_variance}
    write_json(folder / OUTCOME, {**numbers, **after, **before, **about_rows.to_dict(), "rows": fitted.rows})


# --- The verdict of a correction, in its folder: measured once, its stress statements kept up to date


def write_verdict(ctx: Context, folder: Path) -> RealignVerdict:
    """Judge a correction (see `realignment.verdict`) and write verdict.json, with lengths and notes of its rows."""
    spec, outcome_record = (_read(folder / name) for name in (SPEC, OUTCOME))
    if (folder / VERDICT).is_file():
        verdict = replace(read_verdict(folder), stress=statements(folder))
    else:
        rows, checkpoint = read_conversations(folder / ROWS), checkpoint_in(folder)
        verdict = study_verdict(
            ctx, spec["name"], spec["seed"], checkpoint=checkpoint, corrective=rows, stress=statements(folder)
        )
    lengths = {key: outcome_record[key] for key in ("answer_tokens", "inducing_tokens", "length_ratio", "notes")}
    write_json(folder / VERDICT, {**verdict.to_dict(), "corrective_rows": lengths})
    return verdict


def read_verdict(folder: str | Path) -> RealignVerdict:
    """The verdict of a correction's folder, as `write_verdict` wrote it."""
    path = Path(folder) / VERDICT
    with as_damaged(path, "move it elsewhere and run again"):
        return RealignVerdict.from_dict(_read(path))


def verdict_lines(folder: Path) -> list[str]:
    """The verdict as lines for a terminal, notes on the corrective rows included."""
    with as_damaged(folder / VERDICT, "move it elsewhere and run again"):
        notes = _read(folder / VERDICT)["corrective_rows"]["notes"]
    return [str(read_verdict(folder)), *(f"note: {note}" for note in notes)]


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, dict, f"move {path.parent} elsewhere and run again")


# --- A grid of corrections: each cell a folder of its own, one table over all that are there

TABLE = "realign/doses.parquet"
INTERVALS = ("index_minus_base", "index_minus_control", "share_left", "start_minus_base", "feature", "band")
"""Entries of outcome.json that become several columns."""


@writes_run
def run_plan(ctx: Context, plan: DosePlan) -> pd.DataFrame:
    """Run every cell that is not finished; the table is rewritten after each, so an interrupted grid has one too.

    A cell whose training diverges is recorded as diverged and the grid continues; its `.diverged` folder says that it
    need not be tried again.

    Raises:
        InputError: data that some cell cannot use (raised before the first is run), or a cell made with other settings.
    """
    cells = plan.cells(ctx.config)
    for _, name, _ in cells:
        _check_name(ctx, name)
    _check_data(ctx, [correction for _, _, correction in cells])
    make_units(ctx, partial(dose_units, plan), after=lambda: ctx.run.write_table(TABLE, dose_table(ctx, plan)))
    ctx.run.write_table(TABLE, dose_table(ctx, plan))
    return ctx.run.read_table(TABLE)


def dose_units(plan: DosePlan, ctx: Context) -> list[Unit]:
    """One unit for each cell of a grid of corrections.

    Raises:
        InputError: a finished cell was made with other settings.
    """
    base = BaseMeasurements(ctx)
    return [
        Unit(
            place_of(name, seed),
            partial(_run_cell, base, correction, seed, name),
            "realign",
            partial(_cell_finished, ctx, correction, seed, name),
            trained=True,
        )
        for seed, name, correction in plan.cells(ctx.config)
    ]


def _cell_finished(ctx: Context, correction: Correction, seed: int, name: str) -> bool:
    return ctx.run.has(f"{place_of(name, seed)}.diverged") or _is_corrected(ctx, correction, seed, name)


def _run_cell(base: BaseMeasurements, correction: Correction, seed: int, name: str) -> None:
    log.info("cell %s, seed %d", name, seed)
    try:
        correct(base, correction, seed, name)
    except TrainingDiverged as error:
        log.warning("%s", error)


def _check_data(ctx: Context, corrections: list[Correction]) -> None:
    """Check each data set once, at its largest dose."""
    checked: set[tuple[str, ...]] = set()
    for correction in sorted(corrections, key=lambda c: -(c.rows or 0)):
        if correction.data not in checked:
            _usable_rows(ctx, correction)
            checked.add(correction.data)


def dose_table(ctx: Context, plan: DosePlan) -> pd.DataFrame:
    """One row per finished (or diverged) cell, in the plan's order; see `dose_row` for the columns."""
    rows = []
    for seed, name, correction in plan.cells(ctx.config):
        folder = ctx.run.path / place_of(name, seed)
        if folder.is_dir():
            rows.append(dose_row(folder))
        elif folder.with_name(f"{folder.name}.diverged").is_dir():
            rows.append({**_head(name, seed, correction.to_dict()), "diverged": True})
    return pd.DataFrame(rows)


def dose_row(folder: Path) -> dict[str, Any]:
    """A correction's row: what was done, and the numbers of outcome.json with each interval's ends as columns.

    Columns: name, seed, data, choose_by, method, dose, rows, steps; index_minus_base, index_minus_control, share_left,
    start_minus_base and feature (each with _ci_low, _ci_high), behaviour (the word), band_low, band_high, in_band,
    behaviour_back, steps_to_band, steps_to_behaviour (NaN:
    not by the end), reply_tokens, base_reply_tokens, answer_tokens (corrective), length_ratio, perplexity_ratio,
    explained_variance, base_explained_variance, notes, diverged.
    """
    spec, numbers = (_read(folder / name) for name in (SPEC, OUTCOME))
    plain = {key: value for key, value in numbers.items() if key not in (*INTERVALS, "notes")}
    for key in [key for key in INTERVALS if numbers.get(key) is not None]:  # 0.1.0 wrote fewer
        ends = {f"{key}_{end}": value for end, value in numbers[key].items() if end != "estimate"}
        plain |= {key: numbers[key]["estimate"], **ends} if "estimate" in numbers[key] else ends
    steps = {key: float("nan") if plain[key] is None else plain[key] for key in ("steps_to_band", "steps_to_behaviour")}
    head = _head(spec["name"], spec["seed"], spec)
    return {**head, **plain, **steps, "notes": "; ".join(numbers["notes"]), "diverged": False}


def _head(name: str, seed: int, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "seed": seed,
        "data": "+".join(spec["data"]),
        "choose_by": spec["choose_by"],
        "method": spec["method"],
        "dose": spec["rows"],
    }
