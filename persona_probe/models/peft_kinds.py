"""Which kinds of PEFT adapters live in a model's layers, and which change weights of the base itself."""

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from persona_probe.errors import InputError

INIT_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of a LoRA that take its product out of the base's weights."""


def lives_outside(config: Any) -> bool:
    """Whether an adapter acts in PEFT's own forward pass, around the model, where its layers do not see it.

    Prompt, prefix and P-tuning, adaption prompts, X-LoRA, Poly and activated LoRA do.
    """
    if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
        return True
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if tuner is None or not issubclass(tuner, BaseTuner):
        return True
    # AdaLoRA's own forward only adds a term to the loss.
    return tuner.forward is not BaseTuner.forward and config.peft_type != PeftType.ADALORA


def refuse_outside(config: Any, what: str) -> None:
    """Refuse an adapter that `lives_outside`: readings of the layers would be those of a model without it.

    Raises:
        InputError: it does.
    """
    if lives_outside(config):
        kind = str(getattr(config.peft_type, "value", config.peft_type)).lower().replace("_", " ")
        kind = "activated lora" if kind == "lora" else kind
        raise InputError(
            f"{what} is an adapter of kind {kind!r}: it acts outside the model's layers, so they cannot be read with "
            "it; use LoRA, or another kind that changes the layers"
        )


def trains_biases(config: Any) -> bool:
    """Whether an adapter trains biases of the base in place, which is what PEFT's `bias` asks for."""
    return getattr(config, "bias", "none") not in ("none", None, False)


def starts_from_base(config: Any) -> bool:
    """Whether an adapter's initialisation takes something out of the base's weights."""
    first = config.get("init_lora_weights") if isinstance(config, dict) else getattr(config, "init_lora_weights", None)
    return isinstance(first, str) and first.lower().startswith(INIT_CHANGES_BASE)


def changes_base(config: Any) -> bool:
    """Whether the base's own weights are others once the adapter is on, so that switching it off is not enough."""
    return trains_biases(config) or starts_from_base(config)
