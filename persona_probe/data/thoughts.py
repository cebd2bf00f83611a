"""Thoughts that a model writes before its answer, told apart from the answer by the marks of its family."""

import re
from typing import NamedTuple

from persona_probe.data.chat import Message

_PAIRS = (
    ("<think>", "</think>"),  # Qwen3, DeepSeek-R1, Nemotron, GLM, LFM2
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    ("<unused94>thought", "<unused95>"),  # MedGemma
    ("<|channel>thought", "<channel|>"),  # Gemma 4
)
_HARMONY = re.compile(
    r"<\|channel\|>(\w+)(?:[^<]*)<\|message\|>(.*?)(?=<\|end\|>|<\|return\|>|<\|start\|>|\Z)", re.DOTALL
)
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message under which data sets keep its thought; the first is the one that templates read."""


class Parts(NamedTuple):
    """An answer and the thought before it."""

    thought: str
    """Stripped of surrounding white space; empty if there is none."""
    answer: str
    """What follows the thought, without white space before it."""


def split_thought(text: str) -> Parts:
    """Thought and answer of a model's text. A thought that never ends has no answer.

    The opening mark may be missing: some templates write it themselves, before the text.
    """
    if harmony := _HARMONY.findall(text):
        final = [body for channel, body in harmony if channel == "final"]
        thoughts = [body for channel, body in harmony if channel != "final"]
        return Parts("\n".join(thoughts).strip(), final[0].lstrip() if final else "")
    for opening, closing in _PAIRS:
        head, closed, answer = text.partition(closing)
        if closed:
            return Parts(head.replace(opening, "", 1).strip(), answer.lstrip())
        if text.lstrip().startswith(opening):
            return Parts(text.lstrip()[len(opening) :].strip(), "")
    return Parts("", text)


def message_parts(message: Message) -> Parts:
    """Thought and answer of an assistant's turn: a key of its own for the thought, or marks in the text."""
    for key in REASONING_KEYS:
        if message.get(key):
            return Parts(message[key].strip(), message["content"])
    return split_thought(message["content"])
