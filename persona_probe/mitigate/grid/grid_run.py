"""Run a grid: each cell is trained with the monitor attached, measured once and kept when whole; then the tables."""

import gc
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from persona_probe.data.check import question
from persona_probe.data.load import load_data
from persona_probe.errors import InputError, TrainingDiverged
from persona_probe.evaluate.answers import answer_logprobs
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.evaluate.judges.replies import Item
from persona_probe.evaluate.judging import AnswerJudge, AnswerToJudge
from persona_probe.evaluate.sampling.samples import sample_answers
from persona_probe.finetune.sft import stripping, with_adapter
from persona_probe.mitigate.grid.grid_config import BASE, CONTROL, DIVERGED, DONE, Cell, Grid, cells_of
from persona_probe.mitigate.grid.grid_context import GridContext
from persona_probe.mitigate.grid.grid_summary import summarise
from persona_probe.mitigate.grid.grid_table import Results, mitigation_table
from persona_probe.mitigate.mitigated_training import train_mitigated
from persona_probe.mitigate.mitigation import Mitigation
from persona_probe.models.adapters import folded, frozen_in_bf16
from persona_probe.models.layers import autocast, output_head
from persona_probe.monitor.monitor import FeatureMonitor, study_monitor
from persona_probe.report.export import export_figures
from persona_probe.report.records import load_records
from persona_probe.units import Unit, Workers, make_units, writes_run
from persona_probe.untrusted import csv_text
from persona_probe.writing import write_json, write_table, write_text

log = logging.getLogger(__name__)

# --- What one model does: every measure item by item, in one table

MEASURES = {
    "index": "contrast index of the evaluation split, nats per token",
    "dressed": "the same items dressed like the training data",
    "task": "contrast index of held-out questions of the narrow domain: bad minus good answer, nats per token",
    "neutral": "mean log-probability of neutral answers, nats per token",
    "persona": "reading of the persona feature on the monitor's probes",
}
"""Measures in `items.parquet`: one value for each item, model and measure."""


@dataclass(frozen=True)
class ModelNumbers:
    """One model's numbers."""

    items: pd.DataFrame
    """Columns measure, item, value."""
    explained_variance: float
    """Explained variance of the SAE on the probes."""
    answers: pd.DataFrame
    """Sampled answers: columns item, sample, question, answer, steered; empty if the grid samples none."""


def measure(context: GridContext, model: nn.Module, mitigation: Mitigation | None = None) -> ModelNumbers:
    """Measure a model as it would be used: with the part of the mitigation that acts at inference, and no other.

    Raises:
        TrainingDiverged: a score is not finite.
    """
    bf16 = context.study.config.bf16
    with context.ready(model), _used(context, model, mitigation):
        tables = {name: contrast_index(model, items, bf16=bf16) for name, items in _contrast(context).items()}
        neutral = answer_logprobs(model, context.neutral, bf16=bf16)
        snapshot = context.reader.read(model)
    persona = snapshot.values[:, snapshot.names.index("persona")]
    parts = [frame[["item", "value"]].assign(measure=name) for name, frame in tables.items()]
    parts += [_numbered("neutral", neutral), _numbered("persona", persona)]
    items = pd.concat(parts, ignore_index=True)[["measure", "item", "value"]]
    if not np.isfinite(items["value"]).all():
        raise TrainingDiverged("the trained model's scores are not finite: lower lr or the strength")
    return ModelNumbers(items, float(snapshot.fit.explained_variance), _sampled(context, model, mitigation))


def _contrast(context: GridContext) -> dict[str, ContrastItems]:
    return {"index": context.plain, "dressed": context.dressed, "task": context.task}


def _used(context: GridContext, model: nn.Module, mitigation: Mitigation | None) -> Any:
    return nullcontext() if mitigation is None else mitigation.at_evaluation(model, context.inputs)


def _numbered(name: str, values: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"measure": name, "item": [f"{name} {n:03d}" for n in range(len(values))], "value": values})


def _sampled(context: GridContext, model: nn.Module, mitigation: Mitigation | None) -> pd.DataFrame:
    """Answers to the grid's questions; all models draw with the same random numbers."""
    settings = context.grid.answers
    if settings is None:
        return pd.DataFrame()
    prompts = [row for row in load_data(settings.questions, allow_prompts=True) for _ in range(settings.n)]
    prompts = [row[:-1] if row[-1]["role"] == "assistant" else row for row in prompts]
    bf16 = context.study.config.bf16
    with (
        folded(model, bf16),
        frozen_in_bf16(output_head(model), context.in_bf16),
        _used(context, model, mitigation),
        autocast(model, bf16),
    ):
        answers = sample_answers(
            model,
            context.study.tokenizer,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=context.study.seed,
        )
    places = [divmod(place, settings.n) for place in range(len(prompts))]
    return pd.DataFrame(
        {
            "item": [f"question {number:03d}" for number, _ in places],
            "sample": [sample for _, sample in places],
            "question": [question(prompt) for prompt in prompts],
            "answer": answers,
            "steered": mitigation is not None and mitigation.steers,
        }
    )


def ruled(context: GridContext, answers: pd.DataFrame) -> pd.DataFrame:
    """Sampled answers with the judge's rulings, as `evaluate.rates.rate_of` takes them, but for arm and seed."""
    if answers.empty:
        return answers
    to_judge = [
        AnswerToJudge(Item(str(row["question"]), str(row["answer"]), str(n)), steered=bool(row["steered"]))
        for n, row in enumerate(answers.to_dict("records"))
    ]
    try:
        ruled_answers = context.judge.rule(to_judge)
    except InputError as error:  # nothing that a judge could read is a finding, not the end of the grid
        return answers.assign(pair=answers["item"], value=np.nan, coherent=np.nan, usable=0.0, why=str(error))
    rows = pd.DataFrame([ruling.to_row() for ruling in ruled_answers.rulings], index=answers.index)
    kinds = {"value": "float64", "coherent": "float64", "alignment": "float64", "coherence": "float64"}
    kinds |= {"error_model": "float64", "error_question": "float64", "usable": "float64"}
    return pd.concat([answers, rows.astype(kinds)], axis=1).assign(pair=answers["item"], why=ruled_answers.why)


@dataclass
class StepClock(TrainerCallback):
    """Wall seconds of every optimizer step, from its begin to its end; the monitor's readings come after."""

    seconds: list[float] = field(default_factory=list)
    _begun: float = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read the clock."""
        self.seconds.append(time.perf_counter() - self._begun)

    @property
    def per_step(self) -> float:
        """Mean seconds a step, without the first, which also warms up; NaN before any step."""
        seconds = self.seconds[1:] or self.seconds
        return float(np.mean(seconds)) if seconds else float("nan")


def base_units(context: GridContext) -> list[Unit]:
    """One unit: the base model, measured."""
    return [Unit(BASE, partial(measure_base, context), BASE)]


def measure_base(context: GridContext) -> None:
    """Measure the base model."""
    with context.folder.staging(BASE) as folder:
        model_numbers = measure(context, context.study.model)
        _write(folder, context, model_numbers, {"state": DONE, "explained_variance": model_numbers.explained_variance})


def cell_units(cells: Sequence[Cell], context: GridContext) -> list[Unit]:
    """One unit for each cell.

    Raises:
        InputError: a finished cell was made with other settings (raised when it is asked for).
    """
    return [
        Unit(place, partial(run_cell, context, cell), place, partial(_finished, context, cell))
        for cell in cells
        for place in [f"cells/{cell.id}"]
    ]


def run_cell(context: GridContext, cell: Cell) -> None:
    """Train and measure a cell; its folder `cells/<id>` appears when it is whole.

    A run that diverges is recorded as such: it is a result.
    """
    log.info("cell %s", cell.id)
    with context.folder.staging(f"cells/{cell.id}") as folder:
        record: dict[str, Any] = {"settings": cell.settings}
        try:
            model_numbers, numbers = _fit(context, cell, folder)
            record |= {"state": DONE, **numbers, "explained_variance": model_numbers.explained_variance}
        except TrainingDiverged as error:
            model_numbers, record = None, {**record, "state": DIVERGED, "error": str(error)}
        except InputError as error:
            raise InputError(f"cell {cell.id}: {error}") from error
        _write(folder, context, model_numbers, record)


def _finished(context: GridContext, cell: Cell) -> bool:
    """Whether a cell is in the folder; one that was made with other settings is refused."""
    change = "give it a label, or choose another --out"
    return context.folder.finished(f"cells/{cell.id}", cell.settings, "cell.json", change)


def _fit(context: GridContext, cell: Cell, folder: Path) -> tuple[ModelNumbers, dict[str, Any]]:
    training, rows = context.grid.fitted, context.sets.good if cell.label == CONTROL else context.sets.bad
    clock, monitor, inputs = StepClock(), _monitor(context, folder), context.inputs
    try:
        with stripping(with_adapter(context.study.model, training, cell.seed)) as tuned:
            start = time.perf_counter()
            with _weights(folder, context.grid.keep_weights) as weights:
                fitted = train_mitigated(
                    tuned,
                    inputs,
                    rows,
                    training,
                    cell.mitigation,
                    seed=cell.seed,
                    folder=weights,
                    callbacks=[clock, monitor],
                    progress=cell.id,
                )
            seconds = time.perf_counter() - start
            model_numbers = measure(context, tuned, cell.mitigation)
    finally:
        gc.collect()  # trainer and callbacks refer to each other: a cell's optimizer would outlive it
    steps = {"steps": len(fitted.losses), "seconds_per_step": clock.per_step, "training_seconds": seconds}
    data = {"rows": fitted.rows, "answer_tokens": fitted.answer_tokens, "corrective_steps": len(fitted.corrected)}
    return model_numbers, {**steps, **data, "losses": fitted.losses}


def _monitor(context: GridContext, folder: Path) -> FeatureMonitor:
    """The study's features at start, middle and end."""
    last = context.grid.training.steps
    return study_monitor(context.study, steps=sorted({0, last // 2, last}), path=folder / "monitor.jsonl")


@contextmanager
def _weights(folder: Path, keep: bool) -> Iterator[Path]:
    """Where checkpoints go: below the cell, or to a folder that is deleted."""
    if keep:
        yield folder / "weights"
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def _write(folder: Path, context: GridContext, model_numbers: ModelNumbers | None, record: dict[str, Any]) -> None:
    if model_numbers is not None:
        write_table(folder / "items.parquet", model_numbers.items)
        if context.grid.answers is not None:
            write_table(folder / "answers.parquet", ruled(context, model_numbers.answers))
    write_json(folder / "cell.json", record)


# --- The whole grid: every cell, then the table, the verdicts and the figure

TABLE = "mitigations.parquet"


@dataclass(frozen=True)
class Outcome:
    """The results of a grid so far."""

    table: pd.DataFrame
    """One row a cell (`kind` "cell"), and one a mitigation and strength over all seeds (`kind` "all")."""
    summary: dict[str, Any]
    """What summary.json holds."""
    missing: tuple[str, ...]
    """Cells that are not trained yet."""


def run_grid(
    grid: Grid,
    out: Path,
    device: str | None = None,
    run: Path | None = None,
    only: Sequence[str] | None = None,
    judge: AnswerJudge | None = None,
    workers: Workers | None = None,
) -> Outcome:
    """Train and measure the cells that are not in the folder yet, then write the tables. It resumes if interrupted.

    Args:
        grid: see `grid_config`.
        out: the grid's folder.
        device: instead of the study's.
        run: the located run, instead of that of the grid.
        only: labels or names of mitigations to train now, with the cells without a mitigation.
        judge: rules on sampled answers, instead of the packaged offline judge.
        workers: processes that train the cells, such as `cluster.RayWorkers`; None trains them in this one.

    Raises:
        InputError: before anything is trained: an unknown mitigation, a run without locate, rows that overlap what is
            evaluated, a mitigation that lacks an input, a folder of other settings, or one that another process writes.
    """
    all_cells, cells = cells_of(grid), cells_of(grid, only)
    context = GridContext(grid, out, device, run, judge)
    context.workers = workers
    return _run_cells(context, all_cells, cells)


@writes_run
def _run_cells(context: GridContext, all_cells: Sequence[Cell], cells: Sequence[Cell]) -> Outcome:
    if context.grid.answers is not None:
        _ = context.judge  # fail now rather than an hour in if the judge is not available
    for cell in all_cells:
        _finished(context, cell)
    make_units(context, base_units)
    for cell in cells:
        cell.mitigation.check(context.inputs)
    make_units(context, partial(cell_units, tuple(cells)))
    return write_results(context, all_cells)


def write_results(context: GridContext, cells: Sequence[Cell]) -> Outcome:
    """Write items.parquet, mitigations.parquet and .csv, summary.json and the figure, of the finished cells."""
    finished = [cell for cell in cells if context.folder.has(f"cells/{cell.id}")]
    results = Results.read(context.folder, finished)
    table = mitigation_table(results, context.band, context.grid.perplexity_bound, context.grid.margin)
    missing = tuple(cell.id for cell in cells if cell not in finished)
    head = {"grid": context.grid.name, "model": context.study.config.model, "sae": context.study.config.sae}
    head |= {"persona_latent": context.latents[0], "seeds": list(context.grid.seeds)}
    head |= {"base_band": asdict(context.band), "margin": context.grid.margin}
    summary = {**head, **summarise(table, missing), "seconds": context.folder.manifest["seconds"]}
    context.folder.write_table("items.parquet", results.items)
    if not results.answers.empty:
        context.folder.write_table("answers.parquet", results.answers)
    context.folder.write_table(TABLE, table)
    write_text(context.folder.path / "mitigations.csv", csv_text(table))
    context.folder.write_json("summary.json", summary)
    export_figures(load_records(context.folder.path), context.folder.path / "figures", only=["mitigation_pareto"])
    diverged = [cell["cell"] for cell in results.records if cell["state"] == DIVERGED]
    log.info("%d cells, %d diverged, %d missing; base measured in %s", len(finished), len(diverged), len(missing), BASE)
    return Outcome(table, summary, missing)
