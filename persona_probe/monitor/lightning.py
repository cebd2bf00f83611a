"""A `FeatureMonitor` as a Lightning callback."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.errors import InputError
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.monitored_run import TrainingState
from persona_probe.monitor.sinks.curves import LoggersSink


class LightningMonitor(Callback):
    """Drives a monitor from a Lightning trainer: optimizer steps are its `global_step`.

    ```python
    monitor = pp.FeatureMonitor(sae, {"toxic persona": 123}, every=5)
    Trainer(callbacks=[LightningMonitor(monitor, tokenizer)])
    ```

    Readings go through the module's loggers as `persona/<feature>`, unless the monitor has `log=False`.

    Args:
        monitor: its hooks and files are closed however `fit` ends.
        tokenizer: where the monitor was given none.
        model: from the module to the transformers (or PEFT) model in it; default its attribute `model`.
    """

    def __init__(
        self,
        monitor: FeatureMonitor,
        tokenizer: PreTrainedTokenizerBase | None = None,
        model: Callable[[LightningModule], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.monitor, self.tokenizer, self.model = monitor, tokenizer, model or _own_model
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Anchor, and read before the first step."""
        self.monitor.check_free(trainer)
        if self.monitor.log:
            others = [sink for sink in self.monitor.hub.sinks if not isinstance(sink, LoggersSink)]
            self.monitor.hub.sinks = [*others, LoggersSink(pl_module.loggers)] if pl_module.loggers else others
        rates = trainer.lr_scheduler_configs
        training = TrainingState(
            self.model(pl_module),
            optimizer=trainer.optimizers[0] if trainer.optimizers else None,
            scheduler=rates[0].scheduler if rates else None,
            checkpoint_folder=Path(trainer.default_root_dir),
            accumulation=trainer.accumulate_grad_batches,
            max_steps=_last_step(trainer),
        )
        self._step = trainer.global_step
        self.monitor.begin(training, self.tokenizer, trainer.global_step, scoped=True, owner=trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read when an optimizer step was made and is due."""
        training = self.monitor.training
        if training is None or trainer.global_step == self._step or not self.monitor.watches_for(trainer):
            return
        self._step = trainer.global_step
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if isinstance(loss, Tensor | float):  # Lightning has divided it
            training.note({"loss": loss * trainer.accumulate_grad_batches})
        self.monitor.step_done(self._step)
        if self.monitor.should_stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read at the end, unless just done."""
        if self.monitor.training is not None and self.monitor.watches_for(trainer):
            self.monitor.finish(trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off."""
        self._close(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off."""
        self._close(trainer)

    def _close(self, trainer: Trainer) -> None:
        if self.monitor.watches_for(trainer):
            self.monitor.close()


def _last_step(trainer: Trainer) -> int | None:
    """The step at which training ends by itself, also where epochs decide it; None where nobody knows."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) and steps > 0 else None


def _own_model(module: LightningModule) -> nn.Module:
    model = getattr(module, "model", None)
    if not isinstance(model, nn.Module):
        raise InputError("pass model= to LightningMonitor: the module has no attribute `model`")
    return model
