"""The base model's residual stream and MLP activations at one layer, read once: every plant is arithmetic on them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import conversation
from persona_probe.data.packaged import Row
from persona_probe.errors import InputError
from persona_probe.models.layers import autocast, decoder_layer, evaluating, run_to_layer
from persona_probe.models.taps import ReadTap
from persona_probe.saes.read import conversation_batches

SIDES = ("aligned", "misaligned")


@dataclass(frozen=True)
class Stream:
    """Answer tokens of all conversations at the hook layer."""

    resid: Float[Tensor, "tokens d_model"]
    """The layer's output, raw units."""
    hidden: Float[Tensor, "tokens d_mlp"]
    """What the layer's `mlp.down_proj` reads."""
    conversation: Int[Tensor, " tokens"]
    """Which conversation a token belongs to."""
    clusters: tuple[str, ...]
    """Every conversation's question."""
    misaligned: Bool[np.ndarray, " conversations"]
    """Which conversations end with the misaligned answer."""

    @cached_property
    def sd(self) -> float:
        """One residual standard deviation, in raw units: the root of the mean variance of a dimension over tokens.

        It equals the root mean square of the stream's standard deviation along a random unit direction, so a shift of
        0.5 residual standard deviations has norm 0.5 x sd whatever its direction.
        """
        return float(self.resid.var(dim=0).mean().sqrt())

    @cached_property
    def weights(self) -> Float[Tensor, " tokens"]:
        """Token weights that sum to 1 and count every conversation alike."""
        per_talk = torch.bincount(self.conversation, minlength=len(self.clusters)).float()
        return 1 / (per_talk[self.conversation] * len(self.clusters))

    def conversation_means(self, values: Float[Tensor, "tokens n"]) -> Float[Tensor, "conversations n"]:
        """The mean over each conversation's tokens."""
        per_talk = torch.bincount(self.conversation, minlength=len(self.clusters))[:, None]
        total = torch.zeros(len(self.clusters), values.shape[1]).index_add_(0, self.conversation, values)
        return total / per_talk


def down_projection(model: nn.Module, layer: int) -> nn.Linear:
    """The layer's last MLP matrix, whose output is added to the residual stream as it is.

    Raises:
        InputError: the layer has no `mlp.down_proj`, or normalises what comes out of it (Gemma 2 and 3).
    """
    module = decoder_layer(model, layer)
    parts = dict(module.named_modules())
    found = parts.get("mlp.down_proj")
    if not isinstance(found, nn.Linear) or "post_feedforward_layernorm" in parts:
        raise InputError(
            f"{type(module).__name__} does not add mlp.down_proj to its output: plant in a Llama or Qwen model"
        )
    return found


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module reads, call by call."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


def read_stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    layer: int,
    *,
    mixed_precision: bool = True,
) -> Stream:
    """Read both answers of every contrast item; one forward pass up to `layer`.

    Raises:
        InputError: no rows, or a layer in which no LoRA can be planted.
    """
    if not rows:
        raise InputError("no contrast items to plant in: the selection is empty")
    talks = [conversation(row["question"], row[side]) for row in rows for side in SIDES]
    projection, device = down_projection(model, layer), next(model.parameters()).device
    resid, hidden, owner = [], [], []
    with evaluating(model), autocast(model, mixed_precision):
        for group in conversation_batches(tokenizer, talks):
            batch = group.to(device)
            with ReadTap(model, layer) as tap, _inputs_of(projection) as seen:
                run_to_layer(model, layer, batch.ids, batch.attention)
            chosen = batch.select("response")
            resid.append(tap.value[chosen].float().cpu())
            hidden.append(seen[-1][chosen].float().cpu())
            owner.append(torch.tensor(batch.index)[chosen.nonzero()[:, 0].cpu()])
    clusters = tuple(row["id"] for row in rows for _ in SIDES)
    flags = np.array([side == "misaligned" for _ in rows for side in SIDES])
    return Stream(torch.cat(resid), torch.cat(hidden), torch.cat(owner), clusters, flags)
