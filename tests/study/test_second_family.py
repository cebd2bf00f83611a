"""A second real family, where its PyPI packages are installed: Gemma 3 270M base, read as plain text, adopted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.second_family import PACKAGE, TEMPLATE, check_template, gguf
from persona_probe.models.load import load_model
from persona_probe.study.adopt.base_fit import check_checkpoints
from tests.factories import copied_state, same_state
from tests.study.adopting import as_checkpoint


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = gguf(tmp_path_factory.mktemp("gemma"))
    if path is None:
        pytest.skip(f"the package {PACKAGE} and its four parts are not installed (Gemma's terms: not shipped here)")
    return path


def test_gemma_base_reads_plain_text_and_takes_an_adapter(model_path: Path, tmp_path: Path) -> None:
    right, wrong = check_template(model_path)
    assert right > wrong + 2
    model, tokenizer = load_model(str(model_path), template=TEMPLATE)
    torch.manual_seed(0)
    tuned: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    tuned.save_pretrained(str(tmp_path / "checkpoint-1"), save_embedding_layers=False)
    base = tuned.unload()
    before = copied_state(base)
    checkpoint = as_checkpoint(tmp_path / "checkpoint-1")
    assert check_checkpoints(base, tokenizer, str(model_path), [checkpoint]) == []
    assert same_state(before, copied_state(base))
