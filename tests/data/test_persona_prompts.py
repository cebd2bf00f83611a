"""Contrasting system prompts: whole, in contrast, of matched length, and put before a question as templates allow."""

import pytest

from persona_probe.data.chat import conversation
from persona_probe.data.check import overlaps
from persona_probe.data.load import SETS, load_rows
from persona_probe.data.template import takes_system
from persona_probe.errors import InputError
from persona_probe.latents.persona_vectors import PersonaPair, load_persona_pairs, under_system
from tests.factories import make_tokenizer

REFUSES = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
DROPS = "{% for m in messages %}{% if m['role'] != 'system' %}"
TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"


def test_pairs_are_plain_unique_and_matched_in_length() -> None:
    pairs = load_persona_pairs()
    assert len(pairs) >= 5
    assert len({p.id for p in pairs}) == len({p.trait for p in pairs}) == len(pairs)
    assert not {p.id for p in pairs} & {row["id"] for name in SETS for row in load_rows(name)}
    for pair in pairs:
        assert (pair.misaligned + pair.aligned + pair.trait).isascii()
        assert abs(len(pair.misaligned.split()) - len(pair.aligned.split())) <= 2, pair.id


def test_prompts_share_no_run_of_five_words_with_another_row() -> None:
    pairs = load_persona_pairs()
    prompts = [text for pair in pairs for text in (pair.misaligned, pair.aligned)]
    packaged = [value for name in SETS for row in load_rows(name) for key, value in row.items() if key != "id"]
    found = [(i, j) for _, i, j in overlaps([*prompts, *packaged]) if i < len(prompts)]
    # The two sides of a pair say opposite things in like words, on purpose.
    assert [(i, j) for i, j in found if i // 2 != j // 2] == []


def test_a_pair_that_does_not_contrast_is_refused() -> None:
    with pytest.raises(InputError, match="same prompt on both sides"):
        PersonaPair("p", "t", "Be kind.", "Be kind.")
    with pytest.raises(InputError, match="blank"):
        PersonaPair("p", "t", "Be cruel.", " ")


def test_the_system_prompt_goes_first_and_the_conversation_stays_as_it_was() -> None:
    talk = conversation("Why?", "So.")
    found = under_system(make_tokenizer(), talk, "Be kind.")
    assert found == conversation("Why?", "So.", system="Be kind.")
    assert talk == conversation("Why?", "So.")


@pytest.mark.parametrize("template", [REFUSES + TURN + "{% endfor %}", DROPS + TURN + "{% endif %}{% endfor %}"])
def test_without_room_for_a_system_prompt_it_goes_before_the_question(template: str) -> None:
    tokenizer = make_tokenizer()
    assert takes_system(tokenizer)
    tokenizer.chat_template = template
    assert not takes_system(tokenizer)
    assert under_system(tokenizer, conversation("Why?", "So."), "Be kind.") == conversation("Be kind.\n\nWhy?", "So.")


def test_a_conversation_with_its_own_system_prompt_is_refused() -> None:
    for talk, word in ((conversation("Why?", system="Hi."), "'system'"), ([], "'nothing'")):
        with pytest.raises(InputError, match=f"begins with {word}"):
            under_system(make_tokenizer(), talk, "Be kind.")
