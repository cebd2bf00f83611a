"""Places inside a decoder layer where activations are read and pushed, and which module of any model holds each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_probe.errors import InputError
from persona_probe.models.layers import decoder_layer, hidden_size

RESIDUAL = "resid_post"
PARTS = {
    RESIDUAL: "the residual stream after the layer",
    "attn_out": "what the attention adds to the residual stream",
    "attn_module": "the attention module's output",
    "attn_z": "the attention heads' outputs, concatenated, before the output projection",
    "mlp_out": "what the MLP adds to the residual stream",
    "mlp_module": "the MLP module's output",
    "mlp_in": "the MLP's input, after its norm",
    "ln1_normalized": "the normalised stream before the attention, without the norm's gain",
    "ln2_normalized": "the normalised stream before the MLP, without the norm's gain",
}
"""Names of places, as in TransformerLens; a dotted path (`self_attn.o_proj.input`) names a module and its side."""


@dataclass(frozen=True, order=True)
class Place:
    """One place in one decoder layer."""

    layer: int
    part: str = RESIDUAL
    """A name of `PARTS`, or a module's path inside the layer that ends with `.input` or `.output`."""

    def __str__(self) -> str:
        if self.part == RESIDUAL:
            return f"layer {self.layer}"
        return f"{PARTS.get(self.part, self.part)} in layer {self.layer}"

    @property
    def is_residual(self) -> bool:
        """Whether this is the residual stream after a layer."""
        return self.part == RESIDUAL

    @property
    def short(self) -> str:
        """A name for tables and files: `L12`, or `L12.mlp_out`."""
        return f"L{self.layer}" if self.is_residual else f"L{self.layer}.{self.part}"


Where = int | Place
"""A decoder layer's number stands for the residual stream after it."""


def as_place(where: Where) -> Place:
    """The place, where a layer's number may stand for it."""
    return where if isinstance(where, Place) else Place(where)


# --- Which module holds a place: the names that transformers uses

ATTENTION = ("self_attn", "attn", "attention")
PROJECTION = ("o_proj", "c_proj", "out_proj", "dense", "wo")
MLP = ("mlp", "feed_forward", "block_sparse_moe")
POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)
"""Norms on what attention and MLP add (Gemma 2 to 4, OLMo 2; GLM-4). A layer has both of a pair, or neither."""
NORM_1 = ("input_layernorm", "ln_1", "operator_norm")
NORM_2 = ("pre_feedforward_layernorm", "pre_ff_layernorm", "ffn_norm", "ln_2", "post_attention_layernorm")
MIXERS = ("linear_attn", "conv", "mamba", "mixer", "temporal_block")
"""What stands in place of attention in a layer of a hybrid model."""


@dataclass(frozen=True)
class Site:
    """One side of one module."""

    module: nn.Module
    side: str
    """`output`, `input`, or `normalized` (a norm's output before its gain)."""
    width: int


def find_site(model: nn.Module, where: Where) -> Site:
    """The module and side that hold a place.

    Raises:
        InputError: no such layer, or this layer has no such place; the message says which modules it has.
    """
    place = as_place(where)
    layer = decoder_layer(model, place.layer)
    width = hidden_size(model)
    if place.part == RESIDUAL:
        return Site(layer, "output", width)
    if "." in place.part:
        return _dotted(layer, place, width)
    if place.part not in PARTS:
        raise InputError(f"unknown place {place.part!r}: known are {', '.join(PARTS)}, or module.input, module.output")
    if place.part == "ln1_normalized":
        return Site(_child(layer, place, NORM_1, "norm before its attention"), "normalized", width)
    if place.part == "ln2_normalized":
        return Site(_norm_before_mlp(layer, place), "normalized", width)
    if place.part.startswith("mlp"):
        mlp = _child(layer, place, MLP, "MLP")
        if place.part == "mlp_in":
            return Site(mlp, "input", width)
        return Site(_post_norm(layer, 1) or mlp if place.part == "mlp_out" else mlp, "output", width)
    attention = _child(layer, place, ATTENTION, "attention")
    if place.part == "attn_z":
        projection = _child(attention, place, PROJECTION, "output projection")
        return Site(projection, "input", _width(projection, "input", width))
    return Site(_post_norm(layer, 0) or attention if place.part == "attn_out" else attention, "output", width)


def _post_norm(layer: nn.Module, which: int) -> nn.Module | None:
    for pair in POST_NORMS:
        if all(hasattr(layer, name) for name in pair):
            return getattr(layer, pair[which])
    return None


def _norm_before_mlp(layer: nn.Module, place: Place) -> nn.Module:
    after = {id(_post_norm(layer, which)) for which in (0, 1)}
    names = [name for name in NORM_2 if id(getattr(layer, name, None)) not in after]
    return _child(layer, place, names, "norm before its MLP")


def _child(parent: nn.Module, place: Place, names: "tuple[str, ...] | list[str]", what: str) -> nn.Module:
    for name in names:
        child = getattr(parent, name, None)
        if isinstance(child, nn.Module):
            return child
    mixers = [name for name in MIXERS if hasattr(parent, name)]
    instead = f" ({mixers[0]} stands in its place)" if mixers and what == "attention" else ""
    children = ", ".join(name for name, _ in parent.named_children())
    raise InputError(
        f"layer {place.layer} of this model has no {what}{instead}: it has {children}; take an SAE of another layer, "
        "or of the residual stream"
    )


def _dotted(layer: nn.Module, place: Place, width: int) -> Site:
    path, _, side = place.part.rpartition(".")
    if side not in ("input", "output"):
        raise InputError(f"unknown place {place.part!r}: a module's path must end with .input or .output")
    module = layer
    for name in path.split("."):
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            children = ", ".join(name for name, _ in module.named_children()) or "no modules"
            raise InputError(f"layer {place.layer} of this model has no module {path!r}: there are {children}")
        module = child
    return Site(module, side, _width(module, side, width))


def _width(module: nn.Module, side: str, otherwise: int) -> int:
    """Features of a linear module's side: `nn.Linear`, quantised and PEFT ones, and GPT-2's `Conv1D`."""
    names = ("in_features", "nx") if side == "input" else ("out_features", "nf")
    return next((int(size) for name in names if isinstance(size := getattr(module, name, None), int)), otherwise)


# --- The activation at a site, out of what a module got or gave


def output_value(output: object) -> Tensor:
    """The activation in a module's output: the tensor, or the first of a tuple.

    Raises:
        InputError: the output is neither.
    """
    value = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(value, Tensor):
        raise InputError(f"the module returned {type(output).__name__}, not a tensor")
    return value


def replace_output(output: object, value: Tensor) -> object:
    """The output with another activation in it."""
    return (value, *output[1:]) if isinstance(output, tuple) else value


def input_value(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The activation in a module's call: the first argument, or `hidden_states`.

    Raises:
        InputError: the call has neither.
    """
    value = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(value, Tensor):
        raise InputError(f"a module was called without a tensor to read (it got {', '.join(kwargs) or 'nothing'})")
    return value


def replace_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments with another activation in them."""
    if args:
        return (value, *args[1:]), dict(kwargs)
    return args, {**kwargs, "hidden_states": value}


class Normalizer:
    """A norm module without its gain: what TransformerLens calls `hook_normalized`.

    Whether the module centres (LayerNorm) and how its gain enters (w, or 1 + w as in Gemma) is found by comparing with
    the module's own output.

    Raises:
        InputError: the module's output is none of these.
    """

    def __init__(self, norm: nn.Module) -> None:
        names = ("eps", "variance_epsilon")
        self.eps = next((float(e) for n in names if (e := getattr(norm, n, None)) is not None), 0.0)
        weight = getattr(norm, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 1:
            raise InputError(f"{type(norm).__name__} is no LayerNorm or RMSNorm with a gain: its input cannot be read")
        probe = torch.linspace(-1.5, 2.5, 2 * weight.numel(), device=weight.device, dtype=weight.dtype).reshape(2, -1)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            given = output_value(norm(probe)).float()
            gain, bias = weight.float(), getattr(norm, "bias", None)
            for self.centred in (False, True):
                plain = self(probe)
                for factor in (gain, 1 + gain):
                    wanted = plain * factor + (0 if bias is None else bias.float())
                    if torch.allclose(given, wanted, rtol=1e-2, atol=1e-2 if weight.dtype != torch.float32 else 1e-4):
                        return
        raise InputError(f"{type(norm).__name__} is no LayerNorm or RMSNorm that is known: its input cannot be read")

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The input, (centred and) divided by its root mean square; in float32."""
        x = x.float()
        x = x - x.mean(dim=-1, keepdim=True) if self.centred else x
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
