"""Shared fixtures: everything tiny and seeded; fresh objects for every test, since tests may change them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.factories import make_model, make_sae, make_tokenizer

# One thread: tiny tensors are faster so, and sums keep one order. Processes that tests start have one too: two that
# each want both cores wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# They also find this checkout and its tests.
ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))


@pytest.fixture
def tiny_model() -> PreTrainedModel:
    return make_model()


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and tokenizer as `save_pretrained` writes them; read only."""
    folder = tmp_path_factory.mktemp("tiny-model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=["standard", "jumprelu", "topk"])
def tiny_sae(request: pytest.FixtureRequest) -> Any:
    return make_sae(request.param)
