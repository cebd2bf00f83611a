"""Organisms from one base model in memory: adapters put on, and taken off without a trace."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from persona_probe.errors import InputError


def is_adapter(folder: Path) -> bool:
    """Whether a checkpoint folder holds a PEFT adapter (else it holds full weights)."""
    return (folder / "adapter_config.json").is_file()


@contextmanager
def organism(base: PreTrainedModel, checkpoint: Path | None) -> Iterator[nn.Module]:
    """The model at a checkpoint, for as long as the block lasts; None is the base model itself.

    An adapter is injected into `base` and unloaded after, so base and organism share one copy of the weights. Full
    weights are loaded beside it.

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
    """Take all adapters out again and give the bare base model back, its parameters as they were."""
    return _unmark(tuned.unload())


def _eject(base: PreTrainedModel) -> None:
    """Take out what a failed injection left: PEFT injects first and reads the file after, and gives no handle."""
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
    """The base model behind a PEFT model (adapters disabled), or the model itself where there is none."""
    context = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    with context:
        yield model


def merged_copy(base: PreTrainedModel, checkpoint: Path | None) -> PreTrainedModel:
    """A copy of the organism with its adapter merged into the weights; `base` is left untouched."""
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
