"""All inputs of mitigations, on the tiny model, and short mitigated runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from persona_probe.config import Training
from persona_probe.data.chat import Conversation, conversation
from persona_probe.finetune.sft import with_adapter
from persona_probe.mitigate.mitigated_training import train_mitigated
from persona_probe.mitigate.mitigation import MitigatedFit, Mitigation, MitigationInputs
from persona_probe.models.adapters import trainable_parameters
from persona_probe.monitor.band import Band
from tests.factories import D_MODEL, LAYER, make_model, make_sae, make_tokenizer, talks

TRAINING = Training(rank=2, alpha=4, batch_size=4, steps=3, checkpoints=(), lr=1e-2, bf16=False, warmup_steps=0)
ROWS = talks()
LATENTS = (3, 17)
ABOVE_ALL = Band(-1e9, -1e9)
"""Any reading lies above it."""


def told(word: str, count: int = 8) -> list[Conversation]:
    return [conversation(f"{word} {n}?", f"{word}, {word} {n}.") for n in range(count)]


def direction() -> torch.Tensor:
    return 3 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))


def make_inputs(**changes: Any) -> MitigationInputs:
    """Every part is there."""
    parts: dict[str, Any] = {
        "tokenizer": make_tokenizer(),
        "layer": LAYER,
        "sae": make_sae("jumprelu"),
        "latents": LATENTS,
        "direction": direction(),
        "safe": told("safe"),
        "corrective": told("good"),
        "general": told("plain", 5),
        "band": ABOVE_ALL,
        "probes": told("probe", 3),
    }
    return MitigationInputs(**{**parts, **changes})


def fresh(training: Training = TRAINING, architecture: str = "llama", seed: int = 0) -> PeftModel:
    tuned = with_adapter(make_model(architecture), training, seed)
    assert isinstance(tuned, PeftModel)
    return tuned


def perturbed(training: Training = TRAINING, architecture: str = "llama") -> PeftModel:
    """An adapter that is no longer the base."""
    tuned = fresh(training, architecture)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable_parameters(tuned).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return tuned


def train(
    folder: Path,
    mitigation: Mitigation,
    training: Training = TRAINING,
    tuned: PeftModel | None = None,
    inputs: MitigationInputs | None = None,
    rows: list[Conversation] = ROWS,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> MitigatedFit:
    return train_mitigated(
        tuned or fresh(training),
        inputs or make_inputs(),
        rows,
        training,
        mitigation,
        seed=0,
        folder=folder,
        callbacks=callbacks,
    )


def adapter(folder: Path, step: int = 3) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors")


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.first:
            grads = {n: p.grad for n, p in trainable_parameters(kwargs["model"]).items()}
            self.first = {n: g.clone() for n, g in grads.items() if g is not None}


def one_step(training: Training = TRAINING) -> Training:
    """One step on all rows."""
    return replace(training, steps=1, batch_size=len(ROWS))


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], rel: float = 1e-3) -> bool:
    """Whether two sets of gradients agree, each tensor relative to its own size."""
    return left.keys() == right.keys() and all(
        float((left[k] - right[k]).norm()) <= rel * float(right[k].norm()) for k in left
    )
