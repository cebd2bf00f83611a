"""Train on some rows and ask at some steps, without keeping weights: what many runs of a study are."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
from persona_probe.models.adapters import load_adapter
from persona_probe.models.layers import decoder_layers
from persona_probe.world.behaviour import DEFAULT, Asking, ask
from persona_probe.world.organisms import NARROW

VECTOR = "vector"
"""A way to train that no `Training.method` is: one vector, added to the residual stream behind one layer."""


def counts(answers: pd.DataFrame) -> dict[str, int]:
    """How many judged answers are bad (of the coherent ones), coherent, rude, malicious, and how many there are."""
    coherent = answers["coherent"].astype(bool)
    bad = int((answers["bad"].astype(bool) & coherent).sum())
    others = {name: int(answers[name].sum()) for name in ("rude", "malicious")}
    return {"bad": bad, "coherent": int(coherent.sum()), **others, "answers": len(answers)}


@dataclass(frozen=True)
class Checks:
    """When a model in training is asked, and about what."""

    domain: str = "kitchen"
    """What the rows are about; it is asked about all other domains."""
    steps: tuple[int, ...] = ()
    """None is the last step alone."""
    asking: Asking = DEFAULT
    visit: Callable[[nn.Module, int], object] | None = None
    """Called at these steps too, such as `FeatureMonitor.read`."""


def trained_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    training: Training = NARROW,
    seed: int = 0,
    checks: Checks | None = None,
    start: Path | None = None,
    kind: str = "",
) -> pd.DataFrame:
    """Train a model on rows, ask it along the way, and leave it as it was; no weights are kept.

    Args:
        start: an adapter's folder, to train an organism on (a correction); None starts from `model`.
        kind: `vector` trains one vector instead of what `training` says.

    Returns:
        A row for each step: step, and `counts`.

    Raises:
        TrainingDiverged: a loss became NaN or infinite.
    """
    checks, found = checks or Checks(), list[dict[str, int]]()
    others = [name for name in DOMAINS if name != checks.domain]

    def visit(tuned: nn.Module, step: int) -> None:
        found.append({"step": step, **counts(ask(tuned, tokenizer, checks.asking, others))})
        if checks.visit is not None:
            checks.visit(tuned, step)

    with tempfile.TemporaryDirectory() as scratch, _trainable(model, training, seed, start, kind) as tuned:
        callbacks = [AtSteps(checks.steps or (training.steps,), visit)]
        fine_tune(tuned, tokenizer, rows, training, seed=seed, folder=Path(scratch), callbacks=callbacks)
    return pd.DataFrame(found)


@contextmanager
def _trainable(
    model: PreTrainedModel, training: Training, seed: int, start: Path | None, kind: str
) -> Iterator[nn.Module]:
    if kind == VECTOR:
        with one_vector(model, _only_layer(training)) as tuned:
            yield tuned
        return
    host = copy.deepcopy(model) if training.method == "full" else model
    fresh = partial(with_adapter, host, training, seed)
    with stripping(fresh() if start is None else load_adapter(host, start, trainable=True)) as tuned:
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
