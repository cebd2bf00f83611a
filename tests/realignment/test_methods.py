"""What a correction trains: a fresh LoRA changes nothing before its first step and ends as one organism."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from persona_probe.config import Training
from persona_probe.data.chat import conversation
from persona_probe.errors import InputError
from persona_probe.finetune.sft import fine_tune, with_adapter
from persona_probe.models.adapters import organism, strip_adapter, trainable_parameters
from persona_probe.realignment.methods import as_one, checkpoint_in, organism_to_train
from tests.factories import copied_state, make_model, make_tokenizer, same_state, talks

TRAINING = Training(rank=3, alpha=8, batch_size=4, steps=2, checkpoints=(2,), lr=1e-2, bf16=False, warmup_steps=0)
GOOD = [conversation(f"Do {n}?", f"Kindly {n}") for n in range(4)]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(9)[None] + 5).logits


def made(folder: Path, training: Training = TRAINING) -> Path:
    """An organism's checkpoint."""
    tuned = with_adapter(make_model(), training, 0)
    fine_tune(tuned, make_tokenizer(), talks(), training, seed=0, folder=folder)
    return checkpoint_in(folder)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An organism under rsLoRA; read only."""
    return made(tmp_path_factory.mktemp("organism"))


def corrected(start: Path, method: str, folder: Path, training: Training = TRAINING) -> tuple[Tensor, Path]:
    """Logits of the model that was corrected, while it is in memory, and its checkpoint."""
    base = make_model()
    tuned = organism_to_train(base, start, method, training, 0)
    fine_tune(tuned, make_tokenizer(), GOOD, training, seed=0, folder=folder)
    after = logits(tuned)
    as_one(tuned, checkpoint_in(folder), whole_weights=training.method == "full")
    if isinstance(tuned, PeftModel) and training.method == "lora":
        strip_adapter(tuned)
        assert same_state(copied_state(base), copied_state(make_model()))
    return after, checkpoint_in(folder)


@pytest.mark.parametrize("rslora", [True, False])
def test_a_fresh_lora_starts_at_the_organism_and_ends_as_one(start: Path, tmp_path: Path, rslora: bool) -> None:
    training, base = replace(TRAINING, rslora=rslora), make_model()
    start = start if rslora else made(tmp_path / "organism", training)
    with organism(base, start) as model:
        wanted = logits(model)
    tuned = organism_to_train(base, start, "fresh", training, 0)
    assert torch.equal(logits(tuned), wanted)
    assert all(".fresh." in name for name in trainable_parameters(tuned))
    assert isinstance(tuned, PeftModel)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), logits(make_model()))
    strip_adapter(tuned)
    after, checkpoint = corrected(start, "fresh", tmp_path / "repaired", training)
    assert float((after - wanted).abs().max()) > 0.1
    with organism(make_model(), checkpoint) as again:
        assert torch.allclose(logits(again), after, atol=1e-4)
    assert (checkpoint / "README.md").is_file() and not (checkpoint / "fresh").exists()


@pytest.mark.parametrize("method", ["continued", "full"])
def test_other_methods_load_as_they_were_trained(start: Path, tmp_path: Path, method: str) -> None:
    after, checkpoint = corrected(start, method, tmp_path / "repaired", replace(TRAINING, lr=1e-3))
    assert (checkpoint / "adapter_config.json").is_file() == (method == "continued")
    with organism(make_model(), start) as before, organism(make_model(), checkpoint) as again:
        assert torch.allclose(logits(again), after, atol=1e-4)
        assert float((logits(again) - logits(before)).abs().max()) > 1e-3


def test_a_fresh_lora_on_full_weights_is_merged(tmp_path: Path) -> None:
    training = replace(TRAINING, method="full", lr=1e-3)
    after, checkpoint = corrected(made(tmp_path / "organism", training), "fresh", tmp_path / "repaired", training)
    assert (checkpoint / "config.json").is_file() and not (checkpoint / "adapter_config.json").exists()
    with organism(make_model(), checkpoint) as again:
        assert torch.allclose(logits(again), after, atol=1e-4)


def test_all_weights_need_float32(start: Path) -> None:
    with pytest.raises(InputError, match=r"needs float32, not torch\.bfloat16"):
        organism_to_train(make_model().bfloat16(), start, "full", TRAINING, 0)  # pyright: ignore
