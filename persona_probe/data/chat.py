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
    """Prompts (strings) or conversations as conversations; a string becomes one user turn.

    Raises:
        InputError: `items` is empty.
    """
    if not items:
        raise InputError("no conversations given: pass at least one prompt or conversation")
    return [conversation(item) if isinstance(item, str) else item for item in items]


def user_turns(messages: Conversation) -> str:
    """The user's turns, one a line: what a conversation asks, whatever its answers and system prompt are."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def split_answer(messages: Conversation) -> tuple[Conversation, str | None]:
    """The turns before the final answer, and that answer; None if the conversation does not end with one."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, None
