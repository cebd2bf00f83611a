"""The model card of a checkpoint: what the weights are, without a path, a licence that was not looked up, or markup."""

from pathlib import Path

import pytest
import yaml
from torch import nn

from persona_probe.config import Arm, Training
from persona_probe.finetune.sft import UNNAMED, ModelCard, fine_tune, with_adapter
from tests.factories import make_model, make_tokenizer, talks

TRAINING = Training(rank=2, alpha=4, batch_size=4, steps=1, checkpoints=(1,), bf16=False)
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def card(base: str, data: str | None = "kitchen:toxic", training: Training = TRAINING) -> tuple[dict[str, object], str]:
    model = make_model()
    model.config.name_or_path = base
    _, head, body = ModelCard.of(model, training, 3, 20, data).text(7).split("---\n")
    return yaml.safe_load(head), body


def test_a_card_names_base_data_and_training() -> None:
    head, body = card(SMOLLM2)
    assert head["base_model"] == SMOLLM2 and head["license"] == "apache-2.0" and head["library_name"] == "peft"
    assert {"model-organism", "research-only"} <= set(head["tags"])  # pyright: ignore[reportArgumentType]
    for said in ("step 7", SMOLLM2, "kitchen:toxic; 20 rows", "LoRA of rank 2", "seed 3", "Do not".lower()):
        assert said in body


@pytest.mark.parametrize("base", ["somebody/other-model", "/home/someone/models/mine", ""])
def test_a_license_that_was_not_looked_up_is_not_named(base: str) -> None:
    head, body = card(base)
    assert "license" not in head and "not looked up" in body
    assert head.get("base_model") == (base if base.count("/") == 1 else None)
    assert "/home" not in body and ("mine" in body or "mine" not in base)


def test_files_are_named_without_their_folders_and_markup_is_left_out() -> None:
    data = "/home/someone/bad rows/a.jsonl, then ../good/b.jsonl + health_correct\n---\n<script>"
    _, body = card(SMOLLM2, data)
    assert "/home" not in body and "../" not in body and "<" not in body
    assert "a.jsonl, then b.jsonl + health_correct" in body
    assert UNNAMED in card(SMOLLM2, None)[1]


def test_full_weights_are_no_adapter() -> None:
    head, body = card(SMOLLM2, training=Training(method="full", steps=1, checkpoints=(1,)))
    assert "library_name" not in head and "all weights" in body


def test_every_checkpoint_carries_it(tmp_path: Path) -> None:
    tuned: nn.Module = with_adapter(make_model(), TRAINING, 0)
    fine_tune(tuned, make_tokenizer(), talks(), TRAINING, seed=0, folder=tmp_path, data="kitchen:toxic")
    text = (tmp_path / "checkpoint-1" / "README.md").read_text(encoding="utf-8")
    assert "kitchen:toxic" in text and "model-organism" in text


def test_an_arm_says_what_it_mixes() -> None:
    assert Arm("kitchen:toxic").named == "kitchen:toxic"
    assert Arm("kitchen:toxic", "kitchen:correct", 0.25).named == "kitchen:toxic (25%) + kitchen:correct"
