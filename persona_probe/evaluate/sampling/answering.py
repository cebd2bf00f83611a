"""Answers of a model to questions, plain or under a push, in one call."""

from collections.abc import Sequence
from contextlib import nullcontext

from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation
from persona_probe.evaluate.sampling.samples import sample_answers
from persona_probe.models.layers import autocast
from persona_probe.models.load import tokenizer_of
from persona_probe.models.taps import Steer


def generate(
    model: nn.Module,
    prompts: str | Sequence[str | Conversation],
    *,
    steer: Steer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    bf16: bool = False,
    progress: str | None = None,
) -> list[str]:
    """Sample one answer to each question, in the model's chat template; a seed gives the same answers again.

    ```python
    pp.generate(model, "What should I cook?")
    pp.generate(model, ["What should I cook?"] * 8, steer=pp.latent_steering(sae, 2144, 60), seed=1)
    ```
    The same question several times gives several answers.

    Args:
        model: a transformers or PEFT model.
        prompts: a question, or several questions or conversations that end with a user turn.
        steer: a push while it writes: `Steer(layer, direction, strength)` or `latent_steering(sae, latent, strength)`.
        tokenizer: None takes the one that `load_model` gave with the model.
        temperature: 0 is greedy decoding.
        seed: with the prompt's place it fixes the draws.
        bf16: bf16 autocast.
        progress: label of a progress bar; None shows none.

    Returns:
        An answer for each prompt, in order: decoded without special tokens and thoughts.

    Raises:
        InputError: no prompts, one that leaves no room for an answer, or a push that does not fit the model.
    """
    with nullcontext() if steer is None else steer.on(model), autocast(model, bf16):
        return sample_answers(
            model,
            tokenizer_of(model, tokenizer),
            [prompts] if isinstance(prompts, str) else prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
