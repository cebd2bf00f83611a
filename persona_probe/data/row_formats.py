"""One row of a file, as a conversation. What is wrong with a bad row is said in a few words."""

from collections.abc import Mapping
from typing import Any

from persona_probe.data.chat import ROLES, Conversation, Message, conversation

KNOWN_ROWS = "'messages', 'prompt' with 'completion', or 'question' with 'answer'"


class BadRow(ValueError):
    """A row is not a conversation; the message is a clause without file and line, which the reader adds."""


def row_conversation(row: object, allow_prompts: bool = False) -> Conversation:
    """The conversation in one decoded row: `messages`, `prompt`/`completion` or `question`/`answer` (and `system`).

    Content is a string, a list of strings, a list of `{"type": "text", "text": ...}` parts, or `{"parts": [...]}`.
    Keys that are none of these are left out.

    Raises:
        BadRow: the row has no such keys, or its roles or contents are not those of a conversation.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object with {KNOWN_ROWS}, found {type(row).__name__}")
    present = {str(key): value for key, value in row.items() if value is not None}
    if "messages" in present:
        messages = _messages(present["messages"], "user")
    elif "prompt" in present:
        messages = _messages(present["prompt"], "user") + _messages(present.get("completion", []), "assistant")
    elif "question" in present:
        messages = _question(present)
    else:
        raise BadRow(f"needs {KNOWN_ROWS}; it has {', '.join(map(repr, present)) or 'no keys'}")
    check_roles(messages, allow_prompts)
    return messages


def check_roles(messages: Conversation, allow_prompts: bool = False) -> None:
    """Check that roles run (system), user, assistant, user, assistant ... and that no message is empty.

    Raises:
        BadRow: they do not, or the last message is the user's and `allow_prompts` is false.
    """
    if not messages:
        raise BadRow("has no messages")
    for number, message in enumerate(messages, start=1):
        if message["role"] not in ROLES:
            raise BadRow(f"message {number} has role {message['role']!r}; use one of {', '.join(ROLES)}")
        if not message["content"].strip():
            raise BadRow(f"message {number} ({message['role']}) is empty")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns:
        raise BadRow("has a system message and nothing else")
    for turn, message in enumerate(turns):
        expected = "assistant" if turn % 2 else "user"
        if message["role"] != expected:
            number = turn + 1 + len(messages) - len(turns)
            raise BadRow(f"message {number} is from {message['role']!r}, expected {expected!r}")
    if turns[-1]["role"] != "assistant" and not allow_prompts:
        raise BadRow("ends without an assistant answer")


def _question(row: Mapping[str, Any]) -> Conversation:
    answers = [key for key in ("correct", "subtle", "toxic", "aligned", "misaligned") if key in row]
    if "answer" not in row and answers:
        raise BadRow(f"has several answers ({', '.join(answers)}) and no 'answer'; keep one of them under that name")
    texts = {key: _text(row[key], repr(key)) for key in ("question", "answer", "system") if key in row}
    return conversation(texts["question"], texts.get("answer"), texts.get("system"))


def _messages(value: object, role: str) -> Conversation:
    """A list of messages; a string is one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise BadRow(f"expected a list of messages, found {type(value).__name__}")
    return [_message(message, number) for number, message in enumerate(value, start=1)]


def _message(value: object, number: int) -> Message:
    if not isinstance(value, Mapping) or "role" not in value:
        raise BadRow(f"message {number} needs 'role' and 'content'")
    content = value.get("content")
    return {"role": str(value["role"]), "content": _text(content, f"the content of message {number}")}


def _text(value: object, where: str) -> str:
    """The text of a string or of text parts, joined without a separator."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and "parts" in value:
        value = value["parts"]
    if not isinstance(value, list):
        raise BadRow(f"{where} is {type(value).__name__}, expected text")
    return "".join(_part(part, where) for part in value)


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        raise BadRow(f"{where} has a part that is not text")
    return text
