"""One cell: trained under the monitor's eye, measured once, kept when whole."""

import gc
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
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
from persona_probe.mitigate.grid.config import BASE, CONTROL, DIVERGED, DONE, Cell, Grid, cells_of
from persona_probe.mitigate.grid.lab import Lab
from persona_probe.mitigate.grid.summary import summarise
from persona_probe.mitigate.grid.table import Results, mitigation_table
from persona_probe.mitigate.mitigation import Mitigation
from persona_probe.mitigate.train import train_mitigated
from persona_probe.models.adapters import folded, frozen_in_bf16
from persona_probe.models.layers import autocast, output_head
from persona_probe.monitor.monitor import FeatureMonitor, study_monitor
from persona_probe.report.export import export_figures
from persona_probe.report.records import load_records
from persona_probe.runs import write_text

# --- What one model does: every measure item by item, in one table

MEASURES = {
    "index": "contrast index of the evaluation split, nats per token",
    "dressed": "the same items dressed like the training data",
    "task": "contrast index of held-out questions of the narrow domain: bad minus good answer, nats per token",
    "neutral": "mean log-probability of neutral answers, nats per token",
    "persona": "reading of the persona feature on the monitor's probes",
}
"""What `items.parquet` holds: one value an item, model and measure."""


@dataclass(frozen=True)
class Measured:
    """One model's numbers."""

    items: pd.DataFrame
    """Columns measure, item, value."""
    explained_variance: float
    """Of the SAE on the probes."""
    answers: pd.DataFrame
    """Sampled answers: columns item, sample, question, answer; empty where none are asked for."""


def measure(lab: Lab, model: nn.Module, mitigation: Mitigation | None = None) -> Measured:
    """Measure a model as it would be used: with what the mitigation does at inference, and nothing else of it.

    Raises:
        TrainingDiverged: a score is not finite.
    """
    bf16 = lab.ctx.config.bf16
    with lab.ready(model), _used(lab, model, mitigation):
        scored = {name: contrast_index(model, items, bf16=bf16) for name, items in _contrast(lab).items()}
        neutral = answer_logprobs(model, lab.neutral, bf16=bf16)
        snapshot = lab.reader.read(model)
    persona = snapshot.values[:, snapshot.names.index("persona")]
    parts = [frame[["item", "value"]].assign(measure=name) for name, frame in scored.items()]
    parts += [_numbered("neutral", neutral), _numbered("persona", persona)]
    items = pd.concat(parts, ignore_index=True)[["measure", "item", "value"]]
    if not np.isfinite(items["value"]).all():
        raise TrainingDiverged("the trained model's scores are not finite: lower lr or the strength")
    return Measured(items, float(snapshot.fit.explained_variance), _sampled(lab, model, mitigation))


def _contrast(lab: Lab) -> dict[str, ContrastItems]:
    return {"index": lab.plain, "dressed": lab.dressed, "task": lab.task}


def _used(lab: Lab, model: nn.Module, mitigation: Mitigation | None) -> Any:
    return nullcontext() if mitigation is None else mitigation.at_evaluation(model, lab.inputs)


def _numbered(name: str, values: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"measure": name, "item": [f"{name} {n:03d}" for n in range(len(values))], "value": values})


def _sampled(lab: Lab, model: nn.Module, mitigation: Mitigation | None) -> pd.DataFrame:
    """Answers to the grid's questions; all models draw with the same random numbers."""
    wanted = lab.grid.answers
    if wanted is None:
        return pd.DataFrame()
    prompts = [row for row in load_data(wanted.questions, allow_prompts=True) for _ in range(wanted.n)]
    prompts = [row[:-1] if row[-1]["role"] == "assistant" else row for row in prompts]
    bf16 = lab.ctx.config.bf16
    with (
        folded(model, bf16),
        frozen_in_bf16(output_head(model), lab.in_bf16),
        _used(lab, model, mitigation),
        autocast(model, bf16),
    ):
        answers = sample_answers(
            model,
            lab.ctx.tokenizer,
            prompts,
            max_new_tokens=wanted.max_new_tokens,
            temperature=wanted.temperature,
            seed=lab.ctx.seed,
        )
    places = [divmod(place, wanted.n) for place in range(len(prompts))]
    return pd.DataFrame(
        {
            "item": [f"question {number:03d}" for number, _ in places],
            "sample": [sample for _, sample in places],
            "question": [question(prompt) for prompt in prompts],
            "answer": answers,
        }
    )


def ruled(lab: Lab, answers: pd.DataFrame) -> pd.DataFrame:
    """Sampled answers with the judge's rulings, as `evaluate.rates.rate_of` takes them, but for arm and seed."""
    if answers.empty:
        return answers
    items = [Item(str(row["question"]), str(row["answer"]), str(n)) for n, row in enumerate(answers.to_dict("records"))]
    try:
        found = lab.judge.rule([AnswerToJudge(item) for item in items])
    except InputError as error:  # nothing that a judge could read is a finding, not the end of the grid
        return answers.assign(pair=answers["item"], value=np.nan, coherent=np.nan, usable=0.0, why=str(error))
    rows = pd.DataFrame([ruling.to_row() for ruling in found.rulings], index=answers.index)
    kinds = {"value": "float64", "coherent": "float64", "alignment": "float64", "coherence": "float64"}
    kinds |= {"error_model": "float64", "error_question": "float64", "usable": "float64"}
    return pd.concat([answers, rows.astype(kinds)], axis=1).assign(pair=answers["item"], why=found.why)


log = logging.getLogger(__name__)


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
        counted = self.seconds[1:] or self.seconds
        return float(np.mean(counted)) if counted else float("nan")


def measure_base(lab: Lab) -> None:
    """Measure the base model, unless that is done."""
    if lab.folder.has(BASE):
        return
    with lab.folder.timed(BASE), lab.folder.staging(BASE) as folder:
        measured = measure(lab, lab.ctx.model)
        _write(folder, lab, measured, {"state": DONE, "explained_variance": measured.explained_variance})


def run_cell(lab: Lab, cell: Cell) -> None:
    """Train and measure a cell, unless it is there; its folder `cells/<id>` appears when it is whole.

    A run that diverges is recorded as such: it is a result.

    Raises:
        InputError: the cell that is there was made with other settings.
    """
    name = f"cells/{cell.id}"
    if lab.folder.has(name):
        check_same(lab, cell)
        return
    log.info("cell %s", cell.id)
    with lab.folder.timed(name), lab.folder.staging(name) as folder:
        record: dict[str, Any] = {"settings": cell.settings}
        try:
            measured, told = _fit(lab, cell, folder)
            record |= {"state": DONE, **told, "explained_variance": measured.explained_variance}
        except TrainingDiverged as error:
            measured, record = None, {**record, "state": DIVERGED, "error": str(error)}
        except InputError as error:
            raise InputError(f"cell {cell.id}: {error}") from error
        _write(folder, lab, measured, record)


def check_same(lab: Lab, cell: Cell) -> None:
    """Refuse a cell that was made with other settings.

    Raises:
        InputError: it was.
    """
    if lab.folder.read_json(f"cells/{cell.id}/cell.json")["settings"] != cell.settings:
        raise InputError(f"cell {cell.id!r} was made with other settings: give it a label, or choose another --out")


def _fit(lab: Lab, cell: Cell, folder: Path) -> tuple[Measured, dict[str, Any]]:
    training, rows = lab.grid.fitted, lab.sets.good if cell.label == CONTROL else lab.sets.bad
    clock, monitor, inputs = StepClock(), _monitor(lab, folder), lab.inputs
    try:
        with stripping(with_adapter(lab.ctx.model, training, cell.seed)) as tuned:
            start = time.perf_counter()
            with _weights(folder, lab.grid.keep_weights) as weights:
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
            measured = measure(lab, tuned, cell.mitigation)
    finally:
        gc.collect()  # trainer and callbacks refer to each other: a cell's optimizer would outlive it
    steps = {"steps": len(fitted.losses), "seconds_per_step": clock.per_step, "training_seconds": seconds}
    data = {"rows": fitted.rows, "answer_tokens": fitted.answer_tokens, "corrective_steps": len(fitted.corrected)}
    return measured, {**steps, **data, "losses": fitted.losses}


def _monitor(lab: Lab, folder: Path) -> FeatureMonitor:
    """The study's features at start, middle and end."""
    last = lab.grid.training.steps
    return study_monitor(lab.ctx, steps=sorted({0, last // 2, last}), path=folder / "monitor.jsonl")


@contextmanager
def _weights(folder: Path, keep: bool) -> Iterator[Path]:
    """Where checkpoints go: below the cell, or to a place that is thrown away."""
    if keep:
        yield folder / "weights"
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def _write(folder: Path, lab: Lab, measured: Measured | None, record: dict[str, Any]) -> None:
    if measured is not None:
        measured.items.to_parquet(folder / "items.parquet", index=False)
        if lab.grid.answers is not None:
            ruled(lab, measured.answers).to_parquet(folder / "answers.parquet", index=False)
    (folder / "cell.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


# --- The whole grid: every cell in turn, then the table, the verdicts and the figure

log = logging.getLogger(__name__)
TABLE = "mitigations.parquet"


@dataclass(frozen=True)
class Outcome:
    """What a grid has so far."""

    table: pd.DataFrame
    """One row a cell (`kind` "cell"), and one a mitigation and strength over all seeds (`kind` "all")."""
    summary: dict[str, Any]
    """What summary.json holds."""
    missing: tuple[str, ...]
    """Cells that are still to be trained."""


def run_grid(
    grid: Grid,
    out: Path,
    device: str | None = None,
    run: Path | None = None,
    only: Sequence[str] | None = None,
    judge: AnswerJudge | None = None,
) -> Outcome:
    """Train and measure the cells that are not in the folder yet, then write tables; a stopped grid goes on.

    Args:
        grid: see `mitigate.config`.
        out: the grid's folder.
        device: instead of the study's.
        run: the located run, instead of the grid's own.
        only: labels or names of mitigations to train now, with the cells without a mitigation.
        judge: rules on sampled answers, instead of the packaged offline judge.

    Raises:
        InputError: an unknown mitigation, a run without locate, rows that overlap what is evaluated, a mitigation
            that lacks something, or a folder of other settings. All of it before anything is trained.
    """
    every, wanted = cells_of(grid), cells_of(grid, only)
    lab = Lab(grid, out, device, run, judge)
    if grid.answers is not None:
        _ = lab.judge  # one that is not to be had is told now, not after an hour
    there = [cell for cell in every if lab.folder.has(f"cells/{cell.id}")]
    for cell in there:
        check_same(lab, cell)
    measure_base(lab)
    for cell in wanted:
        cell.mitigation.check(lab.inputs)
    for cell in wanted:
        run_cell(lab, cell)
    return write_results(lab, every)


def write_results(lab: Lab, cells: Sequence[Cell]) -> Outcome:
    """Write items.parquet, mitigations.parquet and .csv, summary.json and the figure, of the cells that are there."""
    there = [cell for cell in cells if lab.folder.has(f"cells/{cell.id}")]
    results = Results.read(lab.folder, there)
    table = mitigation_table(results, lab.band, lab.grid.perplexity_bound)
    missing = tuple(cell.id for cell in cells if cell not in there)
    head = {"grid": lab.grid.name, "model": lab.ctx.config.model, "sae": lab.ctx.config.sae}
    head |= {"persona_latent": lab.latents[0], "seeds": list(lab.grid.seeds)}
    summary = {**head, **summarise(table, missing), "seconds": lab.folder.manifest["seconds"]}
    lab.folder.write_table("items.parquet", results.items)
    if not results.answers.empty:
        lab.folder.write_table("answers.parquet", results.answers)
    lab.folder.write_table(TABLE, table)
    write_text(lab.folder.path / "mitigations.csv", table.to_csv(index=False))
    lab.folder.write_json("summary.json", summary)
    export_figures(load_records(lab.folder.path), lab.folder.path / "figures", only=["mitigation_pareto"])
    diverged = [cell["cell"] for cell in results.records if cell["state"] == DIVERGED]
    log.info("%d cells, %d diverged, %d missing; base measured in %s", len(there), len(diverged), len(missing), BASE)
    return Outcome(table, summary, missing)
