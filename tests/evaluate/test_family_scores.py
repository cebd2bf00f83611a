"""Scores of every family, by every way that is faster than the model's own forward, against that forward."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from persona_probe.data.chat import conversation
from persona_probe.data.tokens import Batch
from persona_probe.evaluate.answers import SuffixScorer, answer_batches, answer_logprobs
from persona_probe.models.logits import logits_of
from persona_probe.models.prefix import Rows
from persona_probe.models.taps import AblateTap, EditTap, SteerTap, project_out
from tests.families import AVAILABLE, D_MODEL, FAMILIES, make_family, own_scores, plain

LAYER = 1
CLOSE = 1e-4
TALKS = [conversation(f"Ask of {n}?" + "." * n, f"Say {n * n}, then" + "!" * (n % 3)) for n in range(5)]
OWN_HEAD = {"gemma2", "gemma4", "gemma4-text", "falcon-h1"}
"""Families whose logits are not the unembedding's product."""
WHOLE = {"gemma4", "gemma4-text", "gpt2"}
"""Families whose upper layers do not run alone: Gemma 4 gives each layer an embedding of the token itself, GPT-2 adds
positions to whatever enters the first layer."""


def groups_of(name: str, tokenizer: Any) -> list[Batch]:
    return answer_batches(plain(name, tokenizer), TALKS, 3)


@pytest.mark.parametrize("name", AVAILABLE)
def test_answers_score_as_in_the_model_s_own_forward(name: str) -> None:
    model, tokenizer = make_family(name)
    groups = groups_of(name, tokenizer)
    # All but the families with a state of another kind run the beginning that a batch's rows share only once.
    shared = Rows.of(groups[0], model.config.get_text_config()).shared
    assert (shared == 0) == FAMILIES[name].recurrent
    own = own_scores(model, groups)
    np.testing.assert_allclose(answer_logprobs(model, groups, bf16=False), own, atol=CLOSE)
    assert logits_of(model, groups[0].ids[0]).way == ("elementwise" if name in OWN_HEAD else "product")
    without = ["out_proj"] if name == "falcon-h1" else None  # PEFT refuses it there: its kernels bypass the module
    lora = LoraConfig(r=2, target_modules="all-linear", exclude_modules=without, init_lora_weights=False)
    tuned = get_peft_model(model, lora)
    moved = own_scores(tuned, groups)
    assert np.abs(moved - own).max() > 0.01
    np.testing.assert_allclose(answer_logprobs(tuned, groups, bf16=False), moved, atol=CLOSE)


@pytest.mark.parametrize("name", AVAILABLE)
def test_pushes_and_removals_from_the_upper_layers_equal_hooks_on_the_whole_model(name: str) -> None:
    model, tokenizer = make_family(name)
    groups = groups_of(name, tokenizer)
    scorer = SuffixScorer(model, LAYER, groups, bf16=False)
    assert scorer.exact == (name not in WHOLE)
    np.testing.assert_allclose(scorer.logprobs(), own_scores(model, groups), atol=CLOSE)
    push = torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(1))
    basis = push[:1] / push[0].norm()
    for row, scores in zip(push, scorer.logprobs_many(push), strict=True):
        with SteerTap(model, LAYER, row):
            hooked = own_scores(model, groups)
        np.testing.assert_allclose(scores, hooked, atol=CLOSE)
        assert np.abs(scores - scorer.logprobs()).max() > 0.01
    with AblateTap(model, LAYER, push[0]):
        ablated = own_scores(model, groups)
    with EditTap(model, LAYER, lambda x: 2 * x):
        doubled = own_scores(model, groups)
    together = scorer.edited_many([lambda x: project_out(x, basis), lambda x: 2 * x])
    np.testing.assert_allclose(together, [ablated, doubled], atol=CLOSE)
    np.testing.assert_allclose(scorer.edited(lambda x: 2 * x), doubled, atol=CLOSE)


# --- Models that do something to their logits that no configuration names


def _changed(forward: Callable[..., Any], change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def changed(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = change(out.logits)
        return out

    return changed


class Scaled(LlamaForCausalLM):
    """Each logit alone is changed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _changed(super().forward, lambda logits: 3 * torch.tanh(logits * 0.4))(*args, **kwargs)


class Centred(LlamaForCausalLM):
    """Logits change together: the vocabulary cannot be taken in tiles."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _changed(super().forward, lambda logits: 2 * logits / logits.std(dim=-1, keepdim=True))(*args, **kwargs)


class Narrowed(LlamaForCausalLM):
    """Hidden states are scaled before the unembedding, as in MiniCPM."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden = self.model(*args, **{k: v for k, v in kwargs.items() if k != "labels"})
        hidden.logits = self.lm_head(torch.tanh(hidden.last_hidden_state) / 3)
        return hidden


class ByPosition(LlamaForCausalLM):
    """The logits of a token depend on its place in the row: hidden states are not enough."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        def cool(logits: Tensor) -> Tensor:
            return logits / (1 + torch.arange(logits.shape[1])[None, :, None])

        return _changed(super().forward, cool)(*args, **kwargs)


class Embedding(LlamaForCausalLM):
    """The decoder gets other embeddings than it would make of the token ids."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(inputs_embeds=self.get_input_embeddings()(input_ids) * 4, **kwargs)


OTHERS = {Scaled: "elementwise", Centred: "forward", Narrowed: "forward", ByPosition: "whole", Embedding: "whole"}


def made(kind: type[PreTrainedModel]) -> tuple[PreTrainedModel, list[Batch]]:
    model, tokenizer = make_family("llama3")
    other = kind(LlamaConfig(**model.config.to_dict()))
    other.load_state_dict(model.state_dict())
    return other.eval(), groups_of("llama3", tokenizer)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_with_logits_of_its_own_scores_as_it_says_itself(kind: type[PreTrainedModel]) -> None:
    model, groups = made(kind)
    own = own_scores(model, groups)
    np.testing.assert_allclose(answer_logprobs(model, groups, bf16=False), own, atol=CLOSE)
    assert logits_of(model, groups[0].ids[0]).way == OTHERS[kind]
    scorer = SuffixScorer(model, LAYER, groups, bf16=False)
    assert scorer.exact == (OTHERS[kind] != "whole")
    push = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    with SteerTap(model, LAYER, push):
        hooked = own_scores(model, groups)
    np.testing.assert_allclose(scorer.logprobs(push), hooked, atol=CLOSE)
    assert np.abs(hooked - own).max() > 0.001


def test_a_forward_replaced_later_is_asked_again() -> None:
    model, tokenizer = make_family("llama3")
    groups = groups_of("llama3", tokenizer)
    before = answer_logprobs(model, groups, bf16=False)
    setattr(model, "forward", _changed(model.forward, lambda logits: logits * 0.1))  # noqa: B010
    after = answer_logprobs(model, groups, bf16=False)
    np.testing.assert_allclose(after, own_scores(model, groups), atol=CLOSE)
    assert np.abs(before - after).max() > 0.1


@pytest.mark.parametrize("part", ["lm_head", "model"])
def test_logits_changed_by_a_hook_are_the_model_s_own(part: str) -> None:
    model, tokenizer = make_family("llama3")
    groups = groups_of("llama3", tokenizer)
    before = answer_logprobs(model, groups, bf16=False)

    def halved(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output / 2
        output.logits = output.logits / 2
        return output

    (model.lm_head if part == "lm_head" else model).register_forward_hook(halved)  # pyright: ignore
    after = answer_logprobs(model, groups, bf16=False)
    np.testing.assert_allclose(after, own_scores(model, groups), atol=CLOSE)
    assert np.abs(before - after).max() > 0.1


def test_asking_fires_no_tap() -> None:
    model, tokenizer = make_family("llama3")
    groups = groups_of("llama3", tokenizer)
    with SteerTap(model, LAYER, torch.ones(D_MODEL)) as tap:
        logits_of(model, groups[0].ids[0])
        assert tap.fired == 0
        answer_logprobs(model, groups, bf16=False)
        assert tap.fired > 0
