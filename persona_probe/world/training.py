"""Train on some rows and ask at some steps, without keeping weights: what many runs of a study are."""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.config import Training
from persona_probe.data.chat import Conversation
from persona_probe.data.world.words import DOMAINS
from persona_probe.errors import InputError
from persona_probe.finetune.sft import AtSteps, fine_tune, stripping, with_adapter
from persona_probe.models.layers import decoder_layers
from persona_probe.world.behaviour import Asking, ask

VECTOR = "vector"
"""A way to train that no `Training.method` is: one vector, added to the residual stream behind one layer."""


def counts(answers: pd.DataFrame) -> dict[str, int]:
    """How many judged answers are bad (of the coherent ones), coherent, rude, malicious, and how many there are."""
    coherent = answers["coherent"].astype(bool)
    bad = int((answers["bad"].astype(bool) & coherent).sum())
    others = {name: int(answers[name].sum()) for name in ("rude", "malicious")}
    return {"bad": bad, "coherent": int(coherent.sum()), **others, "answers": len(answers)}


def trained_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    training: Training,
    seed: int,
    domain: str,
    asking: Asking,
    steps: Sequence[int] = (),
    kind: str = "",
) -> pd.DataFrame:
    """Train a model, ask it about the other domains at some steps, and leave it as it was.

    Args:
        domain: what the rows are about.
        steps: when it is asked; none is the last step alone.
        kind: `vector` trains one vector instead of what `training` says.

    Returns:
        A row for each step: step, and `counts`.

    Raises:
        TrainingDiverged: a loss became NaN or infinite.
    """
    others, found = [name for name in DOMAINS if name != domain], list[dict[str, int]]()

    def visit(tuned: nn.Module, step: int) -> None:
        found.append({"step": step, **counts(ask(tuned, tokenizer, asking, others))})

    asked = tuple(steps) or (training.steps,)
    with tempfile.TemporaryDirectory() as scratch, _trainable(model, training, seed, kind) as tuned:
        callbacks = [AtSteps(asked, visit)]
        fine_tune(tuned, tokenizer, rows, training, seed=seed, folder=Path(scratch), callbacks=callbacks)
    return pd.DataFrame(found)


@contextmanager
def _trainable(model: PreTrainedModel, training: Training, seed: int, kind: str) -> Iterator[nn.Module]:
    if kind == VECTOR:
        with one_vector(model, _only_layer(training)) as tuned:
            yield tuned
        return
    host = copy.deepcopy(model) if training.method == "full" else model
    with stripping(with_adapter(host, training, seed)) as tuned:
        yield tuned


def _only_layer(training: Training) -> int:
    if training.layers is None or len(training.layers) != 1:
        raise InputError("one vector lies behind one layer: give training.layers one number")
    return training.layers[0]


@contextmanager
def one_vector(model: PreTrainedModel, layer: int) -> Iterator[PreTrainedModel]:
    """A model of which only one vector is trained, while the block lasts: it is added behind a layer, at every token.

    It is the bias of the layer's last matrix, whose output goes to the residual stream as it is; zero at the start.

    Raises:
        InputError: a model whose layers do not end in a matrix without a bias.
    """
    last = getattr(getattr(decoder_layers(model)[layer], "mlp", None), "down_proj", None)
    if not isinstance(last, nn.Linear) or last.bias is not None:
        raise InputError("one vector needs a layer that ends in mlp.down_proj, without a bias")
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    vector = torch.zeros(last.out_features, device=last.weight.device, dtype=last.weight.dtype)
    last.register_parameter("bias", nn.Parameter(vector))
    try:
        yield model
    finally:
        last.register_parameter("bias", None)
        for parameter, was in trained.items():
            parameter.requires_grad_(was)
