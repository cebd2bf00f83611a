"""Organisms come and go, and the base model stays as it was, bit for bit."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from persona_probe.errors import InputError
from persona_probe.models.adapters import base_weights, merged_copy, organism, trainable_parameters
from tests.factories import SHAPE, copied_state, make_model, same_state

IDS = torch.arange(20).reshape(2, 10) + 5


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def fresh_lora(model: PreTrainedModel) -> torch.nn.Module:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def train_b(tuned: torch.nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    tuned = fresh_lora(make_model())
    train_b(tuned)
    tuned.save_pretrained(str(tmp_path / "checkpoint-1"))  # pyright: ignore[reportCallIssue]
    return tmp_path / "checkpoint-1"


def test_no_checkpoint_is_the_base_itself(tiny_model: PreTrainedModel) -> None:
    with organism(tiny_model, None) as model:
        assert model is tiny_model


def test_a_fresh_adapter_equals_the_base_exactly(tiny_model: PreTrainedModel) -> None:
    plain = logits(tiny_model)
    assert torch.equal(logits(fresh_lora(tiny_model)), plain)


def test_base_weights_are_the_base_also_after_training(tiny_model: PreTrainedModel) -> None:
    plain = logits(tiny_model)
    tuned = fresh_lora(tiny_model)
    train_b(tuned)
    trained, wanted = logits(tuned), list(trainable_parameters(tuned))
    with base_weights(tuned) as base:
        assert torch.equal(logits(base), plain)
    assert not torch.allclose(trained, plain, atol=0.1)
    assert torch.equal(logits(tuned), trained)
    assert list(trainable_parameters(tuned)) == wanted


def test_an_organism_leaves_the_base_as_it_was(tiny_model: PreTrainedModel, adapter: Path) -> None:
    next(tiny_model.parameters()).requires_grad_(False)
    before, plain = copied_state(tiny_model), logits(tiny_model)
    wanted = {n: p.requires_grad for n, p in tiny_model.named_parameters()}
    with organism(tiny_model, adapter) as tuned:
        assert not torch.allclose(logits(tuned), plain, atol=0.1)
        assert not tuned.training
    assert same_state(copied_state(tiny_model), before)
    assert {n: p.requires_grad for n, p in tiny_model.named_parameters()} == wanted
    assert torch.equal(logits(tiny_model), plain)
    with pytest.raises(ZeroDivisionError), organism(tiny_model, adapter):
        raise ZeroDivisionError
    assert same_state(copied_state(tiny_model), before)


def test_the_same_base_hosts_one_organism_after_another(tiny_model: PreTrainedModel, adapter: Path) -> None:
    with organism(tiny_model, adapter) as first:
        once = logits(first)
    with organism(tiny_model, adapter) as second:
        assert torch.equal(logits(second), once)


def test_a_merged_copy_is_the_organism_and_leaves_the_base(tiny_model: PreTrainedModel, adapter: Path) -> None:
    before = copied_state(tiny_model)
    merged = merged_copy(tiny_model, adapter)
    with organism(tiny_model, adapter) as tuned:
        assert torch.allclose(logits(merged), logits(tuned), atol=1e-4)
    assert same_state(copied_state(tiny_model), before)
    twin = merged_copy(tiny_model, None)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert same_state(copied_state(tiny_model), before)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_truncated_adapter_is_refused_and_leaves_the_base(tiny_model: PreTrainedModel, adapter: Path) -> None:
    truncate(adapter / "adapter_model.safetensors")
    before = copied_state(tiny_model)
    with pytest.raises(InputError, match="could not load the adapter"), organism(tiny_model, adapter):
        pass
    assert same_state(copied_state(tiny_model), before)
    assert all(p.requires_grad for p in tiny_model.parameters())


def test_an_adapter_of_another_shape_is_refused_and_leaves_the_base(adapter: Path) -> None:
    other = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "intermediate_size": 40}))
    before = copied_state(other)
    with pytest.raises(InputError, match="could not load the adapter"), organism(other, adapter):
        pass
    assert same_state(copied_state(other), before)


def test_full_weights_are_loaded_beside_the_base(tiny_model: PreTrainedModel, tmp_path: Path) -> None:
    other = make_model(seed=1)
    other.save_pretrained(tmp_path / "full")
    with organism(tiny_model, tmp_path / "full") as tuned:
        assert tuned is not tiny_model
        assert torch.equal(logits(tuned), logits(other))


def test_damaged_or_missing_full_weights_are_refused(tiny_model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no adapter and no weights"), organism(tiny_model, tmp_path / "empty"):
        pass
    tiny_model.save_pretrained(tmp_path / "full")
    truncate(tmp_path / "full" / "model.safetensors")
    with pytest.raises(InputError, match="train that arm again"), organism(tiny_model, tmp_path / "full"):
        pass
