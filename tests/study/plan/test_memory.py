"""The plan's memory: parameters of every family, what a backward pass keeps, and what is said of a GPU."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from persona_probe.config import StudyConfig, Training
from persona_probe.errors import InputError
from persona_probe.finetune.sft import with_adapter
from persona_probe.models.adapters import frozen_in_bf16
from persona_probe.models.layers import autocast, base_transformer, causal_model, eager_attention
from persona_probe.models.load import load_model
from persona_probe.study.plan.fit import GIB, Fit, fit, needed
from persona_probe.study.plan.memory import Memory
from persona_probe.study.plan.plan import dry_run
from persona_probe.study.plan.shapes import Skeleton, find_skeleton
from tests.factories import refusal, write_config
from tests.families import FAMILIES, family_model, family_tokenizer
from tests.study.plan.test_dry_run import preset

ROWS, TOKENS = 4, 64
WIDE = {"hidden_size": 128, "intermediate_size": 384, "moe_intermediate_size": 192, "n_embd": 128}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_alone_gives_every_familys_parameters(name: str, tmp_path: Path) -> None:
    model = family_model(name)
    model.config.save_pretrained(tmp_path)
    found = find_skeleton(str(tmp_path))
    assert found is not None and found.source == "config.json"
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert (found.active_parameters < found.parameters) == FAMILIES[name].experts
    assert str(round(found.parameters / 1e9, 2)) in found.describe()


def test_a_token_passes_only_the_experts_that_it_is_sent_to() -> None:
    dense, routed = (Skeleton(family_model(name), "test") for name in ("llama3", "mixtral"))
    assert dense.active_parameters == dense.parameters
    experts = [p for p in routed.model.parameters() if p.dim() == 3]
    assert routed.parameters - routed.active_parameters == sum(p.numel() for p in experts) // 2  # two of four
    attention = sum(m.weights for m in routed.linears)
    assert routed.weights(0, routed.layers - 1) == attention + sum(p.numel() for p in experts) // 2


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra: quantization)"
)
@pytest.mark.parametrize("name", ["llama3", "gemma4", "mixtral", "falcon-h1"])
def test_the_plan_quantises_what_bitsandbytes_does(name: str, tmp_path: Path) -> None:
    family_model(name).save_pretrained(tmp_path)
    family_tokenizer(name).save_pretrained(tmp_path)
    model, skeleton = load_model(str(tmp_path), quantization="4bit")[0], Skeleton(family_model(name), "test")
    packed = {n: p for n, p in model.named_parameters() if type(p).__name__ == "Params4bit"}
    assert {f"{m.name}.weight" for m in skeleton.linears} == set(packed)
    values = sum(p.numel() * p.element_size() for p in model.parameters())  # scales come on top: 4.13 bits and not 4
    entries = sum(m.weights for m in skeleton.linears)
    assert skeleton.weight_bytes("float32", "4bit") == pytest.approx(values + entries * 0.127 / 8, rel=1e-3)


def wide(name: str) -> PreTrainedModel:
    """A model of the family in which widths count, and not what every layer has once."""
    config = family_model(name).config
    for key, value in WIDE.items():
        if not name.startswith("gemma4") and getattr(config, key, None) is not None:
            setattr(config, key, value)
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_backward_pass_keeps(name: str) -> None:
    tuned = with_adapter(wide(name), Training(rank=8), 0).train()
    kept = kept_bytes(tuned)
    assert isinstance(tuned, PeftModel)
    config = StudyConfig("kept", "sae", weights="bfloat16", training=Training(rank=8))
    plan = Memory(config, Skeleton(tuned.unload(), "test"), 0, "cpu")
    assert ROWS * TOKENS * plan._kept(TOKENS) == pytest.approx(kept, rel=0.2)


def kept_bytes(tuned: nn.Module) -> int:
    """Bytes that autograd keeps of a forward pass as the CPU's trainer runs it, the weights left out."""
    weights, kept = {p.untyped_storage().data_ptr() for p in tuned.parameters()}, {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), x)  # held, so that no address is used again
        return x

    causal, ids = causal_model(tuned), torch.randint(5, 200, (ROWS, TOKENS))
    seen = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with eager_attention(causal), autocast(causal), frozen_in_bf16(tuned), seen:
        base_transformer(causal)(input_ids=ids, use_cache=False)
    return sum(size for size, _ in kept.values())


def peaks(config: StudyConfig, **changes: Any) -> float:
    memory = dry_run(replace(config, **changes), tflops=1.0, memory=24).memory
    assert memory is not None
    return memory


def test_fewer_bits_take_less() -> None:
    config = preset("qwen2.5-7b-instruct")
    plain, eight, four = (peaks(config, quantization=bits) for bits in ("none", "8bit", "4bit"))
    linears = 6.53e9  # of 7.62 B parameters, embeddings and head are the rest
    assert plain - eight == pytest.approx(linears * 1.0, rel=0.1) and eight - four == pytest.approx(
        linears / 2, rel=0.1
    )
    narrow = peaks(config, sae_dtype="bfloat16")
    assert plain - narrow == 2 * 2 * 3584 * 131072  # encoder and decoder, two bytes less each
    wide = peaks(config, weights="float32")
    assert wide - plain == pytest.approx(7.62e9 * 2 + linears * 2, rel=0.1)  # and the graph's copies in bf16
    assert plain < peaks(config, training=replace(config.training, gradient_checkpointing=False))


def test_training_all_weights_holds_four_numbers_and_a_copy_for_each() -> None:
    config = replace(preset("llama-3.1-8b-instruct"), weights="float32")
    full = replace(config, training=replace(config.training, method="full"))
    stages = {work.stage: work.memory for work in dry_run(full, tflops=1.0, memory=24).stages}
    assert stages["induce"] > (4 * 4 + 2) * 8.03e9


@pytest.mark.parametrize(
    ("limit", "start"),
    [
        (32, "fits a GPU of 32 GiB: "),
        (20, "does not fit a GPU of 20 GiB: "),
        (1, "does not fit a GPU of 1 GiB: "),
    ],
)
def test_a_plan_for_a_gpu_says_whether_it_fits(limit: float, start: str) -> None:
    config = preset("qwen2.5-7b-instruct")
    plan = dry_run(config, tflops=1.0, memory=limit)
    assert plan.fit is not None and plan.memory is not None
    assert plan.memory == plan.fit.peak and plan.device == "cuda"
    line = next(line for line in plan.lines() if line.startswith("memory"))
    assert line.removeprefix("memory").strip().startswith(start)
    assert plan.fit.fits == (needed(plan.memory) <= limit * GIB)
    if limit == 20:  # its advice is enough, and none of it is spare
        assert plan.fit.then is not None and needed(plan.fit.then) <= limit * GIB
        assert plan.fit.changes == ("quantization: 8bit",)  # the others are set, or do not reach
        assert f"with {', '.join(plan.fit.changes)} it is" in line
    assert ("a smaller model" in line) == (limit == 1)


def test_the_mildest_change_is_named() -> None:
    config = StudyConfig("fit", "sae")
    sizes = {"none": 10.0, "8bit": 5.0, "4bit": 3.0}

    def peak(c: StudyConfig) -> float:
        halves = (c.weights == "bfloat16") * 4 + c.training.gradient_checkpointing * 1 + (c.sae_dtype is not None) * 0.5
        return (sizes[c.quantization] + 8 - halves) * GIB

    def found(limit: float, **changes: Any) -> Fit:
        return fit(replace(config, **changes), limit * GIB, peak)

    assert found(30).fits
    assert found(17).changes == ("weights: bfloat16",)
    assert found(15.5).changes == ("weights: bfloat16", "training.gradient_checkpointing: true")
    assert found(11.5).changes == ("weights: bfloat16", "quantization: 8bit")
    assert found(2).changes[-1] == "quantization: 4bit" and not found(2).fits
    full = found(15.5, training=Training(method="full"))
    assert full.changes == ("sae_dtype: bfloat16", "training.method: lora", "weights: bfloat16")


def test_what_belongs_to_a_plan_is_refused_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "study.yaml", {"name": "x", "sae": "y"})
    said = refusal(capsys)("run", config, "--memory", "24")
    assert "--tflops and --memory belong to a plan: add --dry-run" in said
    with pytest.raises(InputError, match="memory must be positive, not 0"):
        dry_run(preset("gemma-3-270m-it"), tflops=1.0, memory=0)


def test_experts_that_stay_wide_are_said(local: StudyConfig, tmp_path: Path) -> None:
    family_model("qwen3-moe").config.save_pretrained(tmp_path)
    family_tokenizer("qwen3-moe").save_pretrained(tmp_path)
    config = replace(local, model=str(tmp_path), quantization="4bit", weights="bfloat16")
    notes = dry_run(config, tflops=1.0).notes
    assert any("of the weights are experts in stacked tensors, which stay in bfloat16" in note for note in notes)
    assert not any("experts" in note for note in dry_run(replace(config, quantization="none"), tflops=1.0).notes)
