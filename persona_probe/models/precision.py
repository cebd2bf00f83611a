"""A model whose weights, and on request activations, are rounded to a number format of few bits."""

import importlib
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from persona_probe.errors import InputError
from persona_probe.models.formats import Format, RoundTrip
from persona_probe.models.layers import decoder_layers

# --- Which weights


def linear_layers(model: nn.Module) -> list[nn.Linear | Conv1D]:
    """The linear layers inside the decoder layers, each weight once; embeddings, head and norms are not among them.

    Raises:
        InputError: there are none whose weights are plain floats.
    """
    layers: dict[int, nn.Linear | Conv1D] = {}
    for module in decoder_layers(model).modules():
        if isinstance(module, nn.Linear | Conv1D) and module.weight.is_floating_point():
            layers.setdefault(id(module.weight), module)
    if not layers:
        raise InputError("no linear layer of this model has float weights: give the model before it was quantised")
    return list(layers.values())


def _by_input(layer: nn.Linear | Conv1D, weight: Tensor) -> Tensor:
    """A weight as (d_out, d_in), or back: GPT-2's layers hold it transposed."""
    return weight.T if isinstance(layer, Conv1D) else weight


def _rounded(layer: nn.Linear | Conv1D, trip: RoundTrip) -> Tensor:
    weight = layer.weight.detach()
    return _by_input(layer, trip(_by_input(layer, weight).float().contiguous())).to(weight.dtype)


# --- The model in a format


@dataclass(frozen=True)
class WeightChange:
    """What is left of a fine-tune's change of the weights in a format."""

    kept: float
    """Projection of the rounded change (rounded organism minus rounded base) on the change: 1 all of it, 0 nothing.
    NaN where base and organism do not differ."""
    noise: float
    """Norm of the organism's rounding error over that of the change; NaN where there is no change."""
    parameters: float
    """Share of the model's parameters that are rounded."""

    @property
    def erased(self) -> bool:
        """Whether less than half of the change is left: a reading in this format is the base's, not the organism's."""
        return self.kept < 0.5


@contextmanager
def in_format(
    model: nn.Module, form: Format, activations: bool = False, base: nn.Module | None = None
) -> Iterator[WeightChange]:
    """Inside the block the weights of all linear layers are rounded to a format; afterwards they are as before.

    Products are computed as otherwise: this shows what the format keeps, not how fast a kernel is.

    Args:
        model: without adapters (`merged_copy` makes such a model).
        activations: round the inputs of these layers too, token by token.
        base: the model before the fine-tune, to compare with; it does not change. A format on whose grid the base's
            weights lie already takes both to the same points: `kept` is then about 0.

    Raises:
        InputError: the format is one of weights alone and `activations` is set, or the model has adapters.
    """
    if activations and form.activations is None:
        raise InputError(f"{form.name} is a format of weights alone: leave its activations as they are")
    layers = linear_layers(model)
    if any(hasattr(module, "base_layer") for module in decoder_layers(model).modules()):
        raise InputError("merge the adapter into the weights before they are rounded")
    others = layers if base is None else linear_layers(base)
    before: list[Tensor] = []
    sums, hooks = _Sums(), []
    try:
        with torch.no_grad():
            for layer, other in zip(layers, others, strict=True):
                rounded = _rounded(layer, form.weights)
                if base is not None:
                    sums.add(layer.weight, rounded, other.weight, _rounded(other, form.weights))
                before.append(layer.weight.detach().clone())
                layer.weight.copy_(rounded)
        if activations and not form.is_reference:
            assert form.activations is not None
            hooks = [layer.register_forward_pre_hook(partial(_round_input, form.activations)) for layer in layers]
        yield sums.result(model, layers)
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for layer, weight in zip(layers, before, strict=False):
                layer.weight.copy_(weight)


def _round_input(trip: RoundTrip, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    first, *others = inputs
    return (trip(first.float()).to(first.dtype), *others)


class _Sums:
    """Sums over layers that a `WeightChange` is made of."""

    def __init__(self) -> None:
        self.along = self.change = self.noise = 0.0

    def add(self, weight: Tensor, rounded: Tensor, base: Tensor, rounded_base: Tensor) -> None:
        delta = weight - base.to(weight.device)
        self.along += float(((rounded - rounded_base) * delta).sum(dtype=torch.float64))
        self.change += float(delta.square().sum(dtype=torch.float64))
        self.noise += float((rounded - weight).square().sum(dtype=torch.float64))

    def result(self, model: nn.Module, layers: Sequence[nn.Linear | Conv1D]) -> WeightChange:
        share = sum(layer.weight.numel() for layer in layers) / sum(p.numel() for p in model.parameters())
        if self.change == 0:
            return WeightChange(float("nan"), float("nan"), share)
        return WeightChange(self.along / self.change, (self.noise / self.change) ** 0.5, share)


@torch.no_grad()
def on_grid(model: nn.Module, form: Format, tolerance: float = 1e-3) -> bool:
    """Whether a model's linear weights lie on a format's grid: rounding them moves them by less than `tolerance`.

    True of a model that was read from a file in that format, such as a GGUF.

    Args:
        tolerance: norm of the change over the norm of the weights.
    """
    moved = size = 0.0
    for layer in linear_layers(model):
        moved += float((_rounded(layer, form.weights) - layer.weight).double().square().sum())
        size += float(layer.weight.double().square().sum())
    return not form.is_reference and moved <= tolerance**2 * size


# --- The same round trips by libraries

LIBRARIES = {"mxfp8": "torchao", "mxfp4": "torchao", "nvfp4": "torchao", "nf4": "bitsandbytes", "q4_1": "gguf"}
"""Formats that a library has too, and which."""


def library_round_trip(name: str, weight: Tensor) -> Tensor | None:
    """A weight's round trip by torchao, bitsandbytes or gguf; None where no library has the format or it is absent.

    Args:
        weight: float32 (d_out, d_in), d_in a multiple of 64.
    """
    library = LIBRARIES.get(name)
    if library is None or importlib.util.find_spec(library) is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of CUDA parts that a CPU lacks
        return {"torchao": _torchao, "bitsandbytes": _bitsandbytes, "gguf": _gguf}[library](name, weight.contiguous())


def _torchao(name: str, weight: Tensor) -> Tensor:
    formats = "torchao.prototype.mx_formats"
    if name == "nvfp4":
        nvfp4: Any = importlib.import_module(f"{formats}.nvfp4_tensor")
        scale = nvfp4.per_tensor_amax_to_scale(weight.abs().max())
        return nvfp4.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale).dequantize(torch.float32)
    mx: Any = importlib.import_module(f"{formats}.mx_tensor")
    element = torch.float8_e4m3fn if name == "mxfp8" else torch.float4_e2m1fn_x2
    return mx.MXTensor.to_mx(weight, element, 32).dequantize(torch.float32)


def _bitsandbytes(_: str, weight: Tensor) -> Tensor:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    return functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))


def _gguf(_: str, weight: Tensor) -> Tensor:
    gguf: Any = importlib.import_module("gguf")
    kind = gguf.GGMLQuantizationType.Q4_1
    packed = gguf.quants.quantize(weight.cpu().numpy(), kind)
    return torch.from_numpy(np.asarray(gguf.quants.dequantize(packed, kind))).to(weight.device)


def library_version(name: str) -> str:
    """The library that has a format, with its version; empty where it is absent or none has it."""
    from importlib.metadata import PackageNotFoundError, version

    library = LIBRARIES.get(name)
    try:
        return "" if library is None else f"{library} {version(library)}"
    except PackageNotFoundError:
        return ""


def agreement_with_library(layers: Sequence[nn.Linear | Conv1D], form: Format) -> float:
    """Share of the elements of one weight that a library rounds to the same value; NaN where none can be asked."""
    weight = next((_by_input(one, one.weight.detach()) for one in layers if one.weight.shape[-1] % 64 == 0), None)
    if weight is None:
        return float("nan")
    weight = weight.float().contiguous()
    theirs = library_round_trip(form.name, weight)
    return float("nan") if theirs is None else float((theirs == form.weights(weight)).float().mean())
