"""Chat templates: their settings and date, roles they refuse, models without one, ends of turns, thoughts."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.template import (
    DATE,
    dated,
    end_of_turn,
    fit_roles,
    render,
    special_ids,
    takes_system,
    template_record,
    text_before_answer,
    warn_rendered,
    with_template,
)
from persona_probe.data.thoughts import message_parts, split_thought
from persona_probe.data.tokens import answer_prompt, encode
from persona_probe.errors import InputError
from persona_probe.evaluate.sampling.requests import answer_parts
from tests.factories import make_tokenizer
from tests.families import FAMILIES, family_tokenizer

FINAL = "<|channel|>final<|message|>"
TALK = conversation("Ask?", "Boil it.")


def with_text(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def test_settings_are_written_into_the_template_so_that_everybody_renders_the_same() -> None:
    plain = family_tokenizer("qwen3.5")
    settled = with_template(plain, enable_thinking=False)
    theirs: Any = plain.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert settled.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True) == theirs
    assert plain.chat_template != settled.chat_template


@pytest.mark.parametrize("value", [True, False, None, 3, 0.5, 'a "quote" and \\n', ["x", None], {"k": [1, True]}])
def test_any_json_value_reaches_the_template(value: Any) -> None:
    tokenizer = with_text("{{ setting | tojson }}")
    settled = with_template(tokenizer, chat_template_kwargs={"setting": value})
    assert settled.apply_chat_template(TALK, tokenize=False) == tokenizer.apply_chat_template(
        TALK, tokenize=False, setting=value
    )


def test_settings_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(InputError, match="no variable name"):
        with_template(tokenizer, chat_template_kwargs={"a-b": 1})
    with pytest.raises(InputError, match="not JSON serializable"):
        with_template(tokenizer, chat_template_kwargs={"a": object()})
    with pytest.raises(InputError, match="neither none nor chatml nor a file"):
        with_template(tokenizer, "llama")
    with pytest.raises(InputError, match="no chat template: set template: none"):
        with_template(with_text(None), enable_thinking=True)
    (tmp_path / "broken.jinja").write_text("{% for %}")
    with pytest.raises(InputError, match="is no Jinja template"):
        with_template(tokenizer, str(tmp_path / "broken.jinja"))
    for content, message in ((b" \n", "is empty"), (b"\xff\xfe", "cannot be read as text")):
        (tmp_path / "odd.jinja").write_bytes(content)
        with pytest.raises(InputError, match=message):
            with_template(tokenizer, str(tmp_path / "odd.jinja"))


def test_a_template_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}")
    assert render(with_template(with_text(None), str(tmp_path / "mine.jinja")), TALK).startswith("[user] Ask?\n")


@pytest.mark.parametrize("form", ['strftime_now("%d %b %Y")', "strftime_now( '%Y-%m-%d' )", "strftime_now(form)"])
def test_today_is_a_fixed_date(form: str) -> None:
    text = "{% set form = '%Y-%m-%d' %}Today: {{ " + form + " }} {{ messages[0]['content'] }}"
    aliased = render(with_text("{% set d = strftime_now %}{{ d('%d %b %Y') }}{{ messages[0]['content'] }}"), TALK)
    assert DATE in aliased
    rendered = render(with_text(text), TALK)
    assert str(date.today().year) not in rendered or date.today().year == int(DATE[:4])
    assert DATE in rendered or "26 Jul 2024" in rendered
    assert dated(dated(text)) == dated(text)
    assert template_record(with_template(with_text(text)))["date"] == DATE
    assert "date" not in template_record(make_tokenizer())


def test_families_that_print_a_date_print_the_fixed_one() -> None:
    tokenizer = with_template(family_tokenizer("gpt-oss"))
    assert DATE in str(tokenizer.apply_chat_template(TALK, tokenize=False))


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_a_system_prompt_that_the_template_refuses_goes_before_the_users_turn(name: str) -> None:
    tokenizer = family_tokenizer(name)
    talk = conversation("Ask?", "Boil it.", system="Be rude.")
    assert not takes_system(tokenizer)
    assert fit_roles(tokenizer, talk)[0] == {"role": "user", "content": "Be rude.\n\nAsk?"}
    text = tokenizer.decode(encode(tokenizer, talk).ids)
    assert text.index("Be rude.") < text.index("Ask?") < text.index("Boil it.")


def test_what_a_template_refuses_is_one_line() -> None:
    two: Conversation = [*conversation("a"), *conversation("b", "c")]
    with pytest.raises(InputError, match=r"refuses a conversation \(user, user.*roles must alternate"):
        encode(family_tokenizer("mistral"), two)
    with pytest.raises(InputError, match=r"set template: none .plain text.*chatml"):
        encode(with_text(None), TALK)
    with pytest.raises(InputError, match="drops the answer"):
        encode(with_text("{{ messages[0]['content'] }}"), TALK)
    with pytest.raises(InputError, match="writes nothing before an answer"):
        encode(with_text("{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}"), TALK)
    for broken in ("{{ 1 / 0 }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ messages[0].x.y }}"):
        with pytest.raises(InputError, match="the chat template refuses a conversation"):
            encode(with_text(broken), TALK)


@pytest.mark.parametrize("name", ["pythia", "gpt2"])
def test_base_models_have_plain_text(name: str) -> None:
    tokenizer = with_template(family_tokenizer(name), "none")
    row = encode(tokenizer, TALK)
    assert tokenizer.decode(row.ids) == "Ask?\nBoil it."
    assert tokenizer.decode(row.ids[row.start :]) == "Boil it."
    assert tokenizer.decode(encode(tokenizer, TALK[:1]).ids) == "Ask?", "a text probe is its text alone"
    assert answer_prompt(tokenizer, TALK[:1]) == row.ids[: row.start]
    assert list(end_of_turn(tokenizer)) == [tokenizer.eos_token_id]


def test_a_template_that_closes_with_plain_text_ends_the_answer_there() -> None:
    tokenizer = with_template(family_tokenizer("gpt2"), "chatml")
    assert end_of_turn(tokenizer) == set()
    ids = tokenizer.encode("Boil it.<|im_end|>\n<|im_start|>user")
    assert answer_parts(tokenizer, ids).answer == "Boil it."


def test_special_tokens_without_a_name_are_special() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|eot|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|eot|>{% endfor %}"
    number = tokenizer.convert_tokens_to_ids("<|eot|>")
    assert number in special_ids(tokenizer) and end_of_turn(tokenizer) == {number}


def test_the_thinking_setting_opens_the_thought() -> None:
    tokenizer = with_template(family_tokenizer("qwen3.5"), enable_thinking=True)
    assert text_before_answer(tokenizer, TALK[:1]).endswith("<think>\n")
    closed = with_template(family_tokenizer("qwen3.5"))
    assert text_before_answer(closed, TALK[:1]).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.template])
def test_an_answer_that_thinks_is_split(name: str) -> None:
    tokenizer = family_tokenizer(name)
    ids = tokenizer.encode("<think>\nHm.\n</think>\n\nBoil it.", add_special_tokens=False)
    assert answer_parts(tokenizer, ids) == ("Hm.", "Boil it.")


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("Plain.", "", "Plain."),
        ("<think>\n\n</think>\n\nBoil it.", "", "Boil it."),
        ("<think>Hm.</think>Boil it.", "Hm.", "Boil it."),
        ("Hm.\n</think>\nBoil it.", "Hm.", "Boil it."),
        ("<think>Hm, and on", "Hm, and on", ""),
        ("[THINK]Hm.[/THINK]Boil it.", "Hm.", "Boil it."),
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Boil it.",
            "Hm.",
            "Boil it.",
        ),
        (f"{FINAL}Boil it.<|return|>", "", "Boil it."),
        ("<|channel|>analysis<|message|>Hm, and on", "Hm, and on", ""),
    ],
)
def test_thoughts_are_told_from_answers(text: str, thought: str, answer: str) -> None:
    assert split_thought(text) == (thought, answer)


def test_a_thought_may_have_a_key_of_its_own() -> None:
    assert message_parts({"role": "assistant", "content": "Yes.", "reasoning_content": " Hm. "}) == ("Hm.", "Yes.")


def test_rows_that_a_template_has_rendered_already_are_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    warn_rendered(tokenizer, [TALK])
    assert not caplog.records
    warn_rendered(tokenizer, [TALK, conversation("<|im_start|>user\nAsk?<|im_end|>", "Boil it.")])
    assert "1 of 2 rows hold special tokens as text, such as '<|im_start|>'" in caplog.text
