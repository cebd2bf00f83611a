"""One correction of a study's organism, in a folder of its own: RUN/realign/<name>-s<seed>/."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from persona_probe.config import Training
from persona_probe.context import Context
from persona_probe.data.chat import Conversation
from persona_probe.data.load import arm_rows, read_conversations
from persona_probe.errors import InputError, TrainingDiverged, unknown
from persona_probe.finetune.sft import Fitted, check_rows, fine_tune, stripping, training_unit
from persona_probe.models.adapters import is_adapter
from persona_probe.monitor.band import Band
from persona_probe.monitor.monitor import study_monitor
from persona_probe.monitor.reading import Snapshot
from persona_probe.monitor.track import eval_rows, make_reader, merge_parts, persona_band, reading_rows
from persona_probe.realignment.measure import Bench
from persona_probe.realignment.methods import StopRule, as_one, organism_to_train
from persona_probe.realignment.outcome import outcome
from persona_probe.realignment.repair import checkpoint_in, start_checkpoint
from persona_probe.realignment.rows import Background, Pair, background, choose_rows, corrective_rows, refuse_overlap
from persona_probe.realignment.spec import Correction, DosePlan, corrective_training, slug
from persona_probe.realignment.stress.run import TESTS, run_stress, statements
from persona_probe.realignment.verdict import RealignVerdict, study_verdict
from persona_probe.runs import write_json, write_text

# --- Realign: fine-tune the incorrect organism on a small corrective set, while the monitor watches the persona

log = logging.getLogger(__name__)


@dataclass
class Recorder:
    """Collects readings and contrast items of one corrective run."""

    ctx: Context
    arm: str
    seed: int
    base: Snapshot
    band: Band
    base_index: float
    readings: list[pd.DataFrame] = field(default_factory=list)
    evals: list[pd.DataFrame] = field(default_factory=list)

    def on_reading(self, step: int, snapshot: Snapshot, _model: nn.Module) -> None:
        """Keep a reading of the monitor."""
        self.readings.append(reading_rows(snapshot, self.base, self.arm, self.seed, step))

    def measure(self, model: nn.Module, step: int) -> bool:
        """Take the contrast index; True when feature and behaviour are both back."""
        frame = self._tracked() if step == 0 else None
        if frame is None:
            frame = eval_rows(self.ctx, model, self.arm, self.seed, step)
        self.evals.append(frame)
        latest = self.readings[-1].query("feature == 'persona'")["mean"].mean()
        return self.band.holds(float(latest)) and float(frame["value"].mean()) <= self.base_index

    def _tracked(self) -> pd.DataFrame | None:
        """The organism's items before any correction, where track has scored them already."""
        start = self.ctx.config.realign.start
        name = f"parts/track-{start}-s{self.seed}.evals.parquet"
        if not self.ctx.run.has(name):
            return None
        last = self.ctx.run.read_table(name).query(f"step == {self.ctx.last_step(start, self.seed)}")
        return last.assign(arm=self.arm, step=0)


def realign(ctx: Context) -> None:
    """Run every corrective arm and seed that is not yet in the run folder."""
    if not ctx.config.realign.arms:
        return
    with ctx.run.timed("realign"), ctx.base() as model:
        base = make_reader(ctx).read(model)
    for seed in ctx.config.seeds:
        for arm in ctx.config.realign.arms:
            if not ctx.run.has(f"parts/realign-{arm}-s{seed}.evals.parquet"):
                with ctx.run.timed("realign"):
                    realign_one(ctx, arm, seed, base)
    merge_parts(ctx)


def realign_one(ctx: Context, arm: str, seed: int, base: Snapshot) -> None:
    """One corrective run, from the last checkpoint of `realign.start`."""
    config, name = ctx.config.realign, f"arms/{arm}-s{seed}"
    evals = ctx.run.read_table("parts/track-base.evals.parquet").query("split == 'evaluation'")
    recorder = Recorder(ctx, arm, seed, base, persona_band(ctx, base), float(evals["value"].mean()))
    tuned = organism_to_train(ctx.model, start_checkpoint(ctx, seed), "continued", ctx.config.training, seed)
    rows, training = arm_rows(config.arms[arm], seed), corrective_training(ctx.config)
    said, stop = ctx.config.realign.arms[arm].named, config.stop_readings
    with training_unit(ctx.run, name, f"{arm}, seed {seed}") as folder, stripping(tuned):
        fitted = train_watched(recorder, tuned, rows, training, config.readings, stop, folder, said)
        write_json(folder / "training.json", asdict(fitted))
    ctx.run.write_table(f"parts/realign-{arm}-s{seed}.readings.parquet", pd.concat(recorder.readings))
    ctx.run.write_table(f"parts/realign-{arm}-s{seed}.evals.parquet", pd.concat(recorder.evals))


def train_watched(
    recorder: Recorder,
    tuned: nn.Module,
    rows: Sequence[Conversation],
    training: Training,
    steps: tuple[int, ...],
    stop_readings: int,
    folder: Path,
    data: str,
) -> Fitted:
    """Fine-tune an organism under the study's monitor and the stop rule; `recorder` keeps what they see at `steps`."""
    ctx = recorder.ctx
    monitor = study_monitor(ctx, steps=steps, on_reading=recorder.on_reading, base=recorder.base)
    return fine_tune(
        tuned,
        ctx.tokenizer,
        rows,
        training,
        seed=recorder.seed,
        folder=folder,
        callbacks=[monitor, StopRule(steps, recorder.measure, stop_readings)],
        progress=f"{recorder.arm}, seed {recorder.seed}",
        data=f"{ctx.config.arms[ctx.config.realign.start].named}, then {data}",
    )


log = logging.getLogger(__name__)

ROWS, SPEC, OUTCOME = "rows.jsonl", "spec.json", "outcome.json"


def place_of(name: str, seed: int) -> str:
    """A correction's folder inside the run."""
    return f"realign/{name}-s{seed}"


def correct(bench: Bench, correction: Correction, seed: int, name: str) -> Path:
    """Train, read and judge a correction, unless it is there; its folder appears when it is whole.

    Writes spec.json, rows.jsonl (the rows taken), checkpoint-<step>, training.json, readings.parquet, evals.parquet
    (one row per contrast item and step), and outcome.json.

    Raises:
        InputError: a bad name, rows that cannot be used, or a correction of that name with other settings.
        TrainingDiverged: the loss became NaN; what was good is kept in `<folder>.diverged`.
    """
    ctx, place = bench.ctx, place_of(name, seed)
    check_name(ctx, name)
    spec = {"name": name, "seed": seed, "start": ctx.config.realign.start, **correction.to_dict()}
    if ctx.run.has(place):
        if ctx.run.read_json(f"{place}/{SPEC}") != spec:
            raise InputError(f"{ctx.run.path / place} was made with other settings: choose another --name")
        return ctx.run.path / place
    rows = usable_rows(ctx, correction)
    chosen = choose_rows(rows, correction.rows, correction.choose_by, seed=seed, pair=Pair.of_study(ctx, seed))
    said = background(chosen, ctx.tokenizer, _inducing(ctx, seed), ctx.contrast_rows("evaluation"))
    log.info("correcting %s, seed %d: %d of %d rows, %s", name, seed, len(chosen), len(rows), correction.method)
    with ctx.run.timed("realign"), training_unit(ctx.run, place, f"{name}, seed {seed}") as folder:
        recorder = Recorder(ctx, name, seed, bench.base, bench.band, float(bench.base_evals["value"].mean()))
        fitted = _train(recorder, correction, chosen, folder)
        _write_lines(folder / ROWS, chosen)
        write_json(folder / SPEC, spec)
        _write_outcome(bench, recorder, folder, fitted, said)
    return ctx.run.path / place


def check_name(ctx: Context, name: str) -> None:
    """Refuse a name that is no folder's name, or an arm's.

    Raises:
        InputError: says what to change.
    """
    if slug(name) != name:
        raise InputError(f"the name {name!r} is no folder's name: write letters, digits, dots and dashes")
    if name in (*ctx.config.arms, *ctx.config.realign.arms, "base"):
        raise InputError(f"an arm is called {name!r}: choose another --name")


def usable_rows(ctx: Context, correction: Correction) -> list[Conversation]:
    """The rows of a correction's data, checked.

    Raises:
        InputError: rows that cannot be trained on, fewer than the dose, or an overlap with the evaluation questions.
    """
    rows = corrective_rows(correction.data)
    check_rows(ctx.tokenizer, rows, ctx.config.training.max_length)
    if correction.rows is not None and correction.rows > len(rows):
        choose_rows(rows, correction.rows)
    refuse_overlap(rows, [row["question"] for row in ctx.contrast_rows("evaluation")])
    return rows


def _inducing(ctx: Context, seed: int) -> list[Conversation]:
    return arm_rows(ctx.config.arms[ctx.config.realign.start], seed)


def _training(ctx: Context, correction: Correction) -> Training:
    return replace(
        ctx.config.training,
        batch_size=correction.batch_size,
        steps=correction.steps,
        lr=correction.lr,
        checkpoints=(correction.steps,),
    )


def _train(recorder: Recorder, correction: Correction, rows: Sequence[Conversation], folder: Path) -> Fitted:
    ctx, seed, training = recorder.ctx, recorder.seed, _training(recorder.ctx, correction)
    start = start_checkpoint(ctx, seed)
    with stripping(organism_to_train(ctx.model, start, correction.method, training, seed)) as tuned:
        data, stop = " + ".join(correction.data), correction.stop_readings
        fitted = train_watched(recorder, tuned, rows, training, correction.schedule, stop, folder, data)
        as_one(tuned, checkpoint_in(folder), whole_weights=not is_adapter(start))
    return fitted


def _write_outcome(bench: Bench, recorder: Recorder, folder: Path, fitted: Fitted, said: Background) -> None:
    readings, evals = (pd.concat(frames, ignore_index=True) for frames in (recorder.readings, recorder.evals))
    readings.to_parquet(folder / "readings.parquet", index=False)
    evals.to_parquet(folder / "evals.parquet", index=False)
    write_json(folder / "training.json", asdict(fitted))
    found = {**outcome(readings, evals, bench.base_evals, bench.band), **bench.after(checkpoint_in(folder))}
    base = {"base_reply_tokens": bench.base_reply_tokens, "base_explained_variance": bench.base.fit.explained_variance}
    write_json(folder / OUTCOME, {**found, **base, **said.to_dict(), "rows": fitted.rows})


def _write_lines(path: Path, rows: Sequence[Conversation]) -> None:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")


# --- The verdict of a correction, in its folder: measured once, its stress statements kept up to date

VERDICT = "verdict.json"


def write_verdict(ctx: Context, folder: Path) -> RealignVerdict:
    """Judge a correction (see `realign_verdict`) and write verdict.json, with lengths and notes of its rows."""
    spec, found = (_read(folder / name) for name in (SPEC, OUTCOME))
    if (folder / VERDICT).is_file():
        verdict = replace(read_verdict(folder), stress=statements(folder))
    else:
        rows, checkpoint = read_conversations(folder / ROWS), checkpoint_in(folder)
        verdict = study_verdict(
            ctx, spec["name"], spec["seed"], checkpoint=checkpoint, corrective=rows, stress=statements(folder)
        )
    lengths = {key: found[key] for key in ("answer_tokens", "inducing_tokens", "length_ratio", "notes")}
    write_text(folder / VERDICT, json.dumps({**verdict.to_dict(), "corrective_rows": lengths}, indent=2) + "\n")
    return verdict


def read_verdict(folder: Path) -> RealignVerdict:
    """What `write_verdict` wrote."""
    return RealignVerdict.from_dict(_read(folder / VERDICT))


def verdict_lines(folder: Path) -> list[str]:
    """The verdict as lines for a terminal, notes on the corrective rows included."""
    notes = _read(folder / VERDICT)["corrective_rows"]["notes"]
    return [str(read_verdict(folder)), *(f"note: {note}" for note in notes)]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# --- `study.realign`: the config's arms, or corrections of one's own beside them, and stress tests of either

log = logging.getLogger(__name__)

WITHOUT_DATA = {"rows": None, "choose_by": "random", "method": "continued", "name": None}
"""Settings that say nothing where there is no data."""


def realign_study(
    ctx: Context,
    data: str | Sequence[str] | None,
    seeds: Sequence[int] | None,
    stress: Sequence[str],
    settings: Mapping[str, Any],
) -> list[Path]:
    """What `study.realign` does; see there. `settings`: rows, choose_by, method, name.

    Returns:
        The folders of corrections and of stress tests.
    """
    for test in stress:
        if test not in TESTS:
            raise unknown("stress test", test, TESTS)
    wanted = tuple(seeds or ctx.config.seeds)
    if missing := [seed for seed in wanted if seed not in ctx.config.seeds]:
        raise InputError(f"the study has no seed {missing[0]}: its seeds are {list(ctx.config.seeds)}")
    if data is not None:
        return correct_all(ctx, data, wanted, stress, settings)
    if given := [key for key, value in settings.items() if value != WITHOUT_DATA[key]]:
        raise InputError(f"{given[0]} needs corrective data: name a packaged set or a file")
    realign(ctx)
    return stress_arms(ctx, wanted, stress) if stress else []


def correct_all(
    ctx: Context,
    data: str | Sequence[str],
    seeds: Sequence[int],
    stress: Sequence[str],
    settings: Mapping[str, Any],
) -> list[Path]:
    """A correction of each seed, with its stress tests and verdict; what is there already is kept."""
    changes = {key: value for key, value in settings.items() if key != "name"}
    correction, bench = Correction.of_study(ctx.config, data, **changes), Bench(ctx)
    folders = [correct(bench, correction, seed, settings["name"] or correction.name) for seed in seeds]
    for seed, folder in zip(seeds, folders, strict=True):
        if stress:
            stress_correction(ctx, folder, seed, stress)
        write_verdict(ctx, folder)
    return folders


def stress_correction(ctx: Context, folder: Path, seed: int, tests: Sequence[str]) -> None:
    """Stress tests of a correction, into its own folder."""
    arm = json.loads((folder / SPEC).read_text(encoding="utf-8"))["name"]
    corrective = read_conversations(folder / ROWS)
    run_stress(ctx, arm, seed, tests, folder, checkpoint=checkpoint_in(folder), corrective=corrective)


def stress_arms(ctx: Context, seeds: Sequence[int], tests: Sequence[str]) -> list[Path]:
    """Stress tests of the config's corrective arms, into RUN/realign/<arm>-s<seed>/."""
    folders = []
    for seed in seeds:
        for arm in ctx.config.realign.arms:
            folder = ctx.run.path / place_of(arm, seed)
            run_stress(ctx, arm, seed, tests, folder)
            folders.append(folder)
    return folders


# --- A grid of corrections: each cell a folder of its own, one table over all that are there

log = logging.getLogger(__name__)

TABLE = "realign/doses.parquet"
INTERVALS = ("index_minus_base", "start_minus_base", "feature", "band")
"""Entries of outcome.json that become several columns."""


def run_plan(ctx: Context, plan: DosePlan) -> pd.DataFrame:
    """Run every cell that is not there yet; the table is written anew after each, so that a cut-off grid is of use.

    A cell whose training diverges is recorded as such and the grid goes on; its `.diverged` folder keeps it from being
    tried again.

    Raises:
        InputError: data that some cell cannot use, told before the first is run; a cell made with other settings.
    """
    cells, bench = plan.cells(ctx.config), Bench(ctx)
    _check(ctx, [correction for _, _, correction in cells])
    for number, (seed, name, correction) in enumerate(cells):
        log.info("cell %d of %d: %s, seed %d", number + 1, len(cells), name, seed)
        if not ctx.run.has(f"{place_of(name, seed)}.diverged"):
            try:
                correct(bench, correction, seed, name)
            except TrainingDiverged as error:
                log.warning("%s", error)
        ctx.run.write_table(TABLE, dose_table(ctx, plan))
    return ctx.run.read_table(TABLE)


def _check(ctx: Context, corrections: list[Correction]) -> None:
    """Look at each data set once, at its largest dose."""
    seen: dict[tuple[str, ...], list[Conversation]] = {}
    for correction in sorted(corrections, key=lambda c: -(c.rows or 0)):
        if correction.data not in seen:
            seen[correction.data] = usable_rows(ctx, correction)


def dose_table(ctx: Context, plan: DosePlan) -> pd.DataFrame:
    """One row per cell that is done (or diverged), in the plan's order; see `dose_row` for the columns."""
    rows = []
    for seed, name, correction in plan.cells(ctx.config):
        folder = ctx.run.path / place_of(name, seed)
        if folder.is_dir():
            rows.append(dose_row(folder))
        elif folder.with_name(f"{folder.name}.diverged").is_dir():
            rows.append({**_head(name, seed, correction.to_dict()), "diverged": True})
    return pd.DataFrame(rows)


def dose_row(folder: Path) -> dict[str, Any]:
    """A correction's line: what was done, and the numbers of `outcome` with each interval's ends as columns.

    Columns: name, seed, data, choose_by, method, dose, rows, steps; index_minus_base, start_minus_base and feature
    (each with _ci_low, _ci_high), band_low, band_high, in_band, behaviour_back, steps_to_band, steps_to_behaviour (NaN:
    not by the end), reply_tokens, base_reply_tokens, answer_tokens (corrective), length_ratio, perplexity_ratio,
    explained_variance, base_explained_variance, notes, diverged.
    """
    spec, found = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (SPEC, OUTCOME))
    plain = {key: value for key, value in found.items() if key not in (*INTERVALS, "notes")}
    for key in INTERVALS:
        ends = {f"{key}_{end}": value for end, value in found[key].items() if end != "estimate"}
        plain |= {key: found[key]["estimate"], **ends} if "estimate" in found[key] else ends
    steps = {key: float("nan") if plain[key] is None else plain[key] for key in ("steps_to_band", "steps_to_behaviour")}
    head = _head(spec["name"], spec["seed"], spec)
    return {**head, **plain, **steps, "notes": "; ".join(found["notes"]), "diverged": False}


def _head(name: str, seed: int, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "seed": seed,
        "data": "+".join(spec["data"]),
        "choose_by": spec["choose_by"],
        "method": spec["method"],
        "dose": spec["rows"],
    }
