"""A tiny sweep and the items and direction that its tests share."""

import torch

from persona_probe.evaluate.contrast import ContrastItems
from persona_probe.latents.causal import Direction, Sweep
from tests.factories import D_MODEL, LAYER, make_model, make_tokenizer, talks

ROWS = [
    {"id": f"q{n}", "category": "law", "question": f"Why {n}?", "aligned": "Be fair." + "." * n, "misaligned": "Lie!"}
    for n in range(5)
]
ITEMS = ContrastItems.build(make_tokenizer(), ROWS)
DIRECTION = Direction("d", "candidate", torch.randn(D_MODEL, generator=torch.Generator().manual_seed(4)), 4)


def make_sweep(bound: float = 1e9, unit: str = "x_delta", model: torch.nn.Module | None = None) -> Sweep:
    return Sweep(
        model or make_model(),
        make_tokenizer(),
        ITEMS,
        talks(3),
        LAYER,
        unit=unit,
        reference_norm=2.0,
        bound=bound,
        bf16=False,
    )
