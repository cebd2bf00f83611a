"""FeatureMonitor: reads persona features of a model while it trains."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from persona_probe.data.chat import Conversation, as_conversations
from persona_probe.data.packaged import load_conversations
from persona_probe.data.tokens import batches
from persona_probe.errors import InputError
from persona_probe.models.adapters import base_weights
from persona_probe.monitor.reading import FeatureReader, Features, Snapshot
from persona_probe.saes.load import check_fit, sae_layer

log = logging.getLogger(__name__)

Probes = str | Sequence[str | Conversation]


class FeatureMonitor(TrainerCallback):
    """A transformers `TrainerCallback` that reads features on a fixed probe set during training.

    A reading runs the probes forward to the SAE's layer only, in eval mode without gradients; module modes and random
    state are put back, so training goes on bit for bit as without it.

    ```python
    monitor = pp.FeatureMonitor(sae, features={"toxic persona": 123}, probes="neutral_probes", every=5)
    trainer = SFTTrainer(..., callbacks=[monitor])
    trainer.train()
    monitor.readings
    ```

    Args:
        sae: a `sae_lens.SAE`, as `load_sae` gives.
        features: name to latent index, or to a direction (d_model,).
        probes: a packaged set's name, or prompts or conversations.
        every: read every so many optimizer steps (and at the start and the end).
        steps: read at these steps instead (and at the end).
        layer: decoder layer; None takes it from the SAE's metadata.
        positions: tokens averaged over; None takes `response` where every probe has an answer, else `prompt`.
        tokenizer: needed where the trainer has none.
        path: JSON lines file to which each reading is appended and flushed.
        bf16: bf16 autocast for readings.
        on_reading: called with (step, snapshot, model) after each reading.

    Raises:
        InputError: unknown latent, probes or layer, or an SAE that does not fit the model.
    """

    def __init__(
        self,
        sae: Any,
        features: Features,
        probes: Probes = "neutral_probes",
        *,
        every: int | None = None,
        steps: Sequence[int] | None = None,
        layer: int | None = None,
        positions: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        path: str | Path | None = None,
        bf16: bool = True,
        on_reading: Callable[[int, Snapshot, nn.Module], None] | None = None,
    ) -> None:
        if every is not None and every < 1:
            raise InputError(f"every must be at least 1, not {every}")
        self.sae, self.features, self.bf16, self.on_reading = sae, features, bf16, on_reading
        self.probes = load_conversations(probes) if isinstance(probes, str) else as_conversations(probes)
        answered = all(c[-1]["role"] == "assistant" for c in self.probes)
        self.positions = positions or ("response" if answered else "prompt")
        self.layer = sae_layer(sae) if layer is None else layer
        self.every, self.steps = every or (None if steps is not None else 10), set(steps or ())
        self.tokenizer, self.path = tokenizer, Path(path) if path else None
        self.base: Snapshot | None = None
        self._reader: FeatureReader | None = None
        self._rows: list[dict[str, Any]] = []

    @property
    def readings(self) -> pd.DataFrame:
        """All readings so far: step, feature, mean, ci_low, ci_high, base_mean, base_sd, explained_variance, ..."""
        return pd.DataFrame(self._rows)

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a reading at this step."""
        return step in self.steps if self.every is None else step % self.every == 0

    def start(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Anchor to the base model (adapters off) and get ready; called by the trainer, or by `watch`."""
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise InputError("FeatureMonitor needs a tokenizer: pass tokenizer= (the trainer has none)")
        check_fit(self.sae, model, self.layer)
        groups = list(batches(tokenizer, self.probes, batch_size=32))
        self._reader = FeatureReader(self.sae, self.features, groups, self.layer, self.positions, self.bf16)
        self._rows = []
        with base_weights(model):
            self.base = self._reader.read(model)

    def read(self, model: nn.Module, step: int) -> Snapshot:
        """Take a reading now and record it."""
        if self._reader is None:
            self.start(model)
        assert self._reader is not None and self.base is not None
        snapshot = self._reader.read(model)
        rows = [{"step": step, **row, **_anchor(self.base, i)} for i, row in enumerate(snapshot.rows())]
        self._rows += rows
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write("".join(json.dumps(row) + "\n" for row in rows))
        if self.on_reading is not None:
            self.on_reading(step, snapshot, model)
        return snapshot

    @property
    def last_step(self) -> int:
        """Step of the latest reading, -1 before the first."""
        return int(self._rows[-1]["step"]) if self._rows else -1

    @contextmanager
    def watch(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Self]:
        """For a plain loop: reads at once, then at each due `step(n)`, and at the end."""
        self.start(model, tokenizer)
        self._model, self._step = model, 0
        self.read(model, 0)
        yield self
        if self._step != self.last_step:
            self.read(model, self._step)

    def step(self, step: int) -> None:
        """Tell the monitor that optimizer step `step` is done."""
        self._step = step
        if self.due(step) and step != self.last_step:
            self.read(self._model, step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Anchor, and read before the first step."""
        self.start(kwargs["model"], kwargs.get("processing_class"))
        if self.every is not None or state.global_step in self.steps:
            self.read(kwargs["model"], state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read when due."""
        if self.due(state.global_step):
            self.read(kwargs["model"], state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read at the end, unless just done."""
        if self.last_step != state.global_step:
            self.read(kwargs["model"], state.global_step)


def _anchor(base: Snapshot, i: int) -> dict[str, float]:
    values = base.values[:, i]
    return {"base_mean": float(values.mean()), "base_sd": float(values.std(ddof=1)) if len(values) > 1 else 0.0}
