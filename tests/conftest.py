"""Shared fixtures: everything tiny and seeded; fresh objects for every test, since tests may change them."""

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from persona_probe.cli.process import keep_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# One thread, before anything loads torch: tiny tensors are faster so, and sums keep one order. Processes that tests
# start have one too: two that each want both cores wait for each other. The process that starts the workers loads no
# library. The end-to-end test alone, which the Makefile starts by itself, takes more.
os.environ["OMP_NUM_THREADS"] = os.environ.get("TEST_THREADS", "1")
# They also find this checkout and its tests.
ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

SLOWEST = (
    "test_notebooks.py",
    "study/test_presets.py",
    "study/test_adopt.py",
    "study/test_resume.py",
    "models/test_load_model.py",
    "models/test_quantized.py",
    "monitor/test_hooks_distributed.py",
    "study/test_locate_variants.py",
    "study/test_dictionaries.py",
    "study/test_second_family.py",
    "study/test_loop.py",
    "study/test_evaluate_run.py",
    "study/test_double_start.py",
    "study/test_several_saes.py",
    "study/test_two_by_two.py",
    "study/test_untouched.py",
    "monitor/test_monitor_study.py",
    "test_docs.py",
)
"""Files that begin, so that no worker is left with a long one at the end (`--no-loadscope-reorder` keeps the order)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    gc.freeze()
    keep_freed_memory()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Between files, what is alive (libraries, tests) is set apart for good: collections go through it no more.

    There are a million objects, and every Trainer asks for a collection of all.
    """
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def short_card_text() -> None:
    """Studies read a tenth of the packaged text for their feature cards."""
    from tests.processes import shorten_card_text

    shorten_card_text()


@pytest.fixture
def tiny_model() -> "PreTrainedModel":
    from tests.factories import make_model

    return make_model()


@pytest.fixture
def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    from tests.factories import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and tokenizer as `save_pretrained` writes them; read only."""
    from tests.factories import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("tiny-model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=["standard", "jumprelu", "topk"])
def tiny_sae(request: pytest.FixtureRequest) -> Any:
    from tests.factories import make_sae

    return make_sae(request.param)
