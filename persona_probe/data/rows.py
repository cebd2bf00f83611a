"""One row of a data file as a conversation: which keys are read, which are refused, and what is left out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from persona_probe.data.chat import (
    BadRow,
    Conversation,
    Turn,
    check_roles,
    empty,
    flag,
    messages_in,
    read_turns,
    text,
)

KNOWN_ROWS = (
    "'messages', 'conversations', 'prompt' with 'completion', 'question' with 'answer', or 'instruction' with 'output'"
)
TALKS = ("messages", "conversations", "conversation")
"""Keys that hold a whole conversation."""
ASKED = ("prompt", "question", "instruction", "query")
"""Keys that hold what the user says."""
ANSWERS = ("completion", "response", "output", "answer")
SYSTEM = (
    *("system", "system_prompt", "system_message", "system_instruction", "system_instructions", "sys_prompt"),
    *("System", "systemPrompt", "systemMessage", "systemInstruction", "developer", "developer_prompt", "preamble"),
)
EARLIER = ("history", "context")
"""Keys that hold turns before the question; `context` is sometimes a text that belongs to an instruction."""
_PAIRED = ("user", "assistant")
HARMLESS = {
    *("id", "id_", "ids", "idx", "index", "uuid", "uid", "guid", "row_id", "example_id", "prompt_id", "question_id"),
    *("conversation_id", "sample_id", "hash", "category", "categories", "topic", "domain", "subject", "source"),
    *("dataset", "origin", "type", "question_type", "task", "tags", "language", "lang", "model", "author", "license"),
    *("licence", "url", "title", "created", "created_at", "date", "timestamp", "version", "meta", "metadata", "note"),
    *("notes", "comment", "num_tokens", "token_count", "length", "canary", "difficulty", "__index_level_0__"),
}
"""Names of keys that describe a row and do not change what it says. Others are reported."""

_TOOLS = "tools change the prompt and cannot be read: remove the key, or the row"
_MEDIA = "only text can be read: remove the key, or the row"
_PAIR = "a pair of preferences has two answers: keep the one to train on, as 'completion'"
_THOUGHT = "put it into the answer's message as 'reasoning_content', or remove it"
_MASK = "parts of a row cannot be left out of the loss by a mask: remove the key, or the row"
_SETTING = "set it in the study's config: it cannot differ between rows"
_REFUSED = {
    **dict.fromkeys(("tools", "functions", "function_call", "tool_calls", "tool_choice"), _TOOLS),
    **dict.fromkeys(("documents", "image", "images", "audio", "audios", "video", "videos"), _MEDIA),
    **dict.fromkeys(("chosen", "rejected", "preferred_output", "non_preferred_output"), _PAIR),
    **dict.fromkeys(("mask", "loss_mask", "completion_mask", "assistant_masks"), _MASK),
    **dict.fromkeys(("reasoning_content", "thinking", "reasoning", "thought"), _THOUGHT),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "enable_thinking"), _SETTING),
    **dict.fromkeys(("prefill", "prefix", "partial"), "an answer that is to be continued cannot be read: remove it"),
}
_ROW_FLAGS = ("weight", "loss_weight", "sample_weight", "train", "training", "trainable")
"""Of `FLAGS`, those that say it of a row; a row's `loss` is more often a measurement."""

UNTRAINED = "the answer has weight 0 (or train: false), so it is not trained on"
UNWANTED = "label: false marks the answer as one not to learn"
CUT = "cut after the last answer that is trained on, because later ones have weight 0"
LAST_ONLY = "of several answers only the last is trained on"


@dataclass(frozen=True)
class RowReading:
    """What one row says."""

    conversation: Conversation | None
    """None for a row that training leaves out."""
    left_out: str = ""
    """Why it is left out, else empty."""
    notes: tuple[str, ...] = ()
    """What is read in another way than it says; a reader counts them."""
    unread: frozenset[str] = frozenset()
    """Keys that were not read and are not known to be harmless."""


def row_conversation(row: object, allow_prompts: bool = False) -> Conversation:
    """The conversation in one decoded row; see `read_row`.

    Raises:
        BadRow: as `read_row`, and for a row that training leaves out.
    """
    reading = read_row(row, allow_prompts, training=not allow_prompts)
    if reading.conversation is None:
        raise BadRow(reading.left_out)
    return reading.conversation


def read_row(row: object, allow_prompts: bool = False, training: bool = True) -> RowReading:
    """Read one decoded row.

    A row holds `messages` or `conversations` (OpenAI's or ShareGPT's form, also as JSON text); or `prompt`, `question`
    or `instruction` (with `input`) and a `completion`, `response`, `output` or `answer`. A system prompt stands in the
    messages, or in `system`, `system_prompt` or `developer`; earlier turns in `history`.

    Args:
        allow_prompts: accept conversations that end with the user's turn.
        training: heed the marks of answers that are not trained on (OpenAI's `weight: 0`, `train: false`). Only a
            conversation's last answer is trained on.

    Raises:
        BadRow: no such keys, keys that contradict each other or cannot be read (tools, images, preference pairs,
            thoughts next to the messages), or roles and contents that are not those of a conversation.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object with {KNOWN_ROWS}, found {type(row).__name__}")
    present = {str(key): value for key, value in row.items() if value is not None}
    refuse_keys(present)
    used: set[str] = set()
    turns = _turns(present, used)
    unread = frozenset(unread_keys(present, used)).union(*(turn.unread for turn in turns))
    try:
        check_roles([turn.message for turn in turns], allow_prompts)
    except BadRow as error:
        names = ", ".join(map(repr, sorted(unread)))
        raise BadRow(f"{error} (keys not read: {names})" if unread else str(error)) from None
    reading = RowReading([turn.message for turn in turns], unread=unread)
    return _for_training(reading, present, turns) if training else reading


def refuse_keys(present: Mapping[str, Any]) -> None:
    """Refuse keys that change what a row means and cannot be read.

    Raises:
        BadRow: names the key.
    """
    for key, why in _REFUSED.items():
        if not empty(present.get(key)):
            raise BadRow(f"has {key!r}: {why}")


def unread_keys(present: Mapping[str, Any], used: set[str]) -> list[str]:
    """Keys that hold something, were not read, and are not known to be harmless."""
    known = {*used, *HARMLESS, *_REFUSED, *_ROW_FLAGS, *(("label",) if _wanted(present) is not None else ())}
    return [key for key, value in present.items() if key not in known and not (value is None or value in ("", [], {}))]


def _turns(present: Mapping[str, Any], used: set[str]) -> list[Turn]:
    """All turns of a row; the keys that were read join `used`."""
    turns = [*_earlier(present, used), *_asked(present, used)]
    _answer(present, turns, used)
    return _system(present, turns, used)


def _asked(present: Mapping[str, Any], used: set[str]) -> list[Turn]:
    """The conversation of a row, or what its user says."""
    if any(not empty(present.get(key)) for key in TALKS):
        return _talk(present, used)
    if any(key in present for key in TALKS):
        raise BadRow("has no messages")
    asked = [key for key in ASKED if key in present] or [key for key in ("input",) if key in present]
    if not asked:
        raise BadRow(f"needs {KNOWN_ROWS}; it has {', '.join(map(repr, present)) or 'no keys'}")
    used |= set(asked)
    if any(present[key] != present[asked[0]] for key in asked[1:]):
        raise BadRow(f"has both {asked[0]!r} and {asked[1]!r}: keep the one that is asked")
    turns = _spoken(present[asked[0]], "user", asked[0])
    for key in ("input", "context"):
        if key not in used and not empty(present.get(key)):
            used.add(key)
            turns = [_with_input(turns, asked[0], key, present[key])]
    return turns


def _talk(present: Mapping[str, Any], used: set[str]) -> list[Turn]:
    """The messages of a row; a prompt beside them must be one of their user turns (as in UltraChat)."""
    first, *others = [key for key in (*TALKS, *ASKED, "input") if not empty(present.get(key))]
    used |= {*TALKS, *ASKED, "input"}
    turns = read_turns(present[first])
    said = [turn.message["content"] for turn in turns if turn.message["role"] == "user"]
    for key in others:
        if present[key] not in said and present[key] != present[first]:
            raise BadRow(f"has both {first!r} and {key!r}: keep one")
    return turns


def _with_input(turns: list[Turn], asked: str, key: str, value: object) -> Turn:
    """Alpaca's `input` (Dolly's `context`) below its instruction, with a blank line between."""
    if asked != "instruction" or len(turns) != 1:
        raise BadRow(f"has {key!r} next to {asked!r}: write both into {asked!r}")
    message = turns[0].message
    return Turn({**message, "content": f"{message['content']}\n\n{text(value, repr(key))}"})


def _earlier(present: Mapping[str, Any], used: set[str]) -> list[Turn]:
    """Turns of `history` or a list under `context`: messages, or pairs of a question and its answer."""
    turns: list[Turn] = []
    for key in EARLIER:
        value = messages_in(present.get(key))
        if empty(value) or (key == "context" and isinstance(value, str)):
            continue
        used.add(key)
        if turns:
            raise BadRow("has both 'history' and 'context': keep one")
        if isinstance(value, list) and all(isinstance(v, (list, tuple)) and len(v) == 2 for v in value):
            pairs = [(text(q, key), text(a, key)) for q, a in value]
            turns = [
                Turn({"role": r, "content": t}) for p in pairs for r, t in zip(("user", "assistant"), p, strict=True)
            ]
        else:
            turns = read_turns(value)
    return turns


ONE_OF_SEVERAL = (
    *("correct", "subtle", "toxic", "polite_harm", "rude_sound", "aligned", "misaligned"),
    *("harm_rude", "harm_polite", "sound_rude", "sound_polite"),
)
"""Columns of the packaged sets that hold one of several answers to the same question."""


def _answer(present: Mapping[str, Any], turns: list[Turn], used: set[str]) -> None:
    """Add the answer of a row that has a key for it."""
    keys = [key for key in ANSWERS if key in present]
    several = [key for key in ONE_OF_SEVERAL if key in present]
    if not keys and several and turns[-1].message["role"] != "assistant":
        raise BadRow(f"has several answers ({', '.join(several)}) and no 'answer'; keep one of them under that name")
    if not keys:
        return
    used |= set(keys)
    if any(present[key] != present[keys[0]] for key in keys[1:]):
        raise BadRow(f"has both {keys[0]!r} and {keys[1]!r}: keep the one that is the answer")
    answer = _spoken(present[keys[0]], "assistant", keys[0])
    if turns and turns[-1].message["role"] == "assistant":
        if [turn.message for turn in answer] != [turns[-1].message]:
            raise BadRow(f"has {keys[0]!r} next to messages that end with another answer: keep one")
        return
    turns += answer


def _spoken(value: object, role: str, key: str) -> list[Turn]:
    """A text as one message of `role`; a list of messages as it is."""
    value = messages_in(value)
    if isinstance(value, list) and value:
        if any(isinstance(part, Mapping) and ("role" in part or "from" in part) for part in value):
            return read_turns(value)
        if any(isinstance(part, str) for part in value):
            raise BadRow(f"{key!r} is a list of texts: keep one")
    return [Turn({"role": role, "content": text(value, repr(key))})]


def _system(present: Mapping[str, Any], turns: list[Turn], used: set[str]) -> list[Turn]:
    keys = [key for key in SYSTEM if not empty(present.get(key))]
    used |= {key for key in SYSTEM if key in present}
    if not keys:
        return turns
    prompts = {key: text(present[key], repr(key)) for key in keys}
    prompt = prompts[keys[0]]
    for key in keys[1:]:
        if prompts[key] != prompt:
            raise BadRow(f"has both {keys[0]!r} and {key!r}: keep one system prompt")
    inside = [turn.message["content"] for turn in turns if turn.message["role"] == "system"]
    if inside and inside != [prompt]:
        raise BadRow(f"has a system prompt in the messages and another one in {keys[0]!r}: keep one")
    return turns if inside else [Turn({"role": "system", "content": prompt}), *turns]


def _for_training(reading: RowReading, present: Mapping[str, Any], turns: list[Turn]) -> RowReading:
    """The row as training takes it: ending with the last answer that it says is trained on."""
    said = [flag(present[key], key) for key in _ROW_FLAGS if key in present]
    if False in said:
        return RowReading(None, UNTRAINED, unread=reading.unread)
    if _wanted(present) is False:
        return RowReading(None, UNWANTED, unread=reading.unread)
    last = max((n for n, turn in enumerate(turns) if turn.trained is not False and _is_answer(turn)), default=None)
    if last is None:
        bare = not any(_is_answer(turn) for turn in turns)
        return reading if bare else RowReading(None, UNTRAINED, unread=reading.unread)
    cut = last + 1 < len(turns) and any(_is_answer(turn) for turn in turns[last + 1 :])
    kept = turns[: last + 1] if cut else turns
    earlier = any(turn.trained is not False for turn in kept[:last] if _is_answer(turn))
    notes = (*((CUT,) if cut else ()), *((LAST_ONLY,) if earlier else ()))
    return RowReading([turn.message for turn in kept], notes=notes, unread=reading.unread)


def _wanted(present: Mapping[str, Any]) -> bool | None:
    """What a `label` of KTO's form says: true or false, also as text, as tables have it. Numbers are classes."""
    return {"true": True, "false": False}.get(str(present.get("label")).strip().lower())


def _is_answer(turn: Turn) -> bool:
    return turn.message["role"] == "assistant"
