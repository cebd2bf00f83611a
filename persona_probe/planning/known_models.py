"""Architecture numbers of models that researchers use, so that a dry run needs no download.

Each entry holds what the model's own config.json says and transformers' defaults do not; a test builds every one and
compares the count of its parameters with the published one.
"""

from dataclasses import dataclass
from typing import Any

from persona_probe.models.sources import ALIASES


@dataclass(frozen=True)
class KnownModel:
    """One architecture, as transformers' configuration classes take it."""

    kind: str
    """transformers' `model_type`."""
    numbers: dict[str, Any]
    """Keyword arguments of that configuration class."""
    parameters: int
    """Parameters in all, tied embeddings counted once; of a multimodal model the vision tower too."""


def _text(layers: int, d_model: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": d_model,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
GEMMA = {"head_dim": 256}
GEMMA_3_VISION = {
    **{"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27},
    **{"image_size": 896, "patch_size": 14, "vision_use_head": False},
}
GEMMA_3_4B = {
    "text_config": _text(34, 2560, 10240, 8, 4, 262208) | GEMMA,
    "vision_config": GEMMA_3_VISION,
    "mm_tokens_per_image": 256,
}

KNOWN = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": KnownModel("llama", _text(30, 576, 1536, 9, 3, 49152) | TIED, 134_515_008),
    "Qwen/Qwen2.5-0.5B-Instruct": KnownModel("qwen2", _text(24, 896, 4864, 14, 2, 151936) | TIED, 494_032_768),
    "Qwen/Qwen2.5-7B-Instruct": KnownModel("qwen2", _text(28, 3584, 18944, 28, 4, 152064) | UNTIED, 7_615_616_512),
    "Qwen/Qwen2.5-14B-Instruct": KnownModel("qwen2", _text(48, 5120, 13824, 40, 8, 152064) | UNTIED, 14_770_033_664),
    "meta-llama/Llama-3.2-1B-Instruct": KnownModel("llama", _text(16, 2048, 8192, 32, 8, 128256) | TIED, 1_235_814_400),
    "meta-llama/Llama-3.1-8B-Instruct": KnownModel(
        "llama", _text(32, 4096, 14336, 32, 8, 128256) | UNTIED, 8_030_261_248
    ),
    "google/gemma-2-9b-it": KnownModel("gemma2", _text(42, 3584, 14336, 16, 8, 256000) | GEMMA, 9_241_705_984),
    "google/gemma-3-270m-it": KnownModel("gemma3_text", _text(18, 640, 2048, 4, 1, 262144) | GEMMA, 268_098_176),
    "google/gemma-3-1b-it": KnownModel("gemma3_text", _text(26, 1152, 6912, 4, 1, 262144) | GEMMA, 999_885_952),
    "google/gemma-3-4b-it": KnownModel("gemma3", GEMMA_3_4B, 4_300_079_472),
}
"""By Hugging Face id."""


def known_id(name: str) -> str | None:
    """The id in the table for an alias, an id, or an id without its owner; None where there is none."""
    wanted = (ALIASES[name].hub_id if name in ALIASES else name).lower()
    return next((key for key in KNOWN if wanted in (key.lower(), key.lower().partition("/")[2])), None)
