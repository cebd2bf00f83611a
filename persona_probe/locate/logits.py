"""What a direction writes: its direct effect on the logits, and the tokens at both ends."""

import logging

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.locate.feature_card import TokenLogit
from persona_probe.models.layers import base_transformer, output_head

log = logging.getLogger(__name__)

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
"""Where decoder-only models of transformers keep the norm before the unembedding."""


@torch.no_grad()
def logit_effect(model: nn.Module, direction: Float[Tensor, " d_model"]) -> Float[Tensor, " vocab"]:
    """Direct effect of a direction on the logits: through the final norm's scale and the unembedding.

    The norm's division by the residual's size is left out (it is the same for all tokens), as is a cap on the logits
    (it keeps their order). So the values compare tokens, and are no logits of a forward pass.
    """
    weight = output_head(model).get_parameter("weight").float()
    vector = direction.detach().to(weight.device).float()
    norm = final_norm(model)
    if isinstance(norm, nn.LayerNorm):
        vector = vector - vector.mean()
    return weight @ (vector if norm is None else vector * norm_scale(norm, vector))


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm between the last layer and the unembedding; None, with a warning, where none of the names is known."""
    children = dict(base_transformer(model).named_children())
    for name in FINAL_NORMS:
        if name in children:
            return children[name]
    log.warning("found no final norm in %s: logit effects leave it out", type(base_transformer(model)).__name__)
    return None


def norm_scale(norm: nn.Module, like: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """What a norm multiplies each coordinate by; asked of the norm itself, since Gemma's stores weight - 1."""
    if isinstance(norm, nn.LayerNorm):
        return torch.ones_like(like) if norm.weight is None else norm.weight.float()
    return norm(torch.ones_like(like)).float()


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, logits: Float[Tensor, " vocab"], count: int, largest: bool
) -> tuple[TokenLogit, ...]:
    """The `count` tokens that a direction promotes most (or suppresses most), the strongest first."""
    values, ids = logits.topk(min(count, len(logits)), largest=largest)
    return tuple(
        TokenLogit(str(tokenizer.decode([i])), i, round(v, 4))
        for v, i in zip(values.tolist(), ids.tolist(), strict=True)
    )
