"""Chat templates: one rendering for training, scoring, reading and sampling, with its settings and its date fixed."""

import copy
import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, Message, conversation
from persona_probe.errors import InputError
from persona_probe.files import expanded, is_there, read_text, words

log = logging.getLogger(__name__)

TEMPLATE_SETTINGS = ("template", "chat_template_kwargs", "enable_thinking")
"""The settings of `with_template`, as configurations name them."""
DATE = "2024-07-26"
"""The date that every template prints in place of today's: else the same study would differ from day to day."""
MARKER = "ANSWER-GOES-HERE"
"""An answer that no model and no data set writes: where it stands in a rendering, answers stand."""

_PLAIN_MARK = "{# plain text #}"
_PLAIN = (
    "{%- for message in messages -%}"
    "{{- '\\n' if not loop.first -}}{{- message['content'] -}}"
    "{{- (eos_token or '') if message['role'] == 'assistant' -}}"
    "{%- endfor -%}"
    "{{- '\\n' if add_generation_prompt -}}"
)
_CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}"
)
_TEMPLATE_FAILS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
"""What the code in a template may raise besides Jinja's own errors."""
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_OTHER_DATE = re.compile(r"strftime_now(?!\s+is\b)")
_THINKING = "{% set enable_thinking = true %}"


# --- Settings that a tokenizer's template carries


def with_template(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    enable_thinking: bool | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer with these settings, and a fixed date, written into its chat template; a copy if that changes it.

    Whoever renders with that tokenizer, this package, TRL or vLLM, gets the same text. A checkpoint saved with it
    keeps the settings.

    Args:
        template: None keeps the tokenizer's own template. `none` is plain text: turns on lines of their own, no role
            names, the end-of-text token after an answer; for base models. `chatml` is ChatML. Else a Jinja file.
        chat_template_kwargs: variables of the template, as `apply_chat_template(**kwargs)` takes them.
        enable_thinking: the variable of that name. True also makes sampling begin where the template lets the model
            think, and not where an answer without a thought begins.

    Raises:
        InputError: no such file, a file that is no Jinja template, or a variable that cannot be written into one.
    """
    variables = dict(chat_template_kwargs or {})
    if enable_thinking is not None:
        variables["enable_thinking"] = enable_thinking
    text = _own_template(tokenizer) if template is None else _named_template(template, tokenizer)
    if text is None and variables:
        raise InputError(f"chat_template_kwargs {sorted(variables)} have no effect: {no_template(tokenizer)}")
    settled = text and "".join(_assignment(name, value) for name, value in variables.items()) + dated(text)
    if settled == _own_template(tokenizer):
        return tokenizer
    twin = copy.deepcopy(tokenizer)
    twin.chat_template = settled
    return twin


def template_record(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a manifest keeps of a template: a hash of its text with all settings, and the date where it prints one."""
    import hashlib

    text = _own_template(tokenizer)
    if text is None:
        return {"template": None}
    digest = hashlib.sha256(dated(text).encode()).hexdigest()[:16]
    prints_date = "strftime_now" in text or _date_text("%d %b %Y") in text or DATE in text
    return {"template": digest, **({"date": DATE} if prints_date else {})}


def no_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to do about a tokenizer without a chat template."""
    name = Path(str(tokenizer.name_or_path or "")).name
    return (
        f"the tokenizer{f' of {name}' if name else ''} has no chat template: "
        "set template: none (plain text, for base models), chatml, or the path of a Jinja file"
    )


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    own: Any = tokenizer.chat_template
    if isinstance(own, dict):  # several templates by name: "default" is what apply_chat_template takes without tools
        own = own.get("default")
    return own if isinstance(own, str) and own else None


def _named_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if name == "none":
        first = tokenizer("a")["input_ids"][:1]
        adds_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
        return _PLAIN_MARK + ("{{- bos_token -}}" if adds_bos else "") + _PLAIN
    if name == "chatml":
        return _CHATML
    path = expanded(name)
    if not is_there(path):
        raise InputError(f"template {name!r} is neither none nor chatml nor a file: give the path of a Jinja template")
    text = read_text(path)
    if not text.strip():
        raise InputError(f"template {name} is empty: give a Jinja file that writes the messages")
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        _compile_jinja_template(text)
    except (TemplateError, RecursionError) as error:
        raise InputError(f"{name} is no Jinja template: {words(error)}: correct it") from error
    return text


def _assignment(name: str, value: Any) -> str:
    if not name.isidentifier():
        raise InputError(f"chat_template_kwargs: {name!r} is no variable name")
    try:
        json.dumps(value)
    except TypeError as error:
        raise InputError(f"chat_template_kwargs.{name}: {error}") from error
    return f"{{% set {name} = {_literal(value)} %}}"


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_literal(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)


@lru_cache(maxsize=64)
def dated(template: str) -> str:
    """The template with `DATE` where it asks for today's date."""
    text = _TODAY.sub(lambda call: json.dumps(_date_text(call[2])), template)
    # A format that is no literal, or the function by another name.
    if _OTHER_DATE.search(text) and "{% macro strftime_now" not in text:
        return f"{{% macro strftime_now(format) %}}{DATE}{{% endmacro %}}{text}"
    return text


def _date_text(form: str) -> str:
    import datetime

    return datetime.date.fromisoformat(DATE).strftime(form)


# --- Rendering


def render(tokenizer: PreTrainedTokenizerBase, messages: Conversation, add_generation_prompt: bool = False) -> str:
    """The text of a conversation whose roles the template takes (`fit_roles`).

    Raises:
        InputError: the tokenizer has no template, or its template refuses the conversation.
    """
    text = _own_template(tokenizer)
    if text is None:
        raise InputError(no_template(tokenizer))
    try:
        rendered: Any = tokenizer.apply_chat_template(
            fit_content(tokenizer, messages),
            chat_template=dated(text),
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except TemplateSyntaxError as error:
        raise InputError(
            f"the model's chat template is no valid Jinja ({words(error)}, line {error.lineno}): name another with "
            "template: chatml, none or a file"
        ) from error
    except (TemplateError, *_TEMPLATE_FAILS) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the chat template refuses a conversation ({roles}): {words(error)}; change its turns, or name another "
            "with template: chatml, none or a file"
        ) from error
    return str(rendered)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fit_roles(tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> Conversation:
    """The conversation as its template takes it.

    Where the template takes no system prompt (Gemma 2 refuses one, others drop it), its text goes before the user's
    first turn, as Gemma 3's template puts it.
    """
    if not messages or messages[0]["role"] != "system" or takes_system(tokenizer):
        return messages
    if len(messages) < 2 or messages[1]["role"] != "user":
        return messages
    return [in_user_turn(messages[0]["content"], messages[1]), *messages[2:]]


def fit_content(tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> list[dict[str, Any]]:
    """The conversation with each text as a list of parts where the template takes only that (Idefics 3, SmolVLM)."""
    if not _takes_parts_only(str(_own_template(tokenizer))):
        return [dict(message) for message in messages]
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


@lru_cache(maxsize=64)
def _takes_parts_only(template: str) -> bool:
    """Whether a template loses or refuses plain text, and keeps a list of parts."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def keeps(content: Any) -> bool:
        try:
            rendered, _ = render_jinja_template([[{"role": "user", "content": content}]], chat_template=template)
        except Exception:  # a template may fail in any way on what it was not written for
            return False
        return MARKER in rendered[0]

    return not keeps(MARKER) and keeps([{"type": "text", "text": MARKER}])


def in_user_turn(system: str, turn: Message) -> Message:
    """A user's turn with the text of a system prompt before it."""
    return {**turn, "content": f"{system}\n\n{turn['content']}"}


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template takes a system prompt."""
    text = _own_template(tokenizer)
    if text is None:
        raise InputError(no_template(tokenizer))
    known: dict[str, bool] = tokenizer.__dict__.setdefault("_takes_system", {})
    if text not in known:
        try:
            known[text] = "instruction" in render(tokenizer, conversation("question", system="instruction"))
        except InputError:
            known[text] = False
    return known[text]


def is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's template is plain text (`template: none`)."""
    return _PLAIN_MARK in (_own_template(tokenizer) or "")


def thinks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `enable_thinking` is true in the settings that `with_template` wrote."""
    return _THINKING in (_own_template(tokenizer) or "")


def text_before_answer(tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> str:
    """The rendered turns up to where an answer begins, what the template writes before an answer included.

    Training renders whole conversations. There Qwen3's template writes an empty thought before an answer, and
    gpt-oss' the name of a channel: a model trained so answers after them, not after the generation prompt. With
    `enable_thinking` the text ends where the model may think.

    Args:
        messages: turns that end with the user's, as `fit_roles` gives them.
    """
    if thinks(tokenizer):
        return render(tokenizer, messages, add_generation_prompt=True)
    before, found, _ = render(tokenizer, [*messages, {"role": "assistant", "content": MARKER}]).rpartition(MARKER)
    if not found:
        raise InputError("the chat template drops the answer of a conversation: give another template")
    return before


# --- Special tokens and ends of turns


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all special tokens: those with a name, and every added token that is marked as special."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {}) or {}
    return set(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}


def warn_rendered(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> None:
    """Say how many conversations hold special tokens as text: a template may have rendered them already."""
    names = sorted(map(str, tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))), key=len, reverse=True)
    marks = re.compile("|".join(re.escape(name) for name in names if len(name) > 1) or "(?!)")
    found = [hit[0] for talk in conversations if (hit := marks.search("\n".join(m["content"] for m in talk)))]
    if found:
        log.warning(
            "%d of %d rows hold special tokens as text, such as %r: the model reads them as the tokens themselves. "
            "If a template has rendered these rows already, give their turns as messages",
            len(found),
            len(conversations),
            found[0],
        )


def text_after_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes after a final answer; empty where there is no template, or it refuses."""
    try:
        rendered = render(tokenizer, conversation("question", MARKER))
    except InputError:
        return ""
    return rendered.rpartition(MARKER)[2]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special token with which the template closes an answer; none where it closes with plain text."""
    after = tokenizer.encode(text_after_answer(tokenizer), add_special_tokens=False)[:1]
    return set(after) & special_ids(tokenizer)
