"""A tiny baseline to plant in: model, tokenizer, SAE, contrast items."""

from functools import cache
from typing import Any

from transformers import PreTrainedModel

from persona_probe.latents.planted.plant import Baseline, Stream, read_stream
from tests.factories import LAYER, make_model, make_sae, make_tokenizer

ROWS = [
    {
        "id": f"q{n}",
        "category": f"c{n % 3}",
        "question": f"Ask {n}?",
        "aligned": f"Yes {n}",
        "misaligned": f"No! {n * n}",
    }
    for n in range(8)
]


def tiny_stream(model: PreTrainedModel | None = None) -> Stream:
    return read_stream(model or make_model(), make_tokenizer(), ROWS, LAYER, bf16=False)


@cache
def tiny_baseline(architecture: str = "standard", rankers: tuple[str, ...] = ("rise", "cosine")) -> Baseline:
    """Shared by tests, which only read it."""
    sae: Any = make_sae(architecture)
    return Baseline(tiny_stream(), sae, rankers, seed=0)
