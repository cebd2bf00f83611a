"""One correction of a study's organism, in a folder of its own: RUN/realign/<name>-s<seed>/."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
from peft import PeftModel

from persona_probe.config import Training
from persona_probe.context import Context
from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError, TrainingDiverged
from persona_probe.finetune.data import arm_rows
from persona_probe.finetune.narrow import keep_good
from persona_probe.finetune.realign import Recorder, start_checkpoint, train_watched
from persona_probe.finetune.realignment.bench import Bench
from persona_probe.finetune.realignment.choose import choose_rows
from persona_probe.finetune.realignment.methods import as_one, organism_to_train
from persona_probe.finetune.realignment.outcome import outcome
from persona_probe.finetune.realignment.pair import Pair
from persona_probe.finetune.realignment.sets import Background, background, corrective_rows, refuse_overlap
from persona_probe.finetune.realignment.spec import Correction, slug
from persona_probe.finetune.sft import Fitted, check_rows
from persona_probe.models.adapters import is_adapter, strip_adapter

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
    with ctx.timed("realign"), ctx.run.staging(place) as folder:
        recorder = Recorder(ctx, name, seed, bench.base, bench.band, float(bench.base_evals["value"].mean()))
        fitted = _train(recorder, correction, chosen, folder, place)
        _write_lines(folder / ROWS, chosen)
        _write_json(folder / SPEC, spec)
        _write_outcome(bench, recorder, folder, fitted, said)
        ctx.run.record_hashes(folder, place)
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


def _train(
    recorder: Recorder, correction: Correction, rows: Sequence[Conversation], folder: Path, place: str
) -> Fitted:
    ctx, seed, training = recorder.ctx, recorder.seed, _training(recorder.ctx, correction)
    start = start_checkpoint(ctx, seed)
    tuned = organism_to_train(ctx.model, start, correction.method, training, seed)
    try:
        data, stop = " + ".join(correction.data), correction.stop_readings
        fitted = train_watched(recorder, tuned, rows, training, correction.schedule, stop, folder, data)
        as_one(tuned, checkpoint_in(folder), whole_weights=not is_adapter(start))
    except TrainingDiverged as error:
        raise TrainingDiverged(f"{recorder.arm}, seed {seed}: {error}; {keep_good(ctx, folder, place)}") from None
    finally:
        if isinstance(tuned, PeftModel):
            strip_adapter(tuned)
    return fitted


def checkpoint_in(folder: Path) -> Path:
    """The last checkpoint of a correction."""
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def _write_outcome(bench: Bench, recorder: Recorder, folder: Path, fitted: Fitted, said: Background) -> None:
    readings, evals = (pd.concat(frames, ignore_index=True) for frames in (recorder.readings, recorder.evals))
    readings.to_parquet(folder / "readings.parquet", index=False)
    evals.to_parquet(folder / "evals.parquet", index=False)
    _write_json(folder / "training.json", asdict(fitted))
    found = {**outcome(readings, evals, bench.base_evals, bench.band), **bench.after(checkpoint_in(folder))}
    base = {"base_reply_tokens": bench.base_reply_tokens, "base_explained_variance": bench.base.fit.explained_variance}
    _write_json(folder / OUTCOME, {**found, **base, **said.to_dict(), "rows": fitted.rows})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_lines(path: Path, rows: Sequence[Conversation]) -> None:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
