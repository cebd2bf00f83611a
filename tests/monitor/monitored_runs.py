"""What the monitor's tests share: features, monitors, trainers on tiny models, and a rule that fires when told."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from persona_probe.models.adapters import trainable_parameters
from persona_probe.monitor.events import Alarm, Event, Reading, Start
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.rules.rule import Rule
from tests.factories import D_MODEL, LAYER, copied_state, make_model, make_sae, make_tokenizer, talks

DIRECTION = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(7))
FEATURES: dict[str, Any] = {"persona": 3, "other": 40, "mean difference": DIRECTION}
ROWS = [{"prompt": f"Ask {n}?" + "." * n, "completion": f" Say {n * n}" + "!" * (n % 3)} for n in range(12)]


def monitor(**kwargs: Any) -> FeatureMonitor:
    """A monitor of two latents of a TopK SAE and a direction, on four answered probes."""
    sae = kwargs.pop("sae", None) or make_sae(kwargs.pop("architecture", "topk"))
    features = kwargs.pop("features", FEATURES)
    return FeatureMonitor(sae, features, talks(4), **{"bf16": False, "every": 2, "log": False, **kwargs})


def directions(**kwargs: Any) -> FeatureMonitor:
    """A monitor of one direction, without an SAE."""
    settings = {"bf16": False, "every": 2, "layer": LAYER, "log": False, **kwargs}
    return FeatureMonitor(None, {"mean difference": DIRECTION}, talks(4), **settings)


def adapted(dropout: float = 0.0) -> nn.Module:
    """The tiny model with a fresh LoRA adapter, always the same."""
    model = make_model()
    torch.manual_seed(5)
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


class Recorded:
    """A trainer's batches, as its collator made them."""

    def __init__(self, collate: Any) -> None:
        self.collate, self.batches = collate, list[dict[str, Any]]()

    def __call__(self, rows: Any) -> Any:
        """Collate and keep."""
        self.batches.append(self.collate(rows))
        return self.batches[-1]


def sft(folder: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, **arguments: Any) -> Any:
    """A TRL trainer of the tiny model with recorded batches, not yet trained."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    settings = {
        **QUIET,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "max_length": 64,
        "bf16": False,
        "gradient_checkpointing": False,
        **arguments,
    }
    config = SFTConfig(output_dir=str(folder), **settings)
    data = {"train_dataset": Dataset.from_list(ROWS), "processing_class": make_tokenizer()}
    if config.do_eval or config.eval_strategy != "no":
        data["eval_dataset"] = Dataset.from_list(ROWS[:4])
    trainer = SFTTrainer(model or adapted(), args=config, callbacks=list(callbacks), **data)  # pyright: ignore
    trainer.data_collator = Recorded(trainer.data_collator)
    return trainer


QUIET: dict[str, Any] = {
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "dataloader_pin_memory": False,
    "seed": 3,
}


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of what training changes."""
    return {name: value.detach().clone() for name, value in trainable_parameters(model).items()}


def loop(model: nn.Module, steps: int = 4, live: FeatureMonitor | None = None) -> dict[str, torch.Tensor]:
    """A plain training loop (batch of 3 x 12 tokens, two prompt tokens each); the weights it ends with."""
    torch.manual_seed(11)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        ids, labels = loop_batch(step)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if live is not None:
            live.step(step)
            if live.should_stop:
                break
    return copied_state(model)


def loop_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of a step of `loop`."""
    ids = torch.randint(2, 258, (3, 12), generator=torch.Generator().manual_seed(step))
    labels = ids.clone()
    labels[:, :2] = -100
    return ids, labels


class KeepEvents:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed = 0

    def emit(self, event: Event) -> None:
        """Keep it."""
        self.events.append(event)

    def close(self) -> None:
        """Count."""
        self.closed += 1

    def of(self, kind: type) -> list[Any]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]


class FireAt(Rule):
    """Fires at chosen steps."""

    def __init__(self, *steps: int, title: str = "fire") -> None:
        self.steps, self.seen, self.starts, self._title = steps, list[int](), list[Start](), title

    title = property(lambda self: self._title)
    firing = property(lambda self: bool(self.seen) and self.seen[-1] in self.steps)
    inside = property(lambda self: not self.firing)

    def begin(self, start: Start) -> None:
        self.starts.append(start)

    def reset(self) -> None:
        self.seen.clear()

    def update(self, reading: Reading) -> Alarm | None:
        self.seen.append(reading.step)
        return Alarm(reading.step, self._title, "persona", "told to", 1.0, 0.5) if self.firing else None

    def describe(self) -> str:
        return "fires when told"


@contextmanager
def hidden_state(model: nn.Module, layer: int = LAYER) -> Iterator[list[torch.Tensor]]:
    """The outputs of a layer while the block lasts."""
    from persona_probe.models.layers import decoder_layer

    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, _args: Sequence[Any], output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach())

    handle = decoder_layer(model, layer).register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
