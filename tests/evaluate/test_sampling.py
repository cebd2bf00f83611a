"""One answer a prompt: seeded, ordered, and without a trace in the caller's random state."""

import threading
import time

import pytest
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.errors import InputError
from persona_probe.evaluate.sampling.samples import complete_text, sample_answers, ticking

PROMPTS = ["a?", "bb?", "a much longer one?"]


def test_same_seed_same_answers_and_random_state(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    state = torch.get_rng_state()
    first = sample_answers(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=12, seed=4)
    assert sample_answers(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=12, seed=4) == first
    assert sample_answers(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=12, seed=5) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_answers_do_not_depend_on_the_batch(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    together = sample_answers(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=6, temperature=0)
    alone = [sample_answers(tiny_model, tiny_tokenizer, [p], max_new_tokens=6, temperature=0)[0] for p in PROMPTS]
    assert together == alone


def test_texts_of_one_token_continue_as_in_longer_company(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    def said(texts: list[str], batch_size: int) -> list[str]:
        return complete_text(
            tiny_model, tiny_tokenizer, texts, max_new_tokens=6, temperature=1.0, seed=1, batch_size=batch_size
        )

    together = said(["x", "y", "x", "a longer text"], 4)
    assert said(["x", "y", "x"], 1) == together[:3]
    assert together[0] != together[2]  # one text, two places, two draws
    ids = torch.tensor([tiny_tokenizer.encode("y")])
    wanted = tiny_model.generate(ids, max_new_tokens=6, do_sample=False)  # pyright: ignore
    greedy = complete_text(
        tiny_model, tiny_tokenizer, ["x", "y"], max_new_tokens=6, temperature=0.0, seed=1, batch_size=2
    )
    assert greedy[1] == str(tiny_tokenizer.decode(wanted[0, 1:], skip_special_tokens=True)).strip()


def test_an_empty_text_is_refused(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="'number 1' has no tokens"):
        complete_text(tiny_model, tiny_tokenizer, ["x", ""], max_new_tokens=6, temperature=1.0, seed=1, batch_size=2)


def test_a_bar_is_drawn_again_while_nothing_ends(capsys: pytest.CaptureFixture[str]) -> None:
    running = threading.active_count()
    with tqdm(total=2, desc="answers", mininterval=100.0) as bar, ticking(bar, every=0.02):
        before = capsys.readouterr().err.count("answers")
        time.sleep(0.3)
        assert before + capsys.readouterr().err.count("answers") > 3
    with tqdm(total=2, desc="quiet", disable=True) as bar, ticking(bar, every=0.01):
        time.sleep(0.05)
    assert "quiet" not in capsys.readouterr().err
    assert threading.active_count() <= running + 1  # tqdm keeps a monitor of its own
