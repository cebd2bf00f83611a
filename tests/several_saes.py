"""What tests of several SAEs share: SAEs of many places of the tiny model, and a count of its forward passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sae_lens
import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import SkipTranscoderConfig
from torch import nn

from persona_probe.models.layers import decoder_layers
from tests.factories import D_MODEL, D_SAE, make_sae


def make_transcoder(seed: int = 5, **settings: Any) -> Any:
    """A random transcoder of the tiny model's second MLP, with a skip connection."""
    shape: dict[str, Any] = {
        "d_in": D_MODEL,
        "d_out": D_MODEL,
        "d_sae": D_SAE,
        "apply_b_dec_to_input": False,
        **settings,
    }
    hooks = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    shape["metadata"] = SAEMetadata(**hooks, model_name="tiny")
    sae = sae_lens.SkipTranscoder(SkipTranscoderConfig(**shape))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    return sae.eval()


def all_kinds() -> dict[str, Any]:
    """SAEs of two residual streams, of the attention's heads and output, of the MLP's output, and a transcoder."""
    return {
        "low": make_sae("standard", seed=1, hook="blocks.0.hook_resid_post"),
        "high": make_sae("topk", seed=2, hook="blocks.2.hook_resid_post"),
        "heads": make_sae("jumprelu", seed=3, hook="blocks.1.attn.hook_z"),
        "attention": make_sae("topk", seed=4, hook="blocks.2.hook_attn_out"),
        "mlp": make_sae("standard", seed=6, hook="blocks.1.hook_mlp_out"),
        "normed": make_sae("standard", seed=7, hook="blocks.1.ln1.hook_normalized"),
        "transcoder": make_transcoder(),
    }


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """The numbers of tokens of the forward passes inside the block, one for each pass."""
    passes: list[int] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passes.append((args[0] if args else kwargs["hidden_states"]).shape[:2].numel())

    handle = decoder_layers(model)[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()
