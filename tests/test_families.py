"""The family table itself: each tiny model runs, differs by seed, and its template follows the family's rules."""

import jinja2
import pytest
import torch

from tests.families import AVAILABLE, D_MODEL, FAMILIES, family_model, make_family

TALK = [{"role": "user", "content": "Ask?"}, {"role": "assistant", "content": "Say it!"}]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_made_or_says_why_not(name: str) -> None:
    if name not in AVAILABLE:
        assert FAMILIES[name].missing
        pytest.skip(str(FAMILIES[name].missing))
    model, tokenizer = make_family(name)
    again, other = family_model(name), family_model(name, seed=1)
    ids = tokenizer("Ask? Say it!", return_tensors="pt").input_ids
    with torch.no_grad():
        logits, same, different = (m(input_ids=ids).logits for m in (model, again, other))
    assert torch.equal(logits, same) and not torch.allclose(logits, different, atol=0.1)
    assert model.get_input_embeddings().weight.shape[1] == D_MODEL  # pyright: ignore
    assert len(tokenizer) < logits.shape[-1] < 320
    assert logits.std() > 0.5
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "Ask? Say it!"


@pytest.mark.parametrize("name", AVAILABLE)
def test_a_template_ends_turns_with_the_family_s_token_and_refuses_what_the_family_refuses(name: str) -> None:
    family, (_, tokenizer) = FAMILIES[name], make_family(name)
    if family.template is None:
        assert tokenizer.chat_template is None
        return
    text = str(tokenizer.apply_chat_template(TALK, tokenize=False))
    assert "Ask?" in text and "Say it!" in text
    assert text.rstrip().endswith(family.end_of_turn or family.eos)
    under_system = [{"role": "system", "content": "Be kind."}, *TALK]
    if family.system:
        assert "Be kind." in tokenizer.apply_chat_template(under_system, tokenize=False)
    else:
        with pytest.raises(jinja2.TemplateError):
            tokenizer.apply_chat_template(under_system, tokenize=False)


def test_tied_and_untied_heads_occur() -> None:
    tied = {m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in map(family_model, AVAILABLE)}  # pyright: ignore
    assert tied == {True, False}
