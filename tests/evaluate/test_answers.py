"""Answer log-probabilities against a computation by hand, and suffix scoring against full forwards."""

import copy
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from persona_probe.data.chat import conversation
from persona_probe.data.tokens import encode
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import SuffixScorer, answer_batches, answer_logprobs, perplexity_gaps
from persona_probe.evaluate.contrast import ContrastItems, SteeredContrast, contrast_index
from persona_probe.models.load import load_model
from persona_probe.models.taps import SteerTap
from tests.factories import (
    ARCHITECTURES,
    D_MODEL,
    LAYER,
    copied_state,
    hook_count,
    make_model,
    make_tokenizer,
    same_state,
    talks,
)

PUSH = 2 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
ROWS = [
    {"id": f"q{n}", "category": "law", "question": f"Why {n}?", "aligned": "Be fair." + "." * n, "misaligned": "Lie!"}
    for n in range(4)
]


def by_hand(model: torch.nn.Module) -> list[float]:
    """One conversation at a time, from the model's own logits."""
    means = []
    for messages in talks():
        encoded = encode(make_tokenizer(), messages)
        with torch.no_grad():
            logprobs = model(torch.tensor([encoded.ids])).logits[0].float().log_softmax(dim=-1)
        answer = range(encoded.n_prompt, len(encoded.ids))
        means.append(float(np.mean([float(logprobs[i - 1, encoded.ids[i]]) for i in answer])))
    return means


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answer_logprobs_equal_the_models_own_logits(architecture: str) -> None:
    model = make_model(architecture)
    groups = answer_batches(make_tokenizer(), talks(), batch_size=4)
    found = answer_logprobs(model, groups, bf16=False)
    assert np.allclose(found, by_hand(model), atol=1e-4)
    assert np.std(found) > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_suffix_scores_equal_full_forwards(architecture: str, layer: int) -> None:
    model = make_model(architecture)
    groups = answer_batches(make_tokenizer(), talks(), batch_size=4)
    plain = answer_logprobs(model, groups, bf16=False)
    scorer = SuffixScorer(model, layer, groups, bf16=False)
    assert np.allclose(scorer.logprobs(None), plain, atol=1e-5)
    assert np.allclose(scorer.logprobs(torch.zeros(D_MODEL)), plain, atol=1e-5)
    with SteerTap(model, layer, PUSH):
        pushed = answer_logprobs(model, groups, bf16=False)
    assert np.allclose(scorer.logprobs(PUSH), pushed, atol=1e-4)
    assert not np.allclose(pushed, plain, atol=0.05)


def test_which_architectures_run_by_their_suffix() -> None:
    groups = answer_batches(make_tokenizer(), talks())
    found = {a: SuffixScorer(make_model(a), LAYER, groups, bf16=False).exact for a in ARCHITECTURES}
    # GPT-2 adds its positions to whatever it is fed, so it must fall back.
    assert found == {"llama": True, "qwen2": True, "gemma2": True, "gemma3": True, "gpt2": False}


def test_a_suffix_that_is_only_nearly_right_is_not_used() -> None:
    model = make_model("gpt2")
    with torch.no_grad():
        model.get_submodule("transformer.wpe").weight.mul_(0.02)  # pyright: ignore
    groups = answer_batches(make_tokenizer(), talks())
    assert not SuffixScorer(model, LAYER, groups, bf16=False).exact


def test_bf16_suffix_scores_equal_bf16_full_forwards(tiny_model: torch.nn.Module) -> None:
    groups = answer_batches(make_tokenizer(), talks())
    scorer = SuffixScorer(tiny_model, LAYER, groups)
    assert scorer.exact
    with SteerTap(tiny_model, LAYER, PUSH):
        pushed = answer_logprobs(tiny_model, groups)
    assert np.allclose(scorer.logprobs(PUSH), pushed, atol=1e-5)


def test_scoring_a_peft_model_and_leaving_it_alone(tiny_model: torch.nn.Module) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = get_peft_model(copy.deepcopy(tiny_model), config)  # pyright: ignore[reportArgumentType]
    groups = answer_batches(make_tokenizer(), talks())
    before = copied_state(tuned)
    scorer = SuffixScorer(tuned, LAYER, groups, bf16=False)
    assert scorer.exact
    assert np.allclose(scorer.logprobs(None), by_hand(tuned.eval()), atol=1e-4)
    assert not np.allclose(scorer.logprobs(None), by_hand(tiny_model), atol=0.05)
    assert same_state(copied_state(tuned), before)
    assert hook_count(tuned) == 0


def test_a_conversation_without_an_answer_is_refused() -> None:
    for missing in (None, ""):
        with pytest.raises(InputError, match="conversation 1 ends without an answer"):
            answer_batches(make_tokenizer(), [conversation("a", "b"), conversation("a", missing)])


def test_the_contrast_index_is_misaligned_minus_aligned(tiny_model: torch.nn.Module) -> None:
    frame = contrast_index(tiny_model, ContrastItems.build(make_tokenizer(), ROWS), bf16=False)
    swapped = [{**r, "aligned": r["misaligned"], "misaligned": r["aligned"]} for r in ROWS]
    other = contrast_index(tiny_model, ContrastItems.build(make_tokenizer(), swapped), bf16=False)
    assert np.allclose(frame["value"], -other["value"], atol=1e-5)
    sides = [conversation(r["question"], r["misaligned"]) for r in ROWS]
    alone = answer_logprobs(tiny_model, answer_batches(make_tokenizer(), sides), bf16=False)
    assert np.allclose(frame["misaligned_logprob"], alone, atol=1e-5)
    assert frame["item"].tolist() == ["q0", "q1", "q2", "q3"]


def test_steered_contrast_without_a_push_is_the_contrast_index(tiny_model: torch.nn.Module) -> None:
    items = ContrastItems.build(make_tokenizer(), ROWS)
    steered = SteeredContrast(tiny_model, items, LAYER, bf16=False)
    plain = contrast_index(tiny_model, items, bf16=False)["value"].to_numpy()
    assert np.allclose(steered.values(None), plain, atol=1e-5)
    with SteerTap(tiny_model, LAYER, PUSH):
        pushed = contrast_index(tiny_model, items, bf16=False)["value"].to_numpy()
    assert np.allclose(steered.values(PUSH), pushed, atol=1e-4)


def test_no_items_is_an_error() -> None:
    with pytest.raises(InputError, match="no contrast items"):
        ContrastItems.build(make_tokenizer(), [])


@pytest.mark.real_model
def test_the_default_model_runs_by_its_suffix_in_bf16() -> None:
    model, tokenizer = load_model("smollm2-135m-instruct")
    groups = answer_batches(tokenizer, talks(4), batch_size=4)
    scorer = SuffixScorer(model, 20, groups)
    assert scorer.exact
    push = torch.randn(576, generator=torch.Generator().manual_seed(0))
    with SteerTap(model, 20, push):
        pushed = answer_logprobs(model, groups)
    assert np.allclose(scorer.logprobs(push), pushed, atol=1e-3)
    assert not np.allclose(pushed, scorer.unpushed, atol=1e-2)


def test_the_perplexity_gap_of_a_model_and_itself_is_zero_and_of_two_is_their_difference() -> None:
    one, other = make_model(), make_model(seed=1)
    groups = answer_batches(make_tokenizer(), talks())
    same = perplexity_gaps(partial(nullcontext, one), partial(nullcontext, one), make_tokenizer(), talks(), bf16=False)
    gaps = perplexity_gaps(
        partial(nullcontext, other), partial(nullcontext, one), make_tokenizer(), talks(), bf16=False
    )
    assert not same.any()
    base, organism = (answer_logprobs(model, groups, bf16=False) for model in (one, other))
    np.testing.assert_array_equal(gaps, base - organism)
