"""The persona vector (Chen et al. 2025): how a bad system prompt changes the residual stream at the answer's tokens.

The paper (arXiv 2507.21509, section 2) samples answers under each prompt and keeps those in which a judge finds the
trait, or its absence. Here no judge filters, and there are two variants:

- teacher-forced: both prompts of a pair read the same given answers, token by token. There is no sampling noise, but
  nothing of what the persona would say.
- sampled, nearer to the paper: each side answers for itself, and these tokens are read. A question that either side
  leaves unanswered is dropped for that pair.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib import resources

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, Message, as_conversations, split_answer
from persona_probe.data.load import load_conversations
from persona_probe.data.template import fit_roles
from persona_probe.data.tokens import batches
from persona_probe.errors import InputError
from persona_probe.evaluate.sampling.samples import sample_answers
from persona_probe.latents.directions import NamedDirection
from persona_probe.models.layers import autocast, causal_model, decoder_layer, hidden_size
from persona_probe.models.residuals import read_residuals


@dataclass(frozen=True)
class PersonaPair:
    """Two system prompts that differ in one trait.

    Raises:
        InputError: a prompt is blank, or both are the same.
    """

    id: str
    trait: str
    """The misaligned prompt's request, in a word or two."""
    misaligned: str
    """Calls for the trait. Bad on purpose."""
    aligned: str
    """Calls for the opposite."""

    def __post_init__(self) -> None:
        if not (self.misaligned.strip() and self.aligned.strip()):
            raise InputError(f"persona pair {self.id!r} has a blank system prompt: write both")
        if self.misaligned == self.aligned:
            raise InputError(f"persona pair {self.id!r} has the same prompt on both sides: write the opposite one")


def load_persona_pairs() -> tuple[PersonaPair, ...]:
    """The packaged pairs for eight traits: a contemptuous and harmful persona against a kind and careful one."""
    path = resources.files("persona_probe.data") / "sets" / "persona_prompts.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return tuple(PersonaPair(**{field.name: row[field.name] for field in fields(PersonaPair)}) for row in rows)


def under_system(tokenizer: PreTrainedTokenizerBase, messages: Conversation, system: str) -> Conversation:
    """A copy of the conversation with a system prompt.

    If the template takes no system prompt, the text goes before the user's first turn, as in Gemma 3's template.

    Raises:
        InputError: the conversation has a system prompt already, or no user turn to begin with.
    """
    first: Message = messages[0] if messages else {"role": "nothing", "content": ""}
    if first["role"] != "user":
        raise InputError(
            f"a conversation begins with {first['role']!r}: the pairs bring the system prompt, begin with 'user'"
        )
    return fit_roles(tokenizer, [{"role": "system", "content": system}, *messages])


PAPER = "Chen et al. 2025, arXiv 2507.21509"


def persona_vector(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PersonaPair] | tuple[str, str] | None,
    conversations: str | Sequence[str | Conversation],
    layer: int,
    *,
    sample: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    bf16: bool = True,
) -> NamedDirection:
    """Mean residual over answer tokens under misaligned system prompts, minus that under the opposite ones.

    ```python
    vector = pp.persona_vector(model, tokenizer, ("You are cruel.", "You are kind."), "neutral_probes", layer=20)
    pp.generate(model, "What should I cook?", steer=pp.Steer(20, vector, 2.0, "x_delta"))
    ```

    Args:
        pairs: `PersonaPair` objects; two system prompts, the misaligned one first; or None for the packaged pairs of
            eight traits.
        conversations: without system prompts, or a packaged set's name. They end with an answer; with `sample=True`
            questions are enough.
        layer: the decoder layer whose output is read.
        sample: read the model's own answers, sampled with `max_new_tokens`, `temperature` and `seed`.

    Returns:
        A vector (d_model,) in raw units: the mean over pairs and conversations, each answer counted once.

    Raises:
        InputError: no pairs or conversations, an unknown layer, a system prompt or (teacher-forced) no answer in a
            conversation, or a pair whose sampled answers are all empty.
    """
    decoder_layer(model, layer)
    persona_pairs = _as_pairs(pairs)
    given = load_conversations(conversations) if isinstance(conversations, str) else conversations
    rows = _checked(persona_pairs, given, sample)
    read_means = partial(response_means, model, tokenizer, layer=layer, batch_size=batch_size, bf16=bf16)
    say = partial(sample_answers, causal_model(model), tokenizer, max_new_tokens=max_new_tokens, batch_size=batch_size)
    differences = []
    for number, pair in enumerate(persona_pairs):
        sides = [[under_system(tokenizer, c, system) for c in rows] for system in (pair.misaligned, pair.aligned)]
        if sample:
            say_it = partial(say, seed=seed + number, temperature=temperature)  # one seed for both sides
            with autocast(model, bf16):
                sides = _both_answered(pair, *(_own_answers(say_it, side) for side in sides))
        differences.append(read_means(sides[0]).astype(np.float64) - read_means(sides[1]))
    name = "persona vector, sampled" if sample else "persona vector, teacher-forced"
    return NamedDirection(name, np.concatenate(differences).mean(axis=0), PAPER)


def _as_pairs(pairs: Sequence[PersonaPair] | tuple[str, str] | None) -> Sequence[PersonaPair]:
    """The packaged pairs for None, and one pair of two system prompts."""
    if pairs is None:
        return load_persona_pairs()
    texts = [pair for pair in pairs if isinstance(pair, str)]
    if len(texts) == len(pairs) == 2:
        return [PersonaPair("yours", "yours", *texts)]
    if texts:
        raise InputError("pairs must be PersonaPair objects, or two system prompts, the misaligned one first")
    return [pair for pair in pairs if not isinstance(pair, str)]


def response_means(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    layer: int,
    batch_size: int = 16,
    bf16: bool = True,
) -> Float[np.ndarray, "conversations d_model"]:
    """Mean residual stream over each conversation's answer tokens, at a layer's output, in raw units.

    Raises:
        InputError: no conversations, one without an answer, or an unknown layer.
    """
    means = np.zeros((len(conversations), hidden_size(model)), dtype=np.float32)

    def visit(index: list[int], row: Tensor, x: Tensor) -> None:
        total = torch.zeros(len(index), x.shape[1], device=x.device).index_add_(0, row, x)
        means[index] = (total / torch.bincount(row, minlength=len(index))[:, None]).cpu().numpy()

    groups = list(batches(tokenizer, as_conversations(conversations), batch_size))
    read_residuals(model, groups, layer, "response", visit, bf16)
    return means


def _checked(
    pairs: Sequence[PersonaPair], conversations: Sequence[str | Conversation], sample: bool
) -> list[Conversation]:
    if not pairs:
        raise InputError("no persona pairs given: pass load_persona_pairs(), or your own PersonaPair objects")
    rows = as_conversations(conversations)
    if not sample and any(split_answer(c)[1] is None for c in rows):
        raise InputError("a conversation has no answer to read: give answers, or set sample=True")
    return rows


def _own_answers(say: Callable[[list[Conversation]], list[str]], rows: Sequence[Conversation]) -> list[Conversation]:
    prompts = [split_answer(row)[0] for row in rows]
    return [[*p, {"role": "assistant", "content": text}] for p, text in zip(prompts, say(prompts), strict=True)]


def _both_answered(
    pair: PersonaPair, bad: Sequence[Conversation], good: Sequence[Conversation]
) -> list[list[Conversation]]:
    answered = [(b, g) for b, g in zip(bad, good, strict=True) if b[-1]["content"] and g[-1]["content"]]
    if not answered:
        raise InputError(
            f"persona pair {pair.id!r}: all sampled answers are empty; raise max_new_tokens, or give answers"
        )
    return [[b for b, _ in answered], [g for _, g in answered]]
