"""Readings of the tiny models, with and without a cache."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from persona_probe.data.tokens import Batch, conversation_batches
from persona_probe.models.activation_cache import ActivationCache
from persona_probe.models.residuals import read_residuals_at
from tests.factories import LAYER, make_model, make_tokenizer, talks

POSITIONS = ("prompt", "response")


def groups(count: int = 6) -> list[Batch]:
    return conversation_batches(make_tokenizer(), talks(count), 4)


def stream(model: nn.Module, cache: ActivationCache | None, **changed: Any) -> Tensor:
    """All visited tokens, in order."""
    seen: list[Tensor] = []
    asked: dict[str, Any] = {"groups": groups(), "layer": LAYER, "positions": POSITIONS, "bf16": False}
    asked |= changed
    read_residuals_at(model, visit=lambda _index, _row, x, _masks: seen.append(x.clone()), cache=cache, **asked)
    return torch.cat(seen)


def adapted(model: PreTrainedModel | None = None, seed: int = 3) -> PeftModel:
    """A LoRA adapter with weights that matter, on all linear layers."""
    tuned = get_peft_model(model or make_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    assert isinstance(tuned, PeftModel)
    return tuned.eval()


def again(cache: ActivationCache, **changed: Any) -> ActivationCache:
    """The same folder, opened afresh."""
    return ActivationCache(cache.folder, **changed)
