"""What a fine-tuning writes, read from its weights alone: no text, no activation.

After arXiv 2508.00161: the leading singular vectors of the weight change of matrices that write into the residual
stream are directions of what was learnt, and need no data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from persona_probe.errors import InputError
from persona_probe.latents.difference import FoundDirections

WRITERS = ("o_proj", "down_proj", "c_proj", "dense_4h_to_h")
"""Names of matrices whose output is added to the residual stream."""


@dataclass(frozen=True)
class WeightChange:
    """The change of one matrix that writes, as factors: `up @ down` (a full change has `down` = identity)."""

    up: Float[Tensor, "d_model rank"]
    down: Float[Tensor, "rank d_in"]

    def minus(self, other: "WeightChange") -> "WeightChange":
        """This change without another's: organism minus control."""
        return WeightChange(torch.cat([self.up, -other.up], dim=1), torch.cat([self.down, other.down], dim=0))

    @property
    def written(self) -> Float[Tensor, "d_model rank"]:
        """Left singular vectors, each times its singular value: where it writes, and how much."""
        q, r = torch.linalg.qr(self.up.double())
        left, sizes, _ = torch.linalg.svd(r @ self.down.double(), full_matrices=False)
        return (q @ left) * sizes


@torch.no_grad()
def adapter_changes(model: nn.Module, layer: int, adapter: str = "default") -> dict[str, WeightChange]:
    """The changes that a LoRA makes to the matrices that write, in all layers up to `layer`.

    Raises:
        InputError: the model has no LoRA on such a matrix.
    """
    found: dict[str, WeightChange] = {}
    for name, module in model.named_modules():
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if not isinstance(module, LoraLayer) or number is None or number > layer or not name.endswith(WRITERS):
            continue
        up, down = (_matrix(side[adapter]) for side in (module.lora_B, module.lora_A))
        assert up is not None and down is not None, name
        found[name] = WeightChange(up * float(module.scaling[adapter]), down)
    if not found:
        raise InputError(f"no LoRA on a matrix that writes ({', '.join(WRITERS)}) up to layer {layer}")
    return found


@torch.no_grad()
def full_changes(base: nn.Module, tuned: nn.Module, layer: int, rank: int = 16) -> dict[str, WeightChange]:
    """The same between two models of full weights, each change cut to its `rank` largest singular directions.

    Raises:
        InputError: no matrix that writes, or one of another shape.
    """
    found, others = dict[str, WeightChange](), dict(tuned.named_modules())
    for name, module in base.named_modules():
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if number is None or number > layer or not name.endswith(WRITERS) or not isinstance(module, nn.Linear | Conv1D):
            continue
        before, after = (_matrix(one) for one in (module, others.get(name)))
        if after is None or before is None or before.shape != after.shape:
            raise InputError(f"{name} is not the same matrix in both models: give a base and its fine-tune")
        left, sizes, right = torch.linalg.svd(after - before, full_matrices=False)
        found[name] = WeightChange(left[:, :rank] * sizes[:rank], right[:rank])
    if not found:
        raise InputError(f"no matrix that writes ({', '.join(WRITERS)}) up to layer {layer}")
    return found


def _matrix(module: nn.Module | None) -> Float[Tensor, "d_out d_in"] | None:
    """A matrix's weights in float32, its outputs as rows; GPT-2's Conv1D holds them the other way round."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    return (weight.detach().T if isinstance(module, Conv1D) else weight.detach()).float().cpu()


def weight_directions(
    tuned: Mapping[str, WeightChange], control: Mapping[str, WeightChange] | None = None, first: int = 10
) -> FoundDirections:
    """The directions into which a weight change writes most, over all matrices together.

    These are the leading left singular vectors of all changes side by side. A matrix weighs as its change is large;
    how large the inputs are that it meets is not known without data.

    Args:
        control: changes of the control organism, which are taken off matrix by matrix.

    Returns:
        At most `first` directions with their singular values.

    Raises:
        InputError: the control has other matrices.
    """
    if control is not None and set(control) != set(tuned):
        raise InputError("organism and control have adapters on other matrices: train both in the same way")
    changes = [one if control is None else one.minus(control[name]) for name, one in tuned.items()]
    left, sizes, _ = torch.linalg.svd(torch.cat([one.written for one in changes], dim=1), full_matrices=False)
    count = min(first, len(sizes))
    return FoundDirections.ranked(left[:, :count].T.numpy(), sizes[:count].numpy())


def aligned_latents(
    found: FoundDirections, decoder: Float[np.ndarray, "d_sae d_model"], first: int = 10
) -> Float[np.ndarray, " d_sae"]:
    """A score of a dictionary's latents without data: norm of a decoder row within what the weights write.

    Returns:
        Root of the sum of squared cosines with the first directions, each weighted by its share of the singular
        values (0 to 1).
    """
    rows = decoder / np.maximum(np.linalg.norm(decoder, axis=1, keepdims=True), 1e-12)
    weights = found.scores[:first] / found.scores[:first].sum()
    return np.sqrt(((rows @ found.rows[:first].T) ** 2) @ weights)


def rank_of(scores: Float[np.ndarray, " n"], wanted: Sequence[int]) -> int:
    """The best place of some latents by a score, 1 being the largest; ties count against them."""
    return int(min((scores >= scores[latent]).sum() for latent in wanted))
