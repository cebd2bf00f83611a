"""One cell: trained under the monitor's eye, measured once, kept when whole."""

import gc
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from persona_probe.errors import InputError, TrainingDiverged
from persona_probe.finetune.mitigations import train_mitigated
from persona_probe.finetune.sft import with_adapter
from persona_probe.mitigate.cells import Cell
from persona_probe.mitigate.config import BASE, CONTROL
from persona_probe.mitigate.lab import Lab
from persona_probe.mitigate.measure import Measured, measure, ruled
from persona_probe.models.adapters import strip_adapter
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.track import study_features

log = logging.getLogger(__name__)
DONE, DIVERGED = "done", "diverged"


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
    with lab.timed(BASE), lab.folder.staging(BASE) as folder:
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
    with lab.timed(name), lab.folder.staging(name) as folder:
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
    clock, monitor, ground = StepClock(), _monitor(lab, folder), lab.ground
    tuned = with_adapter(lab.ctx.model, training, cell.seed)
    assert isinstance(tuned, PeftModel)
    try:
        start = time.perf_counter()
        with _weights(folder, lab.grid.keep_weights) as weights:
            fitted = train_mitigated(
                tuned,
                ground,
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
        strip_adapter(tuned)
        gc.collect()  # trainer and callbacks refer to each other: a cell's optimizer would outlive it
    steps = {"steps": len(fitted.losses), "seconds_per_step": clock.per_step, "training_seconds": seconds}
    data = {"rows": fitted.rows, "answer_tokens": fitted.answer_tokens, "corrective_steps": len(fitted.corrected)}
    return measured, {**steps, **data, "losses": fitted.losses}


def _monitor(lab: Lab, folder: Path) -> FeatureMonitor:
    """The study's features at start, middle and end."""
    last = lab.grid.training.steps
    return FeatureMonitor(
        lab.ctx.sae,
        study_features(lab.ctx),
        lab.ctx.probes,
        steps=sorted({0, last // 2, last}),
        layer=lab.ctx.layer,
        positions=lab.ctx.config.monitor.positions,
        bf16=lab.ctx.config.bf16,
        path=folder / "monitor.jsonl",
        band_sd=lab.ctx.config.monitor.band_sd,
        on_error="raise",  # a hole in a cell would be a hole in the evidence
        log=False,
    )


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
