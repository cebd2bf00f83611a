"""Models of published shapes and SAEs of published sizes, random, made on the device: no weights are downloaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

from persona_probe.data.chat import Conversation
from persona_probe.data.load import Row


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model, the layer that is read, and the SAE on it."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    layer: int
    """The decoder layer that is read and pushed."""
    latents: int = 131_072
    k: int = 64
    """Active latents of a token."""


SHAPES = {
    "0.5b": Shape("Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 151_936, True, 12),
    "7b": Shape("Qwen2.5-7B", 3584, 18_944, 28, 28, 4, 152_064, False, 15),
}
TINY = Shape("tiny", 32, 48, 3, 4, 2, 0, True, 1, latents=256, k=8)
"""Takes the tokenizer's own vocabulary."""


@dataclass(frozen=True)
class Amount:
    """How much of each work is measured."""

    items: int = 24
    """Contrast items, with two answers each."""
    pushes: int = 64
    naive_pushes: int = 4
    """The naive way takes the same time for each."""
    steps: int = 10
    every: int = 5
    """Training steps between readings of the monitor: more often than by default, so that a short run shows them."""
    probes: int = 12
    rows: int = 128
    """Training rows."""
    prompts: int = 4
    samples: int = 16
    """Answers to each prompt."""
    new_tokens: int = 48
    batch: int = 32
    repeats: int = 3


FEW = Amount(2, 3, 1, 2, 1, 2, 4, 1, 2, 3, 4, 1)


@dataclass(frozen=True, eq=False)
class GpuCase:
    """A model with its SAE and rows, on one device."""

    shape: Shape
    amount: Amount
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sae: Any
    contrast: Sequence[Row]
    training: Sequence[Conversation]
    probes: Sequence[Conversation]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device


def random_model(
    shape: Shape, tokenizer: PreTrainedTokenizerBase, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """A Qwen2 model with random weights, made on the device."""
    torch.manual_seed(0)
    tokens: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        vocab_size=shape.vocabulary or len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
        bos_token_id=None,
        **tokens,
    )
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_sae(shape: Shape, device: torch.device, architecture: str = "topk") -> Any:
    """A TopK SAE of the shape's layer (or a standard one) with random unit decoder rows, float32."""
    from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    settings: dict[str, Any] = {"d_in": shape.hidden, "d_sae": shape.latents, "device": str(device), "dtype": "float32"}
    settings["metadata"] = SAEMetadata(hook_name=f"blocks.{shape.layer}.hook_resid_post", model_name=shape.name)
    torch.manual_seed(0)
    if architecture == "topk":
        sae: Any = TopKSAE(TopKSAEConfig(**settings, k=shape.k))
    else:
        sae = StandardSAE(StandardSAEConfig(**settings))
    with torch.no_grad():
        sae.W_dec.normal_()
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        sae.W_enc.copy_(sae.W_dec.T)
    return sae.eval()
