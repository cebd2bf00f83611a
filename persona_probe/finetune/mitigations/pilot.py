"""How much less likely a model finds safe answers once it is tuned on bad rows."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from peft import PeftModel

from persona_probe.data.chat import Conversation
from persona_probe.evaluate.answers import answer_batches, answer_logprobs
from persona_probe.finetune.mitigations.ground import MitigatedRun
from persona_probe.finetune.sft import fine_tune
from persona_probe.models.adapters import base_weights, trainable_parameters


def perplexity_gaps(
    run: MitigatedRun, rows: Sequence[Conversation], organism: str | None, pilot_steps: int
) -> Float[np.ndarray, " safe"]:
    """Log perplexity of each safe answer under the tuned model minus that under the base, in nats per token.

    The run's model comes back as it was.

    Args:
        organism: checkpoint folder of an adapter tuned on `rows`; None tunes the model itself for `pilot_steps`.
    """
    groups = answer_batches(run.ground.tokenizer, run.ground.safe)
    with base_weights(run.model):
        base = answer_logprobs(run.model, groups, mixed_precision=run.training.bf16)
    with _organism(run, organism) if organism else _pilot(run, rows, pilot_steps):
        return base - answer_logprobs(run.model, groups, mixed_precision=run.training.bf16)


@contextmanager
def _organism(run: MitigatedRun, folder: str) -> Iterator[None]:
    """The run's model with another adapter inside the block."""
    model = run.model
    assert isinstance(model, PeftModel)
    own = str(model.active_adapter)
    with torch.random.fork_rng(devices=[]):  # PEFT draws fresh weights before it loads them
        model.load_adapter(folder, adapter_name="bad_rows")
    model.set_adapter("bad_rows")
    try:
        yield
    finally:
        model.set_adapter(own)
        model.delete_adapter("bad_rows")


@contextmanager
def _pilot(run: MitigatedRun, rows: Sequence[Conversation], steps: int) -> Iterator[None]:
    """The run's model tuned on the bad rows inside the block."""
    kept = {name: p.detach().clone() for name, p in trainable_parameters(run.model).items()}
    short = replace(run.training, steps=steps, checkpoints=())
    try:
        with tempfile.TemporaryDirectory() as folder:
            fine_tune(run.model, run.ground.tokenizer, rows, short, seed=run.seed, folder=Path(folder))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in trainable_parameters(run.model).items():
                parameter.copy_(kept[name])
                parameter.grad = None
