"""Conversations: plain lists of `{"role", "content"}` messages, as chat templates take them, and how they are read."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persona_probe.errors import InputError

Message = dict[str, str]
"""`role` and `content`; an assistant's message may also hold its thought, as `reasoning_content` and `thinking`."""
Conversation = list[Message]

ROLES = ("system", "user", "assistant")


def conversation(question: str, answer: str | None = None, system: str | None = None) -> Conversation:
    """A single-turn conversation; without `answer` it ends with the user's turn."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return messages


def with_system(messages: Conversation, prompt: str) -> Conversation:
    """The conversation with a system prompt in front; its own system prompt follows it."""
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{prompt}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": prompt}, *messages]


def as_conversations(items: Sequence[str | Conversation]) -> list[Conversation]:
    """Prompts (strings) or conversations as conversations; a string becomes one user turn.

    Raises:
        InputError: `items` is empty, or a message holds what cannot be read (tool calls, images).
    """
    if not items:
        raise InputError("no conversations given: pass at least one prompt or conversation")
    return [_given([conversation(item)[0]] if isinstance(item, str) else item, n) for n, item in enumerate(items)]


def _given(item: object, number: int) -> Conversation:
    try:
        turns = read_turns(item)
        if not turns:
            raise BadRow("has no messages")
        return [turn.message for turn in turns]
    except BadRow as error:
        raise InputError(f"conversation {number}: {error}") from None


def user_turns(messages: Conversation) -> str:
    """The user's turns, one a line: what a conversation asks, whatever its answers and system prompt are."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def split_answer(messages: Conversation) -> tuple[Conversation, str | None]:
    """The turns before the final answer, and that answer; None if the conversation does not end with one."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, None


# --- Messages of a file: OpenAI's `role` and `content`, or ShareGPT's `from` and `value`


class BadRow(ValueError):
    """A row is not a conversation. The message is a clause; the reader adds file and line."""


@dataclass(frozen=True)
class Turn:
    """One message of a file."""

    message: Message
    trained: bool | None = None
    """Whether the file says that this answer is trained on; None where it does not say."""
    unread: frozenset[str] = frozenset()
    """Keys that were not read and are not known to be harmless, as `messages.KEY`."""


SPEAKERS = {
    **{"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"},
    **{"bot": "assistant", "model": "assistant", "system": "system", "developer": "system"},
}
"""ShareGPT's names in `from`."""
REASONING = ("reasoning_content", "thinking")
"""The keys for a thought in a message that was read: most templates print the first, gpt-oss' the second, none both."""
_THOUGHTS = (*REASONING, "reasoning", "thought")
FLAGS = ("weight", "loss_weight", "train", "training", "trainable", "loss", "loss_mask")
"""Keys that say whether an answer is trained on: OpenAI's `weight` of 0 or 1, and other tools' names for it."""
_TOOLS = "calls of tools cannot be read"
_MEDIA = "only text can be read"
_PREFILL = "an answer that is to be continued cannot be trained on or read"
_PARTLY = "parts of an answer cannot be left out of the loss"
_REFUSED = {
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id", "tools", "functions"), _TOOLS),
    **dict.fromkeys(("image", "images", "image_url", "audio", "video", "videos", "files"), _MEDIA),
    **dict.fromkeys(("prefill", "prefix", "partial", "continue_final_message"), _PREFILL),
    **dict.fromkeys(("train_detail", "training_detail", "mask"), _PARTLY),
    "refusal": "a refusal next to the content cannot be read: put it into the content",
}
_HARMLESS = {"id", "message_id", "turn", "turn_id", "index", "idx", "timestamp", "created", "created_at", "date"}
_HARMLESS |= {"model", "annotations", "token_count", "num_tokens", "language", "lang"}
_LOOKS_LIKE_MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|from|content|value)['\"]\s*:")


def empty(value: object) -> bool:
    """Whether a key holds nothing: null, false, an empty text, list or object, or one of these as JSON text."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null", "false", "False", "None")
    return value is None or value is False or (isinstance(value, (list, Mapping)) and not value)


def flag(value: object, key: str) -> bool | None:
    """A key of `FLAGS`: whether its answer is trained on; None for null.

    Raises:
        BadRow: neither yes nor no.
    """
    known = {"0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True, "": None, "none": None}
    word = str(value).strip().lower()
    if word not in known:
        raise BadRow(f"has {key!r} {value!r}: an answer is trained on or not, so only 0 and 1 can be read")
    return known[word]


def read_turns(value: object) -> list[Turn]:
    """The messages of a list, of a list as JSON text, or of an object with the lists `role` and `content`.

    The role `developer` is read as `system`. Text parts of a content are joined without a separator. The thought of an
    answer (`reasoning_content`, `thinking`, `reasoning`, or a part of that type) gets the keys of `REASONING`.

    Raises:
        BadRow: no such list, a message without role or content, or a key that changes what a message means and cannot
            be read: tool calls, images, an answer that is to be continued.
    """
    value = messages_in(value)
    if isinstance(value, Mapping) and isinstance(value.get("role"), list):
        value = _rows_of(value)
    if isinstance(value, str):
        raise BadRow("expected a list of messages, found a text that is not a list in JSON")
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"expected a list of messages, found {type(value).__name__}")
    return [_turn(message, number) for number, message in enumerate(value, start=1)]


def messages_in(value: object) -> object:
    """A list of messages where `value` is one as text (JSON, or as Python prints it); otherwise `value` itself.

    Raises:
        BadRow: a text that begins like such a list and is not one.
    """
    if not isinstance(value, str) or not _LOOKS_LIKE_MESSAGES.match(value):
        return value
    for decode in (json.loads, ast.literal_eval):
        try:
            messages = decode(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(messages, list) and all(isinstance(m, Mapping) for m in messages):
            return messages
    raise BadRow("a text begins like a list of messages but is not JSON: export the column as a list or as JSON")


def _rows_of(columns: Mapping[Any, Any]) -> list[dict[Any, Any]]:
    """Messages from an object of lists, as `datasets` stores sequences of structs."""
    lists = {key: values for key, values in columns.items() if isinstance(values, list)}
    if len({len(values) for values in lists.values()}) != 1:
        raise BadRow("the lists of roles and contents have different lengths")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _turn(value: object, number: int) -> Turn:
    present = {str(k): v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else {}
    spoken = "from" in present and "role" not in present
    if not ("role" in present or spoken):
        raise BadRow(f"message {number} needs 'role' and 'content'")
    for key, why in _REFUSED.items():
        if not empty(present.get(key)):
            raise BadRow(f"message {number} has {key!r}: {why}")
    role = _role(present, number, spoken)
    keys = ("from", "value") if spoken else ("role", "content")
    content, thought = _content(present.get(keys[1]), f"the content of message {number}")
    thought = _thought(present, thought, role, number)
    message = {"role": role, "content": content} | (dict.fromkeys(REASONING, thought) if thought else {})
    known = {*keys, *_REFUSED, *_THOUGHTS, *FLAGS, *_HARMLESS, "channel"}
    unread = frozenset(f"messages.{key}" for key, v in present.items() if key not in known and not empty(v))
    return Turn(message, _trained(present, role, number), unread)


def _role(present: Mapping[str, Any], number: int, spoken: bool) -> str:
    name = str(present["from"] if spoken else present["role"])
    if present.get("channel") not in (None, "final"):
        raise BadRow(f"message {number} has 'channel' {present['channel']!r}: only final answers can be read")
    if spoken and name not in SPEAKERS:
        raise BadRow(f"message {number} is from {name!r}; use one of {', '.join(SPEAKERS)}")
    return SPEAKERS[name] if spoken else ("system" if name == "developer" else name)


def _trained(present: Mapping[str, Any], role: str, number: int) -> bool | None:
    said = {key: flag(present[key], key) for key in FLAGS if key in present}
    said = {key: value for key, value in said.items() if value is not None}
    if role != "assistant" and any(said.values()):
        key = next(key for key, value in said.items() if value)
        raise BadRow(f"message {number} ({role}) has {key!r} {present[key]!r}: only answers are trained on")
    if len(set(said.values())) > 1:
        raise BadRow(f"message {number} has {' and '.join(map(repr, said))}, which disagree: keep one")
    return next(iter(said.values()), None)


def _thought(present: Mapping[str, Any], thought: str, role: str, number: int) -> str:
    said = [text(present[key], repr(key)) for key in _THOUGHTS if not empty(present.get(key))]
    thoughts: list[str] = sorted({*said, thought} - {""})
    if thoughts and role != "assistant":
        raise BadRow(f"message {number} ({role}) has a thought: only an assistant's can be read")
    if len(thoughts) > 1:
        raise BadRow(f"message {number} has several thoughts ({', '.join(_THOUGHTS)}): keep one")
    return thoughts[0] if thoughts else ""


def text(value: object, where: str) -> str:
    """The text of a string or of text parts, joined without a separator.

    Raises:
        BadRow: it is not text, or a part of it is not.
    """
    content, thought = _content(value, where)
    if thought:
        raise BadRow(f"{where} has a part that is a thought, not text")
    return content


def _content(value: object, where: str) -> tuple[str, str]:
    """Text and thought of a content: a string, a list of parts, or `{"parts": [...]}`."""
    if isinstance(value, str):
        return _whole(value, where), ""
    if isinstance(value, Mapping) and "parts" in value:
        value = value["parts"]
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"{where} is {type(value).__name__}, expected text")
    texts, thoughts = [], []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        (thoughts if kind in ("thinking", "reasoning") else texts).append(_part(part, str(kind), where))
    return "".join(texts), "".join(thoughts)


def _whole(value: str, where: str) -> str:
    """The text, if each of its characters is whole: no tokenizer takes one half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{where} has half of a character (\\u{ord(value[error.start]):x}): write it in UTF-8") from None
    return value


def _part(part: object, kind: str, where: str) -> str:
    if isinstance(part, str):
        return _whole(part, where)
    if isinstance(part, Mapping) and kind in ("text", "input_text", "output_text", "thinking", "reasoning"):
        content = part.get("text", part.get(kind))
        if isinstance(content, str):
            return _whole(content, where)
    kind = kind if isinstance(part, Mapping) else type(part).__name__
    raise BadRow(f"{where} has a part that is not text ({kind})")


def check_roles(messages: Conversation, allow_prompts: bool = False) -> None:
    """Check that the roles are (system), user, assistant, user, assistant ... and that no message is empty.

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
