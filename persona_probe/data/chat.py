"""Conversations: plain lists of `{"role", "content"}` messages, as chat templates take them."""

from collections.abc import Sequence

from persona_probe.errors import InputError

Message = dict[str, str]
Conversation = list[Message]

ROLES = ("system", "user", "assistant")


def conversation(question: str, answer: str | None = None, system: str | None = None) -> Conversation:
    """A single-turn conversation; without `answer` it ends with the user's turn."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return messages


def as_conversations(items: Sequence[str | Conversation]) -> list[Conversation]:
    """Accept prompts (strings) or conversations; a string becomes one user turn.

    Raises:
        InputError: `items` is empty.
    """
    if not items:
        raise InputError("no conversations given: pass at least one prompt or conversation")
    return [conversation(item) if isinstance(item, str) else item for item in items]


def split_answer(messages: Conversation) -> tuple[Conversation, str | None]:
    """The turns before the last assistant answer, and that answer (None where the last turn is not an answer)."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, None
