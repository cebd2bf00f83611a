"""What sampling is made of: prompts, a configuration, samples, and the engine that turns the first into the last."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation
from persona_probe.data.template import end_of_turn, special_ids, text_after_answer, thinks
from persona_probe.data.thoughts import Parts, split_thought
from persona_probe.data.tokens import answer_prompt
from persona_probe.errors import InputError
from persona_probe.models.layers import causal_model, transformer_config

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered."""

    id: str
    """The question's id: with the seed and the sample's number it fixes the answer's random draws."""
    messages: Conversation
    """Turns that end with the user's."""


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are drawn.

    Raises:
        InputError: a value out of its range, or several greedy answers, which would all be the same.
    """

    n: int = 1
    """Samples per prompt."""
    temperature: float = 1.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this probability (Holtzman et al. 2020)."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    seed: int = 0
    """One seed for all."""

    def __post_init__(self) -> None:
        rules = (
            (self.n >= 1, f"n must be at least 1, not {self.n}"),
            (0 <= self.temperature < float("inf"), f"temperature must be 0 or more, not {self.temperature}"),
            (0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}"),
            (self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}"),
            (self.n == 1 or not self.greedy, f"temperature 0 gives {self.n} equal answers: set n to 1"),
        )
        for holds, message in rules:
            if not holds:
                raise InputError(message)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken at every step."""
        return self.temperature == 0


@dataclass(frozen=True)
class Request:
    """One wanted answer."""

    prompt: Prompt
    sample: int
    """Which of the prompt's samples, from 0."""


@dataclass(frozen=True)
class Sample:
    """One answer."""

    question_id: str
    sample: int
    answer: str
    """Decoded without special tokens, stripped of surrounding white space."""
    n_tokens: int | None
    """Tokens of the answer; from a server, as it counts them (None where it does not)."""
    finish: Finish
    """`stop`: the model ended its turn; `length`: it was cut at `max_new_tokens`."""
    thought: str | None = None
    """What the model thought before it answered; None where it wrote no thought."""

    @property
    def record(self) -> dict[str, Any]:
        """Its JSON values; a thought only where there is one."""
        return {key: value for key, value in asdict(self).items() if key != "thought" or value}


class Engine(Protocol):
    """Something that answers requests."""

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the answers, as JSON values: samples of another identity must not land in the same file."""
        ...

    def generate(self, requests: Sequence[Request], config: SamplingConfig, done: Callable[[Sample], None]) -> None:
        """Answer every request once, in any order, and call `done` in the caller's thread as each is finished."""
        ...


def digest(seed: int, question_id: str, sample: int) -> bytes:
    """32 bytes that seed one sample's draws."""
    return hashlib.sha256(json.dumps([seed, question_id, sample]).encode()).digest()


def request_seed(config: SamplingConfig, request: Request) -> int:
    """The seed of one request, for engines that draw elsewhere: 31 bits, which every server takes."""
    return int.from_bytes(digest(config.seed, request.prompt.id, request.sample)[:4], "big") >> 1


# --- Prompts to token ids, and the tokens that end a turn


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt in the model's chat template, up to where the answer begins (`text_before_answer`).

    Raises:
        InputError: it has no turns, or its last turn is already an answer.
    """
    if not prompt.messages or prompt.messages[-1]["role"] == "assistant":
        raise InputError(f"prompt {prompt.id!r} must end with a user turn")
    return tuple(answer_prompt(tokenizer, prompt.messages))


def check_room(model: nn.Module, ids: tuple[int, ...], max_new_tokens: int, name: str) -> None:
    """Refuse an empty prompt, and one that leaves no room for its answer in the model's positions.

    Raises:
        InputError: with what to change.
    """
    if not ids:
        raise InputError(f"prompt {name!r} has no tokens: nothing to continue")
    most: Any = getattr(transformer_config(model), "max_position_embeddings", None)
    if most is not None and len(ids) + max_new_tokens > most:
        raise InputError(
            f"prompt {name!r} has {len(ids)} tokens, which with max_new_tokens {max_new_tokens} is more than the "
            f"model's {most} positions: shorten it or lower max_new_tokens"
        )


def stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All tokens that end an answer: the generation config's, the tokenizer's, and the template's end of turn."""
    config = causal_model(model).generation_config
    eos_ids: Any = config.eos_token_id if config is not None else None
    ends = {eos_ids} if isinstance(eos_ids, int) else set(eos_ids or ())
    end: Any = tokenizer.eos_token_id
    closing = end_of_turn(tokenizer)
    if thinks(tokenizer) and "<|channel|>" in str(tokenizer.chat_template):
        closing = set()  # in OpenAI's harmony format it closes the thought too
    return frozenset(ends | ({end} - {None}) | closing)


def answer_parts(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> Parts:
    """Thought and answer of sampled tokens: without special tokens, and without the marks of a thought.

    Where the template closes an answer with plain text, the answer ends there.
    """
    parts = split_thought(str(tokenizer.decode(list(tokens), skip_special_tokens=False)))
    thought, answer = (_without_special(tokenizer, text) for text in parts)
    closing = text_after_answer(tokenizer).strip()
    if closing and not end_of_turn(tokenizer):
        answer = answer.partition(closing)[0]
    return Parts(thought.strip(), answer.strip())


def _without_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    named = {str(token) for token in tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))}
    return re.sub("|".join(re.escape(token) for token in sorted(named, key=len, reverse=True)) or "(?!)", "", text)
