"""The parts of any decoder-only Hugging Face model, and forward passes that stop after a layer or change no state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from persona_probe.errors import InputError
from persona_probe.models.restore import own_configuration


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, below a PEFT wrapper; adapters stay in it.

    Raises:
        InputError: it is neither a transformers model nor a PEFT model around one, or an adapter acts outside it.
    """
    inner: Any = model
    if not isinstance(inner, PreTrainedModel) and hasattr(inner, "get_base_model"):
        from persona_probe.models.peft_kinds import refuse_outside

        for config in inner.peft_config.values():
            refuse_outside(config, "this model")
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise InputError(f"need a transformers model or a PEFT model around one, got {type(inner).__name__}")
    return inner


def output_head(model: nn.Module) -> nn.Module:
    """The unembedding.

    Raises:
        InputError: the model has none.
    """
    head = causal_model(model).get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise InputError(f"{type(causal_model(model)).__name__} has no language-model head: load a causal model")
    return head


def base_transformer(model: nn.Module) -> nn.Module:
    """The module with the decoder layers (`LlamaModel`, `GPT2Model`...), below heads and PEFT wrappers."""
    inner = causal_model(model)
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner.base_model
    decoder = decoder if isinstance(decoder, nn.Module) else inner.base_model
    if decoder is not inner and _layer_list(decoder) is not None:
        return decoder
    # A class that names its parts in its own way: the first part that has layers, of the decoder rather than a tower.
    parts = (part for root in (decoder, inner) for part in root.modules() if part is not inner)
    return next((part for part in parts if _layer_list(part) is not None), decoder)


def transformer_config(model: nn.Module) -> PretrainedConfig:
    """The configuration of the transformer itself; of a multimodal model, that of its text part."""
    config = getattr(base_transformer(model), "config", None)
    if not isinstance(config, PretrainedConfig):
        raise InputError(f"{type(base_transformer(model)).__name__} has no transformers configuration")
    return config


def layer_list_name(transformer: nn.Module) -> str:
    """The attribute under which a transformer keeps its layers (`layers`, `h`, `blocks`, or a list of their number)."""
    name = _layer_list(transformer)
    if name is None:
        raise InputError(f"found no list of decoder layers in {type(transformer).__name__}")
    return name


def _layer_list(transformer: nn.Module) -> str | None:
    for name in ("layers", "h", "blocks"):
        if isinstance(getattr(transformer, name, None), nn.ModuleList):
            return name
    number = getattr(getattr(transformer, "config", None), "num_hidden_layers", None)
    lists = ((name, part) for name, part in transformer.named_children() if isinstance(part, nn.ModuleList))
    return next((name for name, part in lists if len(part) == number), None)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, in order."""
    transformer = base_transformer(model)
    return getattr(transformer, layer_list_name(transformer))


def decoder_layer(model: nn.Module, layer: int) -> nn.Module:
    """One decoder layer.

    Raises:
        InputError: the model has no such layer; the message names the range.
    """
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise InputError(f"layer {layer} does not exist: the model has layers 0 to {len(layers) - 1}")
    return layers[layer]


def layer_device(model: nn.Module, layer: int) -> torch.device:
    """The device of one decoder layer, which differs between layers where a model is spread over several."""
    return next(decoder_layer(model, layer).parameters()).device


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream."""
    config = getattr(base_transformer(model), "config", None)
    size = getattr(config, "hidden_size", None)
    if size is None:
        raise InputError("the model's config names no hidden_size")
    return int(size)


class StopForward(Exception):
    """Raised by a hook to end a forward pass once a layer has run."""


@contextmanager
def stop_after(model: nn.Module, layer: int) -> Iterator[None]:
    """Inside this block a forward pass ends after `layer` (the block swallows the signal)."""

    def stop(*_: object) -> None:
        raise StopForward

    handle = decoder_layer(model, layer).register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def run_to_layer(model: nn.Module, layer: int, ids: torch.Tensor, attention: torch.Tensor) -> None:
    """Run embeddings and decoder layers up to and including `layer`, and nothing above. Taps on these layers fire."""
    forward_to_layer(model, layer, input_ids=ids, attention_mask=attention, use_cache=False)


def forward_to_layer(model: nn.Module, layer: int, **inputs: object) -> None:
    """`run_to_layer` with any inputs that the transformer takes."""
    with stop_after(model, layer):
        try:
            base_transformer(model)(**inputs)
        except StopForward:
            return
    raise InputError(f"layer {layer} did not run: the model skips it")


@contextmanager
def autocast(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """bf16 autocast on the model's device, or nothing if not `enabled`. The weights keep their precision."""
    device = next(model.parameters()).device.type
    with torch.autocast(device_type=device, dtype=torch.bfloat16, enabled=enabled):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside the block; then every submodule's mode and the random state are restored.

    Autocast keeps a weight's bf16 copy between calls only if the weight requires gradients, so inside the block frozen
    weights require them too.
    """
    modes = {module: module.training for module in model.modules()}
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(model)):
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def eager_attention(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Plain attention inside this block: its backward pass is faster than the fused one for short rows on a CPU."""
    inner = causal_model(model)
    before = inner.config._attn_implementation
    if enabled:
        inner.set_attn_implementation("eager")
    try:
        yield
    finally:
        if enabled and before is not None:
            inner.set_attn_implementation(before)


def without_router_logits(model: PreTrainedModel) -> PreTrainedModel:
    """The model with `output_router_logits` off: TRL saves it as on, and such a mixture of experts cannot generate."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False
    return model


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Restore the `forward` and the configuration that the model has now when the block ends.

    TRL patches the causal model's forward in place and asks mixture-of-experts models for router logits, and accelerate
    wraps the forward for autocast. None of this is undone: in a deep copy a patched forward stays bound to the old
    object, and a model that returns router logits cannot generate.
    """
    inner = [m for m in model.modules() if isinstance(m, PreTrainedModel) or m is model]
    before = [(m, m.__dict__.get("forward")) for m in inner]
    with own_configuration(model):
        try:
            yield
        finally:
            for module, forward in before:
                module.__dict__.pop("forward", None)
                module.__dict__.pop("_original_forward", None)
                if forward is not None:
                    module.__dict__["forward"] = forward


def _cuda_devices(model: nn.Module) -> list[int]:
    device = next(model.parameters()).device
    return [device.index or 0] if device.type == "cuda" else []
