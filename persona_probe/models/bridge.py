"""A TransformerLens bridge of a merged copy, so that the study's own model stays as it is."""

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.models.adapters import merged_copy


def make_bridge(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None,
    name: str,
    sae: Any | None = None,
) -> Any:
    """A `SAETransformerBridge` (TransformerLens' `TransformerBridge` with SAELens' attachable SAEs).

    Booting rewrites the Hugging Face model in place and sets BOS on the tokenizer, so both are copies here. Pass
    token ids, with `prepend_bos=False`, when the text already went through a chat template.

    Args:
        checkpoint: an organism's folder, or None for the base model.
        name: the model's name, as TransformerLens shows it.
        sae: attached with its error term when given, so outputs stay those of the model.
    """
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    bridge = SAETransformerBridge.boot_transformers(
        name,
        hf_model=merged_copy(base, checkpoint),
        tokenizer=copy.deepcopy(tokenizer),
        device=str(base.device),
    )
    # Without it SAELens' bridge knows only the new names, and silently ignores `blocks.L.hook_resid_post`.
    bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    if sae is not None:
        bridge.add_sae(sae, use_error_term=True)
    return bridge
