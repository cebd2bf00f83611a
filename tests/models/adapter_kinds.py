"""Adapters of every PEFT kind for a tiny Qwen2 (its attention has biases), written to folders; a hash of a base."""

import copy
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tests.factories import SHAPE, make_model

IDS = torch.arange(20).reshape(2, 10) + 5
TARGETS: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}


def lora(**changes: Any) -> peft.LoraConfig:
    """A LoRA of rank 4."""
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 16, **TARGETS, **changes})


KINDS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "rank 1": lambda: lora(r=1),
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "lora bias": lambda: lora(lora_bias=True),
    "bias all": lambda: lora(bias="all"),
    "bias lora_only": lambda: lora(bias="lora_only"),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "embeddings": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "embeddings tied": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "head tied": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "token indices": lambda: lora(trainable_token_indices=[5, 6, 7]),
    "token indices tied": lambda: lora(trainable_token_indices=[5, 6, 7]),
    "saved embeddings": lambda: lora(modules_to_save=["embed_tokens"]),
    "saved embeddings tied": lambda: lora(modules_to_save=["embed_tokens"]),
    "saved head": lambda: lora(modules_to_save=["lm_head"]),
    "saved both tied": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    "saved and kept tied": lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "saved norm": lambda: lora(modules_to_save=["norm"]),
    "parameters": lambda: lora(target_modules=[], target_parameters=["mlp.down_proj.weight"]),
    "vera": lambda: peft.VeraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "ia3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **TARGETS),
    "loha": lambda: peft.LoHaConfig(r=4, **TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=4, **TARGETS),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, **TARGETS),
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, **TARGETS),
    "layer norms": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]),
    "tokens": lambda: peft.TrainableTokensConfig(
        token_indices=[5, 6], target_modules=["embed_tokens"], task_type="CAUSAL_LM"
    ),
}
OUTSIDE: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2),
}
"""Kinds that act in PEFT's own forward, around the model."""


def base_model(kind: str = "") -> PreTrainedModel:
    """The tiny base; tied embeddings where the kind's name says so."""
    if kind == "adaption prompt":  # PEFT has it for Llama only
        return make_model()
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, "tie_word_embeddings": kind.endswith("tied")})).eval()


def tuned_model(kind: str, seed: int = 1, base: PreTrainedModel | None = None) -> Any:
    """A PEFT model of a kind, with everything that it trains moved."""
    config = {**KINDS, **OUTSIDE}[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(base or base_model(kind), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return tuned.eval()


def write_adapter(folder: Path, kind: str, seed: int = 1) -> Path:
    """The adapter of `tuned_model` as PEFT saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned_model(kind, seed).save_pretrained(str(folder))
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits of a few tokens."""
    return model(IDS).logits


def state_hash(model: PreTrainedModel) -> str:
    """A hash of all that a model is: weights, buffers, ties, flags, modules, hooks, attributes, configurations."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad} {tensor.grad}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)]
        digest.update(f"{name} {type(module)} {module.training} {hooks} {sorted(vars(module))}".encode())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight  # pyright: ignore
    settings = [copy.deepcopy(vars(model.config)), model.generation_config.to_dict()]  # pyright: ignore
    digest.update(f"{tied} {settings} {getattr(model, '_hf_peft_config_loaded', None)}".encode())
    return digest.hexdigest()
