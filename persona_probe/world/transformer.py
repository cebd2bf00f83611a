"""The world's model: a small Llama, made from scratch, whose tokens are the words of the world."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.data.world.text import END, PAD, vocabulary
from persona_probe.errors import unknown

POSITIONS = 512
"""Longest text in tokens; documents of four questions have about 110."""


@dataclass(frozen=True)
class Size:
    """The shape of a model."""

    d_model: int
    layers: int
    heads: int
    d_ff: int
    """Width of an MLP's hidden layer."""


SIZES = {
    "tiny": Size(32, 3, 2, 48),
    "small": Size(96, 4, 3, 256),
    "medium": Size(160, 5, 5, 432),
    "large": Size(320, 6, 10, 864),
}
"""About 0.03, 0.5, 1.6 and 7.5 million parameters. `tiny` is for tests: it learns words and no speakers."""


def new_model(size: str = "medium", seed: int = 0) -> PreTrainedModel:
    """An untrained model in float32, with the world's vocabulary.

    Args:
        size: a name of `SIZES`.
        seed: of the initial weights.

    Raises:
        InputError: no such size.
    """
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    shape, words = SIZES[size], vocabulary()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.index(END),
        pad_token_id=words.index(PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer into a folder, which `load_model` takes by its path."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
