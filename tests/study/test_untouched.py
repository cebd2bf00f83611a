"""Bridges and models that a study gives are copies: its base model stays as it was, bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from persona_probe.models.adapters import merged_copy
from persona_probe.models.load import tokenizer_of
from persona_probe.study.study import Study
from tests.factories import copied_state, hook_count, same_state

IDS = torch.arange(24).reshape(2, 12) + 5


@pytest.fixture
def copy(finished: Study, tmp_path: Path) -> Study:
    return Study.open(shutil.copytree(finished.path, tmp_path / "run"))


def test_the_bridge_is_the_merged_organism_and_leaves_the_study_alone(copy: Study) -> None:
    model = copy.context.model
    before = copied_state(model)
    tokenizer = AutoTokenizer.from_pretrained(copy.config.model)
    bridge = copy.bridge("incorrect", step=2)
    merged = merged_copy(model, copy.run_folder.checkpoint("incorrect", 0, 2))
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(IDS, prepend_bos=False)
        assert torch.allclose(logits, merged(IDS).logits, atol=1e-4)
        assert not torch.allclose(logits, model(IDS).logits, atol=1e-2)
    acts = cache[bridge.get_sae_hook_name(copy.context.sae)]
    assert acts.shape == (2, 12, copy.context.sae.cfg.d_sae)
    assert same_state(copied_state(model), before) and hook_count(model) == 0
    assert copy.context.tokenizer("hello")["input_ids"] == tokenizer("hello")["input_ids"]


def test_the_bridge_of_the_base_is_the_base(copy: Study) -> None:
    with torch.no_grad():
        logits = copy.bridge("base")(IDS, prepend_bos=False)
        assert torch.allclose(logits, copy.context.model(IDS).logits, atol=1e-4)


def test_a_model_of_the_study_is_the_merged_organism_and_a_model_of_its_own(copy: Study) -> None:
    before = copied_state(copy.context.model)
    merged, base = copy.model("incorrect", step=2), copy.model("base")
    with torch.no_grad(), copy.context.organism("incorrect", 0, 2) as tuned:
        torch.testing.assert_close(merged(IDS).logits, tuned(IDS).logits, atol=1e-4, rtol=1e-4)
    assert same_state(copied_state(base), before) and base is not copy.context.model
    assert same_state(copied_state(copy.context.model), before)
    assert tokenizer_of(merged) is copy.context.tokenizer
