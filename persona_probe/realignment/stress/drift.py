"""Stress test 5: does the correction last? Four times the corrective training, and further training on unrelated rows.

Blocked features let misalignment re-emerge with longer training (BLOCK-EM, arXiv 2602.00767).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import nn

from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.tokens import conversation_batches
from persona_probe.errors import InputError
from persona_probe.monitor.band import Band, base_band
from persona_probe.monitor.reading import FeatureReader
from persona_probe.monitor.track import study_features
from persona_probe.realignment.corrected import CorrectedOrganism, continued, train
from persona_probe.realignment.outcome import difference
from persona_probe.realignment.stress.stress_table import Row, moved, row
from persona_probe.stats import Estimate, bootstrap_mean

TEST = "drift"
STAGES = ("repaired", "longer", "unrelated")


@dataclass(frozen=True)
class Stage:
    """A model at the end of a stage."""

    items: pd.DataFrame
    """Item table of the evaluation split."""
    feature: Estimate
    """Persona feature on probes that no stage trained on."""
    explained_variance: float


@dataclass(frozen=True)
class DriftTest:
    """The corrected model, after longer corrective training, and after unrelated training."""

    seed: int
    band: Band
    over_base: dict[str, Estimate]
    """Stage to the contrast index minus the base's (nats per token)."""
    change: dict[str, Estimate]
    """Stage to the index minus the corrected model's."""
    feature: dict[str, Estimate]
    explained_variance: dict[str, float]
    steps: dict[str, int]
    """Further steps of each stage."""

    def to_rows(self) -> list[Row]:
        """Index over the base, change, feature and explained variance of each stage."""
        rows = []
        for stage in STAGES:
            place = {"model": stage, "seed": self.seed, "step": self.steps[stage]}
            rows.append(row(TEST, "index minus base", value=self.over_base[stage], shown=True, **place))
            rows.append(
                row(TEST, "persona feature", value=self.feature[stage], unit="activation", reference=np.nan, **place)
            )
            value = self.explained_variance[stage]
            rows.append(row(TEST, "explained variance", value=value, unit="share", reference=np.nan, **place))
            if stage in self.change:
                rows.append(row(TEST, "change since repair", value=self.change[stage], **place))
        return rows

    def statement(self) -> str:
        """Stage by stage, whether index and feature stay."""
        longer, unrelated = (self._words(stage) for stage in ("longer", "unrelated"))
        return (
            f"Drift (base band {self.band.low:.3f} to {self.band.high:.3f}): after {self.steps['longer']} more "
            f"corrective steps {longer}; after {self.steps['unrelated']} steps on unrelated rows {unrelated}."
        )

    def _words(self, stage: str) -> str:
        change, feature = self.change[stage], self.feature[stage].estimate
        what = moved(change, "the index rises again", "the index falls further", "no change of the index is shown")
        place = "in its band" if self.band.holds(feature) else "outside its band"
        fitted, before = self.explained_variance[stage], self.explained_variance["repaired"]
        return (
            f"{what} ({change} nats/token, {self.over_base[stage]} over the base), feature {place} ({feature:.3f}; the "
            f"SAE explains {fitted:.2f}, of the corrected model {before:.2f})"
        )


def drift(corrected: CorrectedOrganism, factor: int = 4, unrelated: Sequence[Conversation] | None = None) -> DriftTest:
    """Train the corrected model further, in both ways, each time from its checkpoint.

    Args:
        factor: corrective training in all, as a multiple of what the correction took.
        unrelated: neutral answered rows; None takes every second probe, and the feature is read on the others.

    Raises:
        InputError: a factor below 2, or probes too few to divide.
    """
    if factor < 2:
        raise InputError(f"drift asks for {factor} times the corrective training: use 2 or more")
    rows, probes = divided(corrected.ctx.probes) if unrelated is None else (list(unrelated), corrected.ctx.probes)
    reader = _reader(corrected, probes)
    stages: dict[str, Stage] = {}
    band = Band(0.0, 0.0)
    for role in ("base", "repaired"):
        with corrected.model(role) as model:
            stages[role] = measured(corrected, reader, model)
            if role == "base":
                band = base_band(persona_values(reader, model), corrected.ctx.config.monitor.band_sd)
    steps = {"repaired": 0, "longer": (factor - 1) * corrected.steps, "unrelated": corrected.steps}
    stages["longer"] = trained_on(corrected, reader, corrected.corrective, steps["longer"], "longer")
    stages["unrelated"] = trained_on(corrected, reader, rows, steps["unrelated"], "unrelated")
    return DriftTest(
        corrected.seed,
        band,
        {name: difference(stages[name].items, stages["base"].items) for name in STAGES},
        {name: difference(stages[name].items, stages["repaired"].items) for name in STAGES[1:]},
        {name: stages[name].feature for name in STAGES},
        {name: stages[name].explained_variance for name in STAGES},
        steps,
    )


def divided(probes: Sequence[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
    """Probes to train on, and probes to read on: every second answered one, and all the others.

    Raises:
        InputError: too few, or none with an answer to learn.
    """
    training_probes = [talk for talk in probes[::2] if split_answer(talk)[1]]
    reading_probes = [talk for talk in probes if talk not in training_probes]
    if not training_probes or len(reading_probes) < 2:
        raise InputError("drift needs neutral answered rows: give `unrelated`, or a monitor.probes set with answers")
    return training_probes, reading_probes


def _reader(corrected: CorrectedOrganism, probes: Sequence[Conversation]) -> FeatureReader:
    """The study's reader on the probes that are not trained on."""
    ctx = corrected.ctx
    groups, positions = conversation_batches(ctx.tokenizer, probes), ctx.config.monitor.positions
    return FeatureReader(ctx.sae, study_features(ctx), groups, ctx.layer, positions, ctx.config.bf16)


def persona_values(reader: FeatureReader, model: nn.Module) -> np.ndarray:
    """The persona feature on each probe."""
    snapshot = reader.read(model)
    return snapshot.values[:, snapshot.names.index("persona")]


def measured(corrected: CorrectedOrganism, reader: FeatureReader, model: nn.Module) -> Stage:
    """Items and feature of a model."""
    snapshot = reader.read(model)
    values = snapshot.values[:, snapshot.names.index("persona")]
    return Stage(corrected.score(model), bootstrap_mean(values), snapshot.fit.explained_variance)


def trained_on(
    corrected: CorrectedOrganism, reader: FeatureReader, rows: Sequence[Conversation], steps: int, name: str
) -> Stage:
    """The corrected model after its own adapter was trained further."""
    training = corrected.training(steps)
    with continued(corrected, "repaired") as model:
        train(corrected, model, rows, training, corrected.seed, f"drift, {name}")
        return measured(corrected, reader, model)
