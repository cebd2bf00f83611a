"""What a fine-tuning writes, read from its weights alone: no text, no activation.

After arXiv 2508.00161: the leading singular vectors of the weight change of matrices that write into the residual
stream are directions of what was learnt, and need no data.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from persona_probe.errors import InputError
from persona_probe.latents.difference import FoundDirections
from persona_probe.models.layers import causal_model, decoder_layer, decoder_layers, hidden_size
from persona_probe.models.peft_kinds import starts_from_base
from persona_probe.models.ranks import is_partitioned, is_sharded, unwrap
from persona_probe.models.taps import Direction, as_vector

WRITERS = (
    *("o_proj", "out_proj", "dense", "wo"),  # of attention, and of what stands in its place
    *("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2"),  # of MLPs and experts; GPT-2's of both
    "per_layer_projection",  # of Gemma's per-layer inputs
)
"""Names of matrices whose output is added to the residual stream, directly or behind a norm."""


def left_vectors(
    up: Float[Tensor, "d_model rank"], down: Float[Tensor, "rank d_in"], scale: float = 1.0
) -> tuple[Float[Tensor, "d_model rank"], Float[Tensor, " rank"]]:
    """Left singular vectors and singular values of `scale * up @ down`, which is never multiplied out."""
    q, r = torch.linalg.qr(up)
    left, sizes, _ = torch.linalg.svd(r @ down * scale, full_matrices=False)
    return q @ left, sizes


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
        left, sizes = left_vectors(self.up.double(), self.down.double())
        return left * sizes


# --- The matrices that write, in any model


def _writers(model: nn.Module, layer: int) -> Iterator[tuple[str, nn.Module]]:
    """Name of each matrix that writes in the layers up to `layer`, and the module that holds it, adapters included.

    The experts of a mixture are one tensor in transformers, under a name of `WRITERS` in a module of another name.
    """
    for number, block in enumerate(decoder_layers(model)[: max(0, layer + 1)]):
        for name, module in block.named_modules():
            own = (parameter for parameter, _ in module.named_parameters(recurse=False))
            parameters = [module.parameter_name] if isinstance(module, ParamWrapper) else own
            for path in (name, *(f"{name}.{parameter}" for parameter in parameters)):
                if path.rpartition(".")[2] in WRITERS:
                    yield f"layers.{number}.{path}", module


def writing_matrices(model: nn.Module, layer: int) -> dict[str, Float[Tensor, "d_model d_in"]]:
    """The matrices that write of a model without adapters, as they lie in memory; each expert has its own."""
    inner, found = _here(model), dict[str, Tensor]()
    for name, module in _writers(inner, layer):
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise InputError(f"{name} carries an adapter: its change is read without a base")
        weight = getattr(module, name.rpartition(".")[2], getattr(module, "weight", None))
        if not isinstance(weight, Tensor) or weight.ndim not in (2, 3):
            continue
        turned = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)  # inputs as rows
        weight = weight.detach().mT if turned else weight.detach()
        found |= {name: weight} if weight.ndim == 2 else {f"{name}.{n}": one for n, one in enumerate(weight)}
    width = hidden_size(inner)
    found = {name: weight for name, weight in found.items() if len(weight) == width}
    if not found:
        raise InputError(f"no matrix that writes ({', '.join(WRITERS)}) up to layer {layer}")
    return found


def _here(model: nn.Module) -> PreTrainedModel:
    """The transformers model below all wrappers, whose weights lie whole in this process."""
    if is_sharded(model) or is_partitioned(model):
        raise InputError("the model's weights are spread over processes: what they write is read on a whole model")
    return causal_model(unwrap(model))


@torch.no_grad()
def adapter_changes(model: nn.Module, layer: int, adapter: str | None = None) -> dict[str, WeightChange]:
    """The changes that a LoRA makes to the matrices that write, in all layers up to `layer`.

    A LoRA on the experts of a mixture (`target_parameters`) has a change for each expert. Of a DoRA this is the
    low-rank part alone.

    Args:
        adapter: its name; None takes all that are active, together.

    Raises:
        InputError: the model has no LoRA on such a matrix or another kind of adapter, the adapter starts from the
            base's weights (PiSSA and its relatives), or the weights are spread over processes.
    """
    inner, found = _here(model), dict[str, WeightChange]()
    if any(starts_from_base(config) for config in getattr(inner, "peft_config", {}).values()):
        raise InputError("the adapter starts from the base's own weights, so it is not what training changed")
    for name, module in _writers(inner, layer):
        if isinstance(module, LoraLayer) and isinstance(module.lora_A, nn.ModuleDict):
            found |= _lora_changes(name, module, module.active_adapters if adapter is None else [adapter])
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise InputError(f"{name} is trained by a {type(module).__name__}: only LoRA is read here")
    found = {name: change for name, change in found.items() if len(change.up) == hidden_size(inner)}
    if not found:
        writers = ", ".join(WRITERS)
        raise InputError(
            f"no LoRA on a matrix that writes ({writers}) up to layer {layer}; weights trained in full need their base"
        )
    return found


def _lora_changes(name: str, module: LoraLayer, adapters: Sequence[str]) -> dict[str, WeightChange]:
    """A change for each expert, or the one change of a plain matrix."""
    experts = module.num_experts if isinstance(module, ParamWrapper) else 1
    ups, downs = [], []
    for one in adapters:
        if one in module.lora_A:
            up, down = (_weight(side[one]) for side in (module.lora_B, module.lora_A))
            ups.append(up.reshape(len(up), -1, experts) * float(module.scaling[one]))
            downs.append(down.reshape(experts, -1, down.shape[1]))
    if not ups:
        return {}
    up, down = torch.cat(ups, dim=1), torch.cat(downs, dim=1)
    names = [name] if experts == 1 else [f"{name}.{number}" for number in range(experts)]
    return {key: WeightChange(up[:, :, number], down[number]) for number, key in enumerate(names)}


def _weight(linear: nn.Module) -> Float[Tensor, "d_out d_in"]:
    assert isinstance(linear.weight, Tensor)
    return linear.weight.detach().float().cpu()


@torch.no_grad()
def full_changes(base: nn.Module, tuned: nn.Module, layer: int, rank: int = 16) -> dict[str, WeightChange]:
    """The same between two models of full weights, each change cut to its `rank` largest singular directions.

    Raises:
        InputError: no matrix that writes, or one of another shape, or a model with an adapter.
    """
    found, after = dict[str, WeightChange](), writing_matrices(tuned, layer)
    for name, before in writing_matrices(base, layer).items():
        left, sizes, right = torch.linalg.svd(_change(name, before, after), full_matrices=False)
        found[name] = WeightChange(left[:, :rank] * sizes[:rank], right[:rank])
    return found


def _change(name: str, before: Tensor, after: Mapping[str, Tensor]) -> Float[Tensor, "d_model d_in"]:
    """How one matrix changed, in float32 on the host."""
    if name not in after or after[name].shape != before.shape:
        raise InputError(f"{name} is not the same matrix in both models: give a base and its fine-tune")
    return after[name].float().cpu() - before.float().cpu()


# --- A reading for a monitor


class WeightsAlong:
    """How squarely a fine-tuning writes along a direction: a measurement of `FeatureMonitor(behaviour=...)`.

    Of every matrix that writes into the residual stream, in all layers up to `layer`, the first left singular vector
    of its change is taken (arXiv 2508.00161). The value is the largest |cosine| of the direction with one of them: 0
    to 1, whatever the size and sign of the change, and 0 where nothing has changed yet. It needs no text.

    ```python
    harm = pp.harm_direction(model, tokenizer, layer=20)
    monitor = pp.FeatureMonitor(sae, features, behaviour={"weights along harm": pp.WeightsAlong(harm, layer=20)})
    ```

    A norm between a matrix and the residual stream (Gemma 2 to 4, OLMo 2) is not counted. The value says nothing
    about how much the model does along the direction, and its level at random grows with the number of matrices.

    Args:
        direction: (d_model,), of any length: a tensor, an array or a `NamedDirection`.
        layer: the decoder layer up to which matrices are read.
        base: for weights that are trained in full: the model before training. Its matrices are copied to the host
            now. None reads the LoRA on the model.

    Raises:
        InputError: no direction, or one of length zero; of `base`, as the call.
    """

    def __init__(self, direction: Direction, layer: int, base: nn.Module | None = None) -> None:
        vector = as_vector(direction).detach().double().cpu()
        if vector.ndim != 1 or not (torch.isfinite(vector).all() and vector.norm() > 0):
            raise InputError("a direction must be one vector (d_model,) of finite numbers that are not all zero")
        self.direction, self.layer = vector / vector.norm(), layer
        self._base: dict[str, Tensor] | None = None
        if base is not None:
            self._check(base)
            copies = {name: weight.to("cpu", copy=True) for name, weight in writing_matrices(base, layer).items()}
            self._base = copies

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        """The largest |cosine| at the model as it is now; NaN where a change is not finite.

        Args:
            model: with a LoRA, below any number of wrappers; or, with `base`, without adapters.

        Raises:
            InputError: a direction of another width, no such layer, no LoRA on a matrix that writes (without `base`),
                other matrices than those of `base`, or weights that are spread over processes.
        """
        self._check(model)
        cosines = [abs(float(vector @ self.direction)) for vector in self._first_vectors(model)]
        return math.nan if any(map(math.isnan, cosines)) else max(cosines, default=0.0)

    def _check(self, model: nn.Module) -> None:
        inner = _here(model)
        decoder_layer(inner, self.layer)
        if (width := hidden_size(inner)) != len(self.direction):
            raise InputError(f"the direction is {len(self.direction)} wide, the model's residual stream {width}")

    def _first_vectors(self, model: nn.Module) -> Iterator[Float[Tensor, " d_model"]]:
        """Where each matrix that changed writes most."""
        if self._base is None:
            for change in adapter_changes(model, self.layer).values():
                if not (change.up.isfinite().all() and change.down.isfinite().all()):
                    yield torch.full_like(self.direction, math.nan)
                elif change.up.any() and change.down.any():
                    yield left_vectors(change.up, change.down)[0][:, 0].double()
            return
        after = writing_matrices(model, self.layer)
        for name, before in self._base.items():
            delta = _change(name, before, after).double()
            if not delta.isfinite().all():
                yield torch.full_like(self.direction, math.nan)
            elif delta.any():
                start = np.random.default_rng(0).standard_normal(min(delta.shape))  # the same at every call
                found: Any = svds(delta.numpy(), k=1, v0=start)
                yield torch.from_numpy(found[0][:, 0].copy())


# --- Directions of all matrices together


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
