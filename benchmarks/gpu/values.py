"""The same numbers on the device as on the CPU, from a small model in float32."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.gpu.shapes import TINY, random_model, random_sae
from persona_probe.data.chat import conversation
from persona_probe.data.load import Row
from persona_probe.data.tokens import Batch, batches
from persona_probe.evaluate.answers import SuffixScorer, answer_batches
from persona_probe.latents.attribution import gradient_scores
from persona_probe.monitor.reading import FeatureReader
from persona_probe.saes.read import read_latents

TOLERANCE = 2e-3
"""Largest difference, relative to the largest value: float32 sums in another order, through a few layers."""
SIDES = ("aligned", "misaligned")


def differences(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], device: torch.device) -> dict[str, float]:
    """By kind of number, the largest difference between the CPU and the device, relative to the largest value.

    On the device the rows come in other batches than on the CPU, so that padding and grouping are tested too. The SAE
    is a standard one: where latents compete, a rounding error may let another one win.
    """
    model, sae = (
        random_model(TINY, tokenizer, torch.device("cpu"), torch.float32),
        random_sae(TINY, torch.device("cpu"), "standard"),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # with initial weights of 0.02 all rows would give nearly equal numbers
                parameter.mul_(8)
    other: Any = copy.deepcopy(model)
    moved, moved_sae = other.to(device), copy.deepcopy(sae).to(device)
    items = [conversation(row["question"], row[side]) for side in SIDES for row in rows]
    flags = np.repeat([False, True], len(rows))
    found: dict[str, float] = {}
    for name, work in _works(flags).items():
        expected = work(model, sae, answer_batches(tokenizer, items, 3))
        got = work(moved, moved_sae, list(batches(tokenizer, items, len(items))))
        found[name] = float(np.abs(got - expected).max() / np.abs(expected).max())
    return found


Work = Callable[[Any, Any, Sequence[Batch]], np.ndarray]


def _works(flags: np.ndarray) -> dict[str, Work]:
    def latents(model: Any, sae: Any, groups: Sequence[Batch]) -> np.ndarray:
        return read_latents(model, sae, groups, TINY.layer, "response", bf16=False).mean

    def pushes(model: Any, sae: Any, groups: Sequence[Batch]) -> np.ndarray:
        scorer = SuffixScorer(model, TINY.layer, groups, bf16=False)
        return scorer.logprobs_many(4 * sae.W_dec[:3].detach())

    def attribution(model: Any, sae: Any, groups: Sequence[Batch]) -> np.ndarray:
        return gradient_scores(model, sae, groups, flags, TINY.layer, bf16=False).attribution

    def monitor(model: Any, sae: Any, groups: Sequence[Batch]) -> np.ndarray:
        direction = torch.ones(TINY.hidden)
        reader = FeatureReader(sae, {"latent": 5, "direction": direction}, groups, TINY.layer, bf16=False)
        return reader.read(model).values

    return {"latents": latents, "pushes": pushes, "attribution": attribution, "monitor": monitor}
