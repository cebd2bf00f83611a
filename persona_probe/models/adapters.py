"""Organisms from one base model in memory: adapters are put on and taken off, and leave nothing behind."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from persona_probe.errors import InputError


def is_adapter(folder: Path) -> bool:
    """Whether a checkpoint folder holds a PEFT adapter (else it holds full weights)."""
    return (folder / "adapter_config.json").is_file()


@contextmanager
def organism(base: PreTrainedModel, checkpoint: Path | None) -> Iterator[nn.Module]:
    """The model at a checkpoint, for as long as the block lasts; None is the base model itself.

    An adapter is injected into `base` and unloaded afterwards, so base and organism share one copy of the weights. Full
    weights are loaded as a second model.

    Raises:
        InputError: the checkpoint holds neither adapter nor weights, or they are damaged.
    """
    if checkpoint is None:
        yield base
        return
    if not is_adapter(checkpoint):
        yield _full_weights(base, checkpoint)
        return
    trainable = {name: p.requires_grad for name, p in base.named_parameters()}
    tuned = load_adapter(base, checkpoint)
    try:
        yield tuned
    finally:
        strip_adapter(tuned)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(trainable[name])


def load_adapter(base: PreTrainedModel, checkpoint: Path, trainable: bool = False) -> PeftModel:
    """`base` with the checkpoint's adapter injected.

    Raises:
        InputError: the adapter file is damaged or does not fit the model.
    """
    try:
        tuned = PeftModel.from_pretrained(base, str(checkpoint), is_trainable=trainable)
    except Exception as error:  # safetensors and PEFT raise many kinds for a damaged file
        _eject(base)
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"could not load the adapter in {checkpoint}: {first}; train that arm again") from error
    return tuned.train(trainable)


def strip_adapter(tuned: PeftModel) -> PreTrainedModel:
    """Remove all adapters and return the bare base model with its parameters as they were."""
    return _unmark(tuned.unload())


def _eject(base: PreTrainedModel) -> None:
    """Remove what a failed injection left: PEFT injects before it reads the file, and returns no handle."""
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base.set_submodule(name, module.get_base_layer())
    _unmark(base)


def _unmark(base: PreTrainedModel) -> PreTrainedModel:
    if hasattr(base, "peft_config"):
        del base.peft_config
    # Injection froze the base; a bare model has trainable parameters.
    base.requires_grad_(True)
    # PEFT marks the model as adapted for transformers' own adapter mixin.
    if getattr(base, "_hf_peft_config_loaded", False):
        base._hf_peft_config_loaded = False
    return base.eval()


@contextmanager
def base_weights(model: nn.Module) -> Iterator[nn.Module]:
    """The base model behind a PEFT model (adapters disabled), or the model itself if it is no PEFT model."""
    context = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    with context:
        yield model


def merged_copy(base: PreTrainedModel, checkpoint: Path | None) -> PreTrainedModel:
    """A copy of the organism with its adapter merged into the weights; `base` does not change."""
    if checkpoint is not None and not is_adapter(checkpoint):
        return _full_weights(base, checkpoint)
    twin = copy.deepcopy(base)
    if checkpoint is None:
        return twin
    return load_adapter(twin, checkpoint).merge_and_unload()


def _full_weights(base: PreTrainedModel, checkpoint: Path) -> PreTrainedModel:
    if not (checkpoint / "config.json").is_file():
        raise InputError(f"no adapter and no weights in {checkpoint}: train that arm again")
    parameter = next(base.parameters())
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=parameter.dtype, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"could not load the weights in {checkpoint}: {first}; train that arm again") from error
    return model.to(parameter.device).eval()  # pyright: ignore[reportArgumentType]


def trainable_parameters(model: nn.Module) -> dict[str, torch.nn.Parameter]:
    """Names and parameters that training changes."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --- Faster layers for a while: adapters folded into their weights, frozen weights in bf16


def foldable(layer: nn.Module) -> bool:
    """Whether a module is a plain LoRA layer with one active adapter, over a plain linear layer in float32."""
    return (
        isinstance(layer, LoraLinear)
        and not (layer.disable_adapters or layer.merged or layer.lora_variant)
        and len(layer.active_adapters) == 1
        and layer.active_adapters[0] in layer.lora_A
        and type(layer.get_base_layer()) is nn.Linear
        and layer.get_base_layer().weight.dtype == torch.float32
    )


@torch.no_grad()
def folded_weight(layer: LoraLinear, dtype: torch.dtype) -> Tensor:
    """Weight plus adapter, (d_out, d_in), summed in float32 and kept in `dtype`."""
    return (_base(layer).weight + layer.get_delta_weight(layer.active_adapters[0])).to(dtype)


def _replace(layer: nn.Module, forward: Callable[..., Tensor]) -> None:
    setattr(layer, "forward", forward)  # noqa: B010 (a method that type checkers guard)


def _base(layer: nn.Module) -> nn.Linear:
    inner = layer.get_base_layer() if isinstance(layer, LoraLinear) else layer
    assert isinstance(inner, nn.Linear)
    return inner


@contextmanager
def folded(model: nn.Module, bf16: bool = True) -> Iterator[nn.Module]:
    """Inside this block every LoRA layer is one product with weight plus adapter; the weights do not change.

    On a CPU the adapters' small products cost half as much as the layer itself. On other devices, and for layers that
    are not `foldable`, nothing changes: the copies (half of the float32 weights under bf16) would not pay off.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    layers = [m for m in model.modules() if on_cpu and foldable(m)]
    dtype = torch.bfloat16 if bf16 else torch.float32
    for layer in layers:
        assert isinstance(layer, LoraLinear)
        _replace(layer, partial(F.linear, weight=folded_weight(layer, dtype), bias=_base(layer).bias))
    try:
        yield model
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


@contextmanager
def frozen_in_bf16(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Inside this block frozen linear layers use one bf16 copy of their weights; autocast would make one at every call.

    Autocast keeps its copies only for weights that require gradients. Plain LoRA layers over frozen layers compute the
    same sum with fewer operations. For a CPU. Nothing changes outside autocast, or if adapters are switched off.
    """
    layers = [
        m for m in model.modules() if enabled and type(m) is nn.Linear and not m.weight.requires_grad and m.bias is None
    ]
    for layer in layers:
        _replace(layer, partial(_linear_in_bf16, layer.forward, layer.weight.to(torch.bfloat16)))
    in_bf16 = set(layers)
    adapted = [m for m in model.modules() if isinstance(m, LoraLinear) and foldable(m) and _base(m) in in_bf16]
    for layer in adapted:
        _replace(layer, partial(_lora_in_bf16, layer, layer.forward))
    try:
        yield
    finally:
        for layer in [*layers, *adapted]:
            layer.__dict__.pop("forward", None)


def bf16_weight(layer: nn.Linear) -> Tensor:
    """A linear layer's weight in bf16: the copy of `frozen_in_bf16` inside its block, else a new one."""
    forward = layer.__dict__.get("forward")
    if isinstance(forward, partial) and forward.func is _linear_in_bf16:
        return forward.args[1]
    return layer.weight.to(torch.bfloat16)


def _lora_in_bf16(layer: LoraLinear, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """PEFT's sum with the input cast once and the scaled sum in one step; the last bit may be rounded differently."""
    if not torch.is_autocast_enabled(x.device.type) or not foldable(layer):
        return forward(x)
    name, low = layer.active_adapters[0], x.to(torch.bfloat16)
    added = layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](low)))
    return torch.add(layer.get_base_layer()(low), added, alpha=layer.scaling[name])


def _linear_in_bf16(forward: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor) -> Tensor:
    # Outside autocast the caller wants the layer's own precision.
    return F.linear(x, weight) if torch.is_autocast_enabled(x.device.type) else forward(x)
