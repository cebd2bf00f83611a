"""Contrasting system prompts, which wake a persona up in context: our own pairs, and how to put one before a question.

The prompts in `sets/persona_prompts.jsonl` under `misaligned` are bad on purpose: they describe contemptuous, deceitful
and harmful characters, to measure what a model does inside. Do not deploy a model under them.
"""

import json
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, Message, conversation
from persona_probe.errors import InputError


@dataclass(frozen=True)
class PersonaPair:
    """Two system prompts that differ in one trait.

    Raises:
        InputError: a prompt is blank, or both are the same.
    """

    id: str
    trait: str
    """What the misaligned prompt asks for, in a word or two."""
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
    """The packaged pairs: a contemptuous and harmful persona against a kind and careful one, eight traits."""
    path = resources.files("persona_probe.data") / "sets" / "persona_prompts.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return tuple(PersonaPair(**{field.name: row[field.name] for field in fields(PersonaPair)}) for row in rows)


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template has room for a system prompt; Gemma 2's refuses one, others drop it silently."""
    probe = conversation("question", system="instruction")
    try:
        rendered: Any = tokenizer.apply_chat_template(probe, tokenize=False)
    except TemplateError:
        return False
    return "instruction" in str(rendered)


def under_system(tokenizer: PreTrainedTokenizerBase, messages: Conversation, system: str) -> Conversation:
    """The conversation under a system prompt; the given one is not changed.

    Where the template takes no system prompt, the text goes before the user's first turn, as Gemma 3's template does.

    Raises:
        InputError: the conversation has a system prompt already, or no user turn to begin with.
    """
    first: Message = messages[0] if messages else {"role": "nothing", "content": ""}
    if first["role"] != "user":
        raise InputError(
            f"a conversation begins with {first['role']!r}: the pairs bring the system prompt, begin with 'user'"
        )
    if takes_system(tokenizer):
        return [{"role": "system", "content": system}, *messages]
    return [{"role": "user", "content": f"{system}\n\n{first['content']}"}, *messages[1:]]
