"""FeatureMonitor: reads persona features of a model while it trains."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.context import Context
from persona_probe.data.chat import Conversation, as_conversations
from persona_probe.data.load import evenly_spaced, load_conversations
from persona_probe.errors import InputError
from persona_probe.monitor.driving import Driven, with_file
from persona_probe.monitor.events import Alarm, Fault
from persona_probe.monitor.outlets import Outlets
from persona_probe.monitor.reading import Features, Snapshot
from persona_probe.monitor.records import Anchor
from persona_probe.monitor.setup import PROBES, Measure, OnReading, Schedule, Setup, Training, measures
from persona_probe.monitor.track import study_features
from persona_probe.saes.load import load_sae, sae_layer

if TYPE_CHECKING:
    from persona_probe.monitor.actions.action import Action
    from persona_probe.monitor.rules.rule import Rule
    from persona_probe.monitor.sinks.sink import Sink

Probes = str | Sequence[str | Conversation]


class FeatureMonitor(Driven):
    """A transformers `TrainerCallback` that reads features of a model while it trains, and sounds alarms.

    A *probe* reading runs a fixed set of prompts forward to the features' layer only, in eval mode without gradients;
    modes and random states are put back, so training goes on bit for bit as without it. A *passive* reading takes the
    training batch's own activations, from hooks: of the one optimizer step that is due, all its micro-batches pooled.
    Its forwards run on the weights before that step's update.

    Readings are compared with the base model: adapters off, or a full model as it is at the start. Passive readings
    alone are compared with the first step's, which is therefore always read.

    ```python
    monitor = pp.FeatureMonitor(sae, features={"toxic persona": 123}, probes="neutral_probes", every=5)
    trainer = SFTTrainer(..., callbacks=[monitor])
    trainer.train()
    monitor.readings
    ```

    Args:
        sae: a `sae_lens.SAE`, as `load_sae` gives; best on the model's device. None where all features are directions.
        features: name to latent index, to a direction (d_model,), or to a set of either (`{"traits": {...}}`).
        probes: a packaged set's name, or prompts or conversations; None takes 12 of the 64 `neutral_probes`, which at
            the default cadence cost at most 2% of a small model's training.
        every: read every so many optimizer steps (and at the start and the end); None is 25.
        steps: read at these steps instead (and at the end).
        layer: decoder layer; None takes it from the SAE's metadata.
        positions: tokens averaged over; None takes `response` where every probe has an answer, else `prompt`.
        tokenizer: needed where the trainer has none.
        path: JSON lines file to which each event is appended and flushed.
        bf16: bf16 autocast for probe readings.
        on_reading: called with (step, snapshot, model) after each reading.
        mode: `probe`, `passive` or `both`.
        rules: alarm rules (`persona_probe.monitor.rules`), asked after each reading.
        actions: what an alarm does (`persona_probe.monitor.actions`).
        sinks: where events go beside `path` (`persona_probe.monitor.sinks`).
        behaviour: measurements of what the model does, called with the model at readings: one, or several by name.
        behaviour_every: only at steps that this divides.
        on_error: what an error in a reading, rule, action, sink or measurement does: `off` records a fault, warns once
            and goes on without that part; `raise` raises. Bad input raises at the start in any case.
        passive_positions: `response` (labels other than -100; all tokens where the model is given no labels) or `all`
            tokens that are not padding.
        max_passive_tokens: tokens read passively per step, evenly spaced; None takes 4,096, or 512 where the whole
            dictionary is encoded.
        fit_every: reconstruct by the SAE (explained variance, L0) at every so many readings of a mode; between them an
            SAE whose latents do not compete is encoded at the chosen latents only.
        band_sd: half-width of the base band, in standard deviations between probes on the base.
        base: the base's readings, where the model at the start is none: a `Snapshot`, or the `path` of an earlier run.
            A full model that a trainer resumes finds them in its own `path`.
        values_path: folder for prompt-level values, a file per reading.
        log: log readings through the trainer, so that whatever `report_to` names shows them.

    Raises:
        InputError: unknown latent, probes or layer, a setting that does not exist, or an SAE that does not fit the
            model (when training starts).
    """

    def __init__(
        self,
        sae: Any | None,
        features: Features,
        probes: Probes | None = None,
        *,
        every: int | None = None,
        steps: Sequence[int] | None = None,
        layer: int | None = None,
        positions: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        path: str | Path | None = None,
        bf16: bool = True,
        on_reading: OnReading | None = None,
        mode: str = "probe",
        rules: "Sequence[Rule]" = (),
        actions: "Sequence[Action]" = (),
        sinks: "Sequence[Sink]" = (),
        behaviour: Measure | Mapping[str, Measure] | None = None,
        behaviour_every: int | None = None,
        on_error: str = "off",
        passive_positions: str = "response",
        max_passive_tokens: int | None = None,
        fit_every: int = 1,
        band_sd: float = 0.5,
        base: Anchor | Snapshot | str | Path | None = None,
        values_path: str | Path | None = None,
        log: bool = True,
    ) -> None:
        conversations = [] if mode == "passive" else _conversations(probes)
        answered = all(c[-1]["role"] == "assistant" for c in conversations)
        setup = Setup(
            sae=sae,
            features=features,
            probes=conversations,
            positions=positions or ("response" if answered else "prompt"),
            layer=_layer(sae, layer),
            schedule=Schedule.of(every, steps),
            mode=mode,
            bf16=bf16,
            fit_every=fit_every,
            band_sd=band_sd,
            base=base,
            path=Path(path) if path else None,
            values_path=Path(values_path) if values_path else None,
            passive_positions=passive_positions,
            max_passive_tokens=max_passive_tokens,
            behaviour=measures(behaviour),
            behaviour_every=behaviour_every,
            on_reading=on_reading,
        )
        super().__init__(setup, Outlets(rules, actions, with_file(sinks, path), on_error), tokenizer, log)

    @classmethod
    def from_study(cls, study: Any, **overrides: Any) -> Self:
        """The monitor of a study's features: its SAE, layer, probes, positions and base band.

        Args:
            study: a run folder's path, or a `Study`, after `locate`.
            overrides: arguments of `FeatureMonitor` that replace the study's.

        Raises:
            InputError: no run folder, or locate has not run.
        """
        return cls(**{**_from_study(study), **overrides})

    @property
    def positions(self) -> str:
        """Tokens of the probes that are averaged over."""
        return self.setup.positions

    @property
    def readings(self) -> pd.DataFrame:
        """All readings so far: step, mode, feature, mean, ci_low, ci_high, base_mean, base_sd, shift, ..."""
        return pd.DataFrame() if self._run is None else self._run.recorder.frame()

    @property
    def alarms(self) -> list[Alarm]:
        """All alarms so far."""
        return self.outlets.alarms

    @property
    def faults(self) -> list[Fault]:
        """What went wrong in the monitor itself, and is off."""
        return self.outlets.faults

    @property
    def base(self) -> Snapshot | None:
        """The base model's reading, where it was taken in this run."""
        return None if self._run is None else self._run.base

    @property
    def last_step(self) -> int:
        """Step of the latest reading, -1 before the first."""
        return -1 if self._run is None else self._run.last_step

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a reading at this step."""
        return self.setup.schedule.due(step)

    def start(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Anchor to the base model (adapters off) and get ready; a trainer and `watch` do it by themselves."""
        self.open(Training(model), tokenizer, 0, scoped=False)

    def read(self, model: nn.Module, step: int) -> Snapshot:
        """Run the probes on a model now and record it; what goes wrong raises."""
        run = self._run or self.open(Training(model), None, step, scoped=False)
        run.training.model = model
        return run.read_probes(step)[0]


def _conversations(probes: Probes | None) -> list[Conversation]:
    if probes is None:
        return evenly_spaced(load_conversations("neutral_probes"), PROBES)
    return load_conversations(probes) if isinstance(probes, str) else as_conversations(probes)


def _layer(sae: Any | None, layer: int | None) -> int:
    if layer is None and sae is None:
        raise InputError("without an SAE the layer is not known: pass layer=")
    return sae_layer(sae) if layer is None else layer


# --- The monitor of a study: its features, SAE, layer, probes, positions and base band


def study_monitor(
    ctx: Context, *, steps: Sequence[int], path: str | Path | None = None, **changes: Any
) -> FeatureMonitor:
    """The monitor of the study's features for a training run of the study itself.

    A reading that fails ends the run: a hole in a run would be a hole in the evidence.

    Args:
        steps: of the readings.
        path: JSON lines file of its events.
        changes: other arguments of `FeatureMonitor`.

    Raises:
        InputError: locate has not run.
    """
    fixed = {"sae": ctx.sae, "layer": ctx.layer, "steps": steps, "path": path, "on_error": "raise", "log": False}
    return FeatureMonitor(**{**_settings(ctx), **fixed, **changes})


def _from_study(study: Any) -> dict[str, Any]:
    """Arguments of `FeatureMonitor.from_study`; the study's model is not loaded."""
    ctx = Context.open(study) if isinstance(study, (str, Path)) else study.context
    settings, config = _settings(ctx), ctx.config
    sae = load_sae(config.sae, device=ctx.device)
    return {**settings, "sae": sae, "layer": sae_layer(sae) if config.layer is None else config.layer}


def _settings(ctx: Context) -> dict[str, Any]:
    """What every monitor of a study shares."""
    monitor = ctx.config.monitor
    return {
        "features": study_features(ctx),  # first: its error names the stage to run
        "probes": ctx.probes,
        "positions": monitor.positions,
        "band_sd": monitor.band_sd,
        "bf16": ctx.config.bf16,
    }
