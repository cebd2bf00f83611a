"""An organism and its base, opened one after the other: a study's share one copy of the weights in memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.context import Context
from persona_probe.errors import InputError
from persona_probe.models.adapters import base_weights
from persona_probe.monitor.features import Feature

Opener = Callable[[], AbstractContextManager[nn.Module]]


@dataclass(frozen=True)
class Pair:
    """What a choice of rows by the model's own measure needs."""

    organism: Opener
    """Opens the organism for the length of a block."""
    base: Opener | None
    """Opens its base; None where there is none, which gaps then refuse."""
    tokenizer: PreTrainedTokenizerBase
    layer: int
    """Decoder layer whose output is projected."""
    direction: Float[Tensor, " d_model"]
    """The persona feature as a direction."""
    bf16: bool = True

    def require_base(self) -> Opener:
        """The opener of the base.

        Raises:
            InputError: there is none.
        """
        if self.base is None:
            raise InputError("choosing rows by a gap needs the base model: pass base=, or a PEFT model")
        return self.base

    @classmethod
    def of_study(cls, ctx: Context, seed: int) -> "Pair":
        """The organism that the study repairs, and the study's base, layer and persona latent."""
        from persona_probe.locate.stage import persona_latent

        opened = partial(ctx.organism, ctx.config.realign.start, seed)
        direction = feature_direction(ctx.sae, persona_latent(ctx))
        return cls(opened, ctx.base, ctx.tokenizer, ctx.layer, direction, ctx.config.bf16)

    @classmethod
    def of_models(
        cls,
        model: nn.Module,
        base: nn.Module | None,
        tokenizer: PreTrainedTokenizerBase,
        layer: int,
        direction: Float[Tensor, " d_model"],
        bf16: bool = True,
    ) -> "Pair":
        """One's own organism; the base of a PEFT model is the model with its adapters off."""
        opener: Opener | None = None if base is None else partial(nullcontext, base)
        if opener is None and isinstance(model, PeftModel):
            opener = partial(base_weights, model)
        return cls(partial(nullcontext, model), opener, tokenizer, layer, direction, bf16)


def feature_direction(sae: Any | None, feature: Feature) -> Float[Tensor, " d_model"]:
    """A latent's decoder row, or the direction itself."""
    if isinstance(feature, Tensor):
        return feature.detach().float().cpu()
    assert sae is not None  # a monitor refuses a latent without an SAE
    return torch.as_tensor(sae.W_dec[feature]).detach().float().cpu()
