"""Before anything is interpreted: does the SAE reconstruct this model on chat text, and do the latents fire there?"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, as_conversations
from persona_probe.errors import InputError
from persona_probe.models.layers import causal_model
from persona_probe.saes.encode import FitMoments, add_fit
from persona_probe.saes.load import check_fit
from persona_probe.saes.read import LatentMeans, conversation_batches, read_residuals


def check_explained_variance(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sae: Any,
    conversations: Sequence[str | Conversation],
    layer: int,
    minimum: float = 0.5,
    *,
    positions: str = "all",
    mixed_precision: bool = False,
) -> FitMoments:
    """Refuse an SAE that does not reconstruct the model's residual stream on chat text.

    Args:
        model: the model that the SAE is meant for: the base, before any fine-tuning.
        conversations: chat text, prompts or conversations with answers; a few hundred tokens are enough.
        layer: decoder layer whose output the SAE gets.
        minimum: smallest explained variance, 1 - sum |x - x_hat|^2 / sum |x - mean x|^2; a share, may be negative.
        positions: tokens that count, see `data.tokens.POSITIONS`; special tokens never do.

    Returns:
        The moments behind it: explained_variance, l0, residual_norm, n (tokens).

    Raises:
        InputError: width or layer do not fit, no text, or an explained variance below `minimum`; the message names the
            measured value and what may be wrong.
    """
    if not minimum <= 1:
        raise InputError(f"minimum_explained_variance must be a number of at most 1, got {minimum}")
    check_fit(sae, model, layer)
    groups = conversation_batches(tokenizer, as_conversations(conversations))
    fit = FitMoments()

    def visit(_index: list[int], _row: Tensor, x: Tensor) -> None:
        add_fit(sae, x, fit)

    read_residuals(model, groups, layer, positions, visit, mixed_precision)
    return require_fit(fit, sae, model, layer, minimum)


def require_fit(fit: FitMoments, sae: Any, model: nn.Module, layer: int, minimum: float) -> FitMoments:
    """`check_explained_variance` for a fit that was measured already.

    Raises:
        InputError: the explained variance is below `minimum`.
    """
    if not fit.explained_variance >= minimum:
        raise InputError(
            f"the SAE explains {fit.explained_variance:.2f} of the variance after layer {layer} ({fit.n} tokens), the "
            f"minimum is {minimum:g}: {_suspects(sae, model)}; or lower minimum_explained_variance"
        )
    return fit


def check_fires(means: LatentMeans, latents: list[int]) -> None:
    """Refuse latents that are active on none of the tokens read: nothing can be said about them.

    Raises:
        InputError: names the silent latents and the number of tokens.
    """
    silent = [str(latent) for latent in latents if not means.maximum[latent] > 0]
    if silent:
        verb = "latent {} never fires" if len(silent) == 1 else "latents {} never fire"
        raise InputError(
            f"{verb.format(', '.join(silent))} on the {means.fit.n} tokens read: name others, or give text with them"
        )


def _suspects(sae: Any, model: nn.Module) -> str:
    metadata = sae.cfg.metadata
    trained = metadata.model_name or "an unnamed model"
    here = causal_model(model).config._name_or_path or type(causal_model(model)).__name__
    hook = metadata.hook_name or metadata.hf_hook_name or "none named"
    return (
        f"it may be for another model (trained on {trained}, this is {here}), another layer or hook (its own: {hook}), "
        "or the base model where this is the chat model"
    )
