"""Pushes and removals while a model of the world answers: at all tokens, the last prompt token, or the answer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.data.world.text import ASSISTANT
from persona_probe.errors import InputError, unknown
from persona_probe.models.layers import causal_model, hidden_size
from persona_probe.models.taps import SteerTap, orthonormal, project_out

TOKENS = ("all", "last_prompt", "response")
"""All tokens; the token before the answer, which is `<assistant>`; the answer's tokens."""


class PlaceTap(SteerTap):
    """Changes a layer's output at the tokens of one of `TOKENS`, in sampling of single-turn prompts.

    The sampler tells it which tokens of a forward pass are the prompt's, as it tells every tap that steers.

    Args:
        push: added (raw units); None adds nothing.
        basis: orthonormal rows, whose span is projected out; None takes nothing out.

    Raises:
        InputError: unknown tokens, or a vector of another width.
    """

    def __init__(
        self,
        model: nn.Module,
        assistant: int,
        layer: int,
        where: str,
        push: Float[Tensor, " d_model"] | None = None,
        basis: Float[Tensor, "rank d_model"] | None = None,
    ) -> None:
        if where not in TOKENS:
            raise unknown("tokens", where, TOKENS)
        vector = torch.zeros(hidden_size(model)) if push is None else push
        super().__init__(model, layer, vector, "prompt", torch.ones(1, 1, dtype=torch.bool))
        self.where, self.assistant, self.basis = where, assistant, basis
        self.ids: Tensor | None = None
        self._embedding = _embedding(model).register_forward_pre_hook(self._see)

    def _see(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.ids = args[0]

    def remove(self) -> None:
        """Remove both hooks."""
        self._embedding.remove()
        super().remove()

    def on_output(self, resid: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """The output, changed at the chosen tokens."""
        changed = resid if self.basis is None else project_out(resid, self.basis)
        return torch.where(self._chosen(resid)[:, :, None], changed + self.vector.to(resid), resid)

    def _chosen(self, resid: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos"]:
        if self.where == "all":
            return torch.ones(resid.shape[:2], dtype=torch.bool, device=resid.device)
        prompt = self._mask(resid)
        if self.where == "response":
            return ~prompt
        assert self.ids is not None
        if self.ids.shape != resid.shape[:2]:
            raise InputError("a push at the last prompt token needs token ids: sample from whole prompts")
        return prompt & (self.ids == self.assistant)


def _embedding(model: nn.Module) -> nn.Module:
    inner = causal_model(model)
    assert isinstance(inner, PreTrainedModel)
    return inner.get_input_embeddings()


@contextmanager
def pushed(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, layer: int, where: str, vector: Float[Tensor, " d_model"]
) -> Iterator[None]:
    """Add a vector (raw units) to a layer's output at some tokens, while the block lasts."""
    with PlaceTap(model, _assistant(tokenizer), layer, where, push=vector):
        yield


@contextmanager
def removed(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    layer: int,
    where: str,
    directions: Float[Tensor, "k d_model"],
) -> Iterator[None]:
    """Project the span of directions out of a layer's output at some tokens, while the block lasts."""
    with PlaceTap(model, _assistant(tokenizer), layer, where, basis=orthonormal(directions)):
        yield


def _assistant(tokenizer: PreTrainedTokenizerBase) -> int:
    [token] = tokenizer.encode(ASSISTANT, add_special_tokens=False)
    return token
