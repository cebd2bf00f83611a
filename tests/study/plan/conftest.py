"""A tiny model, its tokenizer and its SAE in one folder, and a study of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persona_probe.config import StudyConfig, Training
from persona_probe.study.plan import estimate
from tests.factories import make_model, make_sae, make_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, and an SAE of its layer 1; read only."""
    folder = tmp_path_factory.mktemp("dry-run")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    make_sae("topk").save_model(str(folder / "sae"))
    return folder


@pytest.fixture(scope="module", autouse=True)
def each_row_counted_once() -> Iterator[None]:
    """Plans of these tests share the counts of rows: a plan tokenises two thousand, most of them the same in all."""
    count, counts = estimate._count_tokens, dict[tuple[str, str, str], tuple[int, int]]()

    def counted(tokenizer: Any, messages: Any) -> tuple[int, int]:
        if tokenizer is None:
            return count(tokenizer, messages)
        key = (tokenizer.name_or_path, str(tokenizer.chat_template), json.dumps(messages))
        if key not in counts:
            counts[key] = count(tokenizer, messages)
        return counts[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "_count_tokens", counted)
        yield


@pytest.fixture
def local(place: Path) -> StudyConfig:
    """A study of the tiny model on packaged data (whose texts are long in bytes)."""
    training = Training(steps=3, batch_size=4, checkpoints=(1,), max_length=4096)
    return StudyConfig("local", str(place / "sae"), str(place / "model"), training=training, device="cpu")
