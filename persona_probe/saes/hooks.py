"""From the hook names in an SAE's metadata to the decoder layer whose output it reads."""

import re
from typing import Any

from persona_probe.errors import InputError

GIVE_LAYER = "give the layer yourself (layer=, or `layer:` in a study's YAML)"
RESIDUAL = (
    # TransformerLens, and the names that its bridge uses for the same places.
    (r"blocks\.(\d+)\.(?:hook_resid_post|hook_out)", 0),
    (r"blocks\.(\d+)\.(?:hook_resid_pre|hook_in)", -1),
    # Hugging Face module paths, bare or with SAELens' `.output` and `.input`.
    (r"(?:[\w.]*\.)?(?:layers|h|blocks)\.(\d+)(?:\.output)?", 0),
    (r"(?:[\w.]*\.)?(?:layers|h|blocks)\.(\d+)\.input", -1),
)
ELSEWHERE = (
    (r"hook_z$|o_proj\.input$", "the attention heads"),
    (r"attn", "the attention"),
    (r"hook_mlp_out$|post_feedforward_layernorm", "the MLP's output"),
    (r"hook_mlp_in$|pre_feedforward_layernorm|\.ln2\.", "the MLP's input"),
    (r"\.mlp(\.|$)", "the MLP"),
    (r"hook_resid_mid$", "the middle of a layer"),
    (r"embed", "the embeddings"),
)


def sae_layer(sae: Any) -> int:
    """The decoder layer whose output the SAE reads, from `hook_name` and `hf_hook_name` in its metadata.

    Understands TransformerLens' `blocks.L.hook_resid_post` and `blocks.L.hook_resid_pre` (the layer below), its
    bridge's `blocks.L.hook_out` and `hook_in`, and Hugging Face's `model.layers.L`, with or without `.output`.

    Raises:
        InputError: the metadata names no residual stream after a layer, or two different layers.
    """
    metadata = sae.cfg.metadata
    hooks = [h for h in (metadata.hook_name, metadata.hf_hook_name) if h]
    if not hooks:
        raise InputError(f"the SAE's metadata names no hook: {GIVE_LAYER}")
    layers = {layer for hook in hooks if (layer := hook_layer(hook)) is not None}
    if not layers:
        raise InputError(f"the SAE's hook {hooks[0]!r} is not a residual stream that is known here: {GIVE_LAYER}")
    if len(layers) > 1:
        named = " and ".join(repr(h) for h in hooks)
        raise InputError(f"the SAE's metadata names two layers ({named}): {GIVE_LAYER}")
    return layers.pop()


def hook_layer(hook: str) -> int | None:
    """The decoder layer whose output is at `hook`; None for a spelling that is not known.

    Raises:
        InputError: the hook is known, and is not the residual stream after a layer.
    """
    for pattern, shift in RESIDUAL:
        if match := re.fullmatch(pattern, hook):
            layer = int(match[1]) + shift
            if layer < 0:
                raise InputError(f"this SAE reads the embeddings ({hook}): no decoder layer precedes it")
            return layer
    for pattern, what in ELSEWHERE:
        if re.search(pattern, hook):
            raise InputError(
                f"this SAE reads {what} ({hook}), not a residual stream: take a residual-stream SAE of the same model"
            )
    return None
