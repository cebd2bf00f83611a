"""What a screening is given: rows, a model, a persona feature; each checked, each by name or as an object."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, split_answer
from persona_probe.errors import InputError
from persona_probe.finetune.data import load_data
from persona_probe.models.load import load_model
from persona_probe.saes.load import load_sae, sae_layer
from persona_probe.screening.feature import ScreenFeature, direction_feature, latent_feature


def check_rows(rows: Sequence[Conversation] | str | Path) -> list[Conversation]:
    """Conversations that all end with an answer, read from a set or file where a name is given.

    Raises:
        InputError: no rows, or rows without answers: they are counted.
    """
    if isinstance(rows, (str, Path)):
        rows = load_data(str(rows))
    if not rows:
        raise InputError("no rows to screen: give at least one conversation with an answer")
    bare = [n for n, talk in enumerate(rows) if not (split_answer(talk)[1] or "").strip()]
    if bare:
        raise InputError(f"{len(bare)} of {len(rows)} rows have no answer (row {bare[0]} first): give answered rows")
    return list(rows)


def given_model(
    model: nn.Module | str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model and its tokenizer, loaded where a name is given.

    Raises:
        InputError: a model without its tokenizer, or a name that resolves to nothing.
    """
    if isinstance(model, str):
        return load_model(model)
    if tokenizer is None:
        raise InputError("give tokenizer= as well, or the model by its name")
    return model, tokenizer


def given_feature(sae: Any, latent: int | None, direction: Tensor | None, layer: int | None) -> ScreenFeature:
    """The feature that arguments describe; a direction beside a latent is what rows are projected on.

    Raises:
        InputError: neither latent nor direction, a latent without its SAE, or a direction without its layer.
    """
    if latent is None and direction is None:
        raise InputError("no persona feature: give a latent and its SAE, or a direction and its layer")
    if latent is not None and sae is None:
        raise InputError(f"latent {latent} belongs to an SAE: give sae as well")
    sae = load_sae(sae) if isinstance(sae, (str, Path)) else sae
    if layer is None and sae is None:
        raise InputError("a direction needs its layer: give layer")
    at = sae_layer(sae) if layer is None else layer
    if latent is None:
        assert direction is not None
        return direction_feature(direction, at)
    found = latent_feature(sae, latent, at)
    return found if direction is None else replace(direction_feature(direction, at), sae=sae, latent=latent)
