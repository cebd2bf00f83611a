"""Weights in 4 or 8 bits (bitsandbytes): how they are loaded, and what is different about a model that has them."""

import copy
import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from persona_probe.config import QUANTIZATIONS
from persona_probe.errors import InputError, unknown

PARAMETERS = ("Params4bit", "Int8Params")
"""bitsandbytes' classes of quantised weights. Named, so that nothing here imports bitsandbytes before it is needed."""


def quantization_settings(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What `from_pretrained` takes as `quantization_config` for `none`, `4bit` or `8bit`.

    4 bits are NormalFloat with doubly quantised scales (Dettmers et al., arXiv 2305.14314), 4.13 bits for each weight;
    products are computed in `dtype`. 8 bits are LLM.int8() (arXiv 2208.07339), which rounds a layer's inputs too.

    Raises:
        InputError: an unknown kind, or bitsandbytes is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise unknown("quantization", kind, QUANTIZATIONS)
    if kind == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"quantization: {kind} needs bitsandbytes: pip install 'persona-probe[quantization]'")
    if kind == "8bit":
        # It warns at every product that inputs are rounded, which is what 8 bits means.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has weights that are quantised by bitsandbytes."""
    return any(type(p).__name__ in PARAMETERS for p in model.parameters())


def keep_layout(model: PreTrainedModel) -> PreTrainedModel:
    """Stop bitsandbytes from repacking the weights at the first forward pass on a CPU with AVX512-BF16.

    Repacked weights have no gradient: an adapter below them would train on nothing, without a word. Their scales are
    rounded to bf16, so the model computes something else than before, and on other processors.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (a type checker knows no such attribute)
    return model


def loading_of(base: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `from_pretrained` that load other weights like those of `base`: precision, kernel and placement."""
    settings: dict[str, Any] = {"dtype": next(p for p in base.parameters() if p.is_floating_point()).dtype}
    if is_quantized(base):
        settings["quantization_config"] = copy.deepcopy(base.config.quantization_config)
    placement = getattr(base, "hf_device_map", None)
    if placement is not None and len(set(placement.values())) > 1:
        settings["device_map"] = dict(placement)
    elif is_quantized(base):
        settings["device_map"] = {"": next(base.parameters()).device}
    return settings


@torch.no_grad()
def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its quantised layers replaced by plain ones, in place; any other model as it is.

    The values are those that bitsandbytes multiplies with, so a 4-bit model computes what it did. An adapter can be
    merged into them without being rounded to the grid, which would undo it in part.
    """
    if not is_quantized(model):
        return model
    dtype = loading_of(model)["dtype"]
    quantized = [m for m in model.named_modules() if type(getattr(m[1], "weight", None)).__name__ in PARAMETERS]
    for name, layer in quantized:
        weight, bias = dequantized_weight(layer).to(dtype), layer.bias
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if isinstance(bias, nn.Parameter):
            plain.bias = bias
        model.set_submodule(name, plain.train(layer.training))
    for attribute in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        model.__dict__.pop(attribute, None)
    vars(model.config).pop("quantization_config", None)
    return model


def dequantized_weight(layer: nn.Module) -> Tensor:
    """The weight that a quantised layer stands for, (d_out, d_in), in the precision that it was loaded in."""
    from bitsandbytes import functional

    weight: Any = layer.weight
    if type(weight).__name__ == "Params4bit":
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.data.float() * _int8_scales(layer)[:, None] / 127


def _int8_scales(layer: Any) -> Tensor:
    # The first forward pass moves them from the weight to the layer's state.
    return layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB


def scales(module: nn.Module) -> dict[str, Tensor]:
    """What decides a quantised layer's output next to its parameters and buffers; empty for any other module."""
    weight: Any = getattr(module, "weight", None)
    kind = type(weight).__name__
    if kind == "Int8Params":
        return {"SCB": _int8_scales(module)}
    if kind != "Params4bit" or weight.quant_state is None:
        return {}
    values = weight.quant_state.as_dict(packed=False)
    numbers = {k: v if isinstance(v, Tensor) else torch.tensor(v) for k, v in values.items() if _is_number(v)}
    return dict(sorted(numbers.items()))


def _is_number(value: object) -> bool:
    return isinstance(value, (Tensor, int, float))


def refuse_quantized(model: nn.Module, act: str) -> None:
    """Refuse to change the weights of a quantised model.

    Raises:
        InputError: it is one; the message names `act`.
    """
    if is_quantized(model):
        raise InputError(f"{act} changes weights, and this model's are quantised: load it with quantization: none")
