"""The monitor acts: known answers with a scripted feature, and the real monitor on the tiny model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from transformers import TrainerCallback

from persona_probe.data.chat import Conversation
from persona_probe.data.tokens import batches
from persona_probe.finetune.sft import fine_tune
from persona_probe.finetune.trainer import Inputs, Residuals
from persona_probe.mitigate import watched
from persona_probe.mitigate.methods import make_mitigation
from persona_probe.mitigate.mitigation import MitigatedRun
from persona_probe.mitigate.watched import Alternating, widened
from persona_probe.monitor.band import Band
from persona_probe.monitor.reading import FeatureReader, Snapshot
from persona_probe.monitor.settings import OnReading
from persona_probe.saes.read import FitMoments
from tests.factories import make_model
from tests.mitigate.mitigation_inputs import ABOVE_ALL, ROWS, TRAINING, fresh, make_inputs, one_step, told, train

SIX = replace(TRAINING, steps=6)
BAND = make_inputs(band=Band(-1.0, 1.0))


@dataclass
class Scripted(TrainerCallback):
    """A monitor whose feature does what the test says."""

    script: dict[int, float]
    on_reading: OnReading

    def _say(self, step: int, model: Any) -> None:
        if step in self.script:
            values, none = np.full((2, 1), self.script[step]), np.zeros(1)
            self.on_reading(step, Snapshot(("persona",), (3,), values, none, none, FitMoments()), model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._say(0, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._say(state.global_step, kwargs["model"])


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    values: dict[int, float] = {}
    monkeypatch.setattr(watched, "persona_monitor", lambda run, every, on_reading: Scripted(values, on_reading))
    return values


@pytest.mark.parametrize(
    ("readings", "strength", "patience", "steps"),
    [
        ({0: 0.0, 2: 0.9, 4: 1.1, 6: 9.0}, 1.0, 1, 4),
        ({0: 0.0, 2: 0.9, 4: 1.1, 6: 9.0}, 0.5, 1, 2),
        ({0: 0.0, 1: 2.0, 2: 0.0, 3: 2.0, 4: 2.0, 5: 2.0}, 1.0, 2, 4),
        ({0: 0.0, 2: -9.0, 4: 1.9, 6: 2.0}, 2.0, 1, 6),  # below, inside what is allowed, and on its edge
    ],
)
def test_early_stop_stops_at_the_step_that_crosses(
    readings: dict[int, float], strength: float, patience: int, steps: int, script: dict[int, float], tmp_path: Path
) -> None:
    script.update(readings)
    fitted = train(tmp_path, make_mitigation("early_stop", strength, patience=patience), SIX, inputs=BAND)
    assert len(fitted.losses) == steps and (tmp_path / f"checkpoint-{steps}").is_dir()
    assert fitted.readings == [(s, v) for s, v in readings.items() if s <= steps]


@pytest.mark.parametrize(
    ("readings", "strength", "corrected"),
    [
        ({0: 0.0, 2: 5.0, 4: 0.5}, 1.0, [3, 4]),
        ({0: 0.0, 2: 5.0, 4: 0.5, 5: 1.5}, 1.0, [3, 4, 6]),
        ({0: 2.0}, 1.0, [1, 2, 3, 4, 5, 6]),
        ({0: 2.0}, 0.5, [2, 4, 6]),
        ({0: 2.0}, 1 / 3, [3, 6]),
        ({0: -5.0, 3: 1.0}, 1.0, []),
    ],
)
def test_alternating_switches_at_the_band(readings: dict[int, float], strength: float, corrected: list[int]) -> None:
    mitigation, run = Alternating(strength=strength), MitigatedRun(fresh(), BAND, SIX, 0)
    found = []
    for step in range(6):
        if step in readings:
            mitigation.see(run, step, readings[step])
        found += [step + 1] if mitigation.corrects(run) else []
    assert found == corrected and run.readings == list(readings.items())


def test_alternating_switches_in_a_run(script: dict[int, float], tmp_path: Path) -> None:
    script.update({0: 0.0, 2: 5.0, 4: 0.5, 5: 1.5})
    fitted = train(tmp_path, make_mitigation("alternating", 1.0), SIX, inputs=BAND)
    assert fitted.corrected == [3, 4, 6] and len(fitted.losses) == 6


@dataclass
class Witness:
    """An `ExtraLoss` that swaps the second step's batch and reads what is trained on."""

    rows: Sequence[Conversation]
    layer: int | None = None
    seen: list[list[str]] = field(default_factory=list)

    def swaps(self, step: int) -> bool:
        return step == 1

    def penalty(self, step: int, inputs: Inputs, resid: Residuals | None) -> Tensor | None:
        answers = [ids[mask] for ids, mask in zip(inputs["input_ids"], inputs["labels"] != -100, strict=True)]
        self.seen.append([str(BAND.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers])
        return None


def test_a_swapped_step_trains_on_the_other_rows_as_a_run_on_them_alone_would(tmp_path: Path) -> None:
    good = told("good", 4)
    witness, frozen = Witness(good), replace(one_step(), batch_size=4, steps=3, lr=1e-12)
    swapped = fine_tune(fresh(), BAND.tokenizer, ROWS, frozen, seed=0, folder=tmp_path / "a", extra=witness)
    kinds = [{answer in {c[-1]["content"] for c in good} for answer in answers} for answers in witness.seen]
    assert kinds == [{False}, {True}, {False}]
    alone = fine_tune(fresh(), BAND.tokenizer, good, frozen, seed=0, folder=tmp_path / "b")
    assert swapped.losses[1] == pytest.approx(alone.losses[1], rel=1e-4)
    assert swapped.losses[0] != pytest.approx(alone.losses[0], rel=1e-2)


def by_reader(persona: Any, probes: Sequence[Conversation]) -> float:
    """The persona's mean on the base."""
    positions = "response" if probes[0][-1]["role"] == "assistant" else "prompt"
    sae = None if isinstance(persona, Tensor) else BAND.sae
    groups = list(batches(BAND.tokenizer, probes))
    reader = FeatureReader(sae, {"persona": persona}, groups, BAND.layer, positions, bf16=False)
    return float(reader.read(make_model()).values.mean())


@pytest.mark.parametrize(
    ("name", "parts", "steps", "corrected"),
    [
        ("early_stop", {"band": ABOVE_ALL}, 1, []),
        ("early_stop", {"band": Band(-1e9, 1e9), "sae": None}, 2, []),
        ("alternating", {"band": ABOVE_ALL, "probes": [c[:-1] for c in told("probe", 3)]}, 2, [1, 2]),
        ("alternating", {"band": Band(-1e9, 1e9)}, 2, []),
    ],
)
def test_the_real_monitor_reads_latent_or_direction(
    name: str, parts: dict[str, Any], steps: int, corrected: list[int], tmp_path: Path
) -> None:
    training = replace(TRAINING, steps=2)
    fitted = train(tmp_path, make_mitigation(name, 1.0, every=1), training, inputs=make_inputs(**parts))
    assert (len(fitted.losses), fitted.corrected) == (steps, corrected)
    assert [step for step, _ in fitted.readings] == list(range(steps + 1))
    start = fitted.readings[0][1]
    wanted = make_inputs(**parts).persona
    assert start == pytest.approx(by_reader(wanted, make_inputs(**parts).probes), rel=1e-4)


def test_a_band_is_widened_about_its_centre() -> None:
    assert widened(Band(1.0, 3.0), 2.0) == Band(0.0, 4.0)
    assert widened(Band(1.0, 3.0), 1.0) == Band(1.0, 3.0)
