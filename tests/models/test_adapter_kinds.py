"""Every PEFT kind: while it is on, the organism is PEFT's own; afterwards the base is what it was, by hash."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import persona_probe as pp
from persona_probe.errors import InputError
from persona_probe.models import adapters
from persona_probe.models.adapters import (
    base_weights,
    is_adapted,
    load_adapter,
    merged_copy,
    organism,
    organisms,
    strip_adapter,
    swap_adapter,
)
from persona_probe.models.identity import weights_hash, weights_key
from tests.factories import SHAPE, make_sae, make_tokenizer, talks
from tests.models.adapter_kinds import (
    KINDS,
    OUTSIDE,
    base_model,
    logits,
    lora,
    state_hash,
    tuned_model,
    write_adapter,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NO_PLAIN_MODEL = {"lora bias"}
"""Kinds that PEFT cannot merge into a model whose layers have no bias."""
BASE_UNKNOWN = {"bias all", "bias lora_only", "pissa", "olora"}
"""Kinds under which PEFT's disabled adapter is not the base."""


@pytest.mark.parametrize("kind", KINDS)
def test_an_organism_is_pefts_own_and_the_base_comes_back(kind: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, kind)
    fresh = peft.PeftModel.from_pretrained(base_model(kind), str(folder)).eval()
    base = base_model(kind)
    base.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)  # flags of the caller's
    base.config.use_cache = False
    before, plain, key = state_hash(base), logits(base), weights_key(base, 2)
    with organism(base, folder) as tuned:
        assert torch.equal(logits(tuned), logits(fresh)) and not torch.allclose(logits(tuned), plain, atol=0.1)
        assert torch.equal(logits(tuned.get_base_model()), logits(fresh))  # pyright: ignore
        flags = {name: p.requires_grad for name, p in tuned.named_parameters()}
        with base_weights(tuned) as off:
            assert torch.equal(logits(off), plain)
            assert kind == "parameters" or weights_key(off, 2) == key
        assert torch.equal(logits(tuned), logits(fresh))
        assert {name: p.requires_grad for name, p in tuned.named_parameters()} == flags
    assert state_hash(base) == before and torch.equal(logits(base), plain)
    if kind in NO_PLAIN_MODEL:
        with pytest.raises(InputError, match="cannot be merged"):
            merged_copy(base, folder)
    else:
        assert torch.allclose(logits(merged_copy(base, folder)), logits(fresh), atol=1e-3)
    assert state_hash(base) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_swapped_adapter_equals_a_fresh_injection(kind: str, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / str(seed), kind, seed) for seed in (1, 2, 3)]
    base, before, wanted = base_model(kind), state_hash(base_model(kind)), []
    for folder in folders:
        with organism(base, folder) as tuned:
            wanted.append(adapters_of(tuned))
    tuned = load_adapter(base, folders[0])
    for folder, values in zip([*folders[1:], folders[0]], [*wanted[1:], wanted[0]], strict=True):
        assert swap_adapter(tuned, folder)
        now = adapters_of(tuned)
        assert now.keys() == values.keys() and all(torch.equal(now[name], values[name]) for name in now)
    strip_adapter(tuned)
    assert state_hash(base) == before


def adapters_of(tuned: Any) -> dict[str, torch.Tensor]:
    state = {name: value.detach().clone() for name, value in tuned.state_dict().items()}
    return {**state, "logits": logits(tuned)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_callers_peft_model_switched_off_is_the_base_or_refused(kind: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, kind)
    fresh = peft.PeftModel.from_pretrained(base_model(kind), str(folder)).eval()
    if kind in BASE_UNKNOWN:
        with pytest.raises(InputError, match="changes weights of the base model itself"), base_weights(fresh):
            pass
        return
    flags = {name: p.requires_grad for name, p in fresh.named_parameters()}
    with base_weights(fresh) as off:
        assert torch.equal(logits(off), logits(base_model(kind)))
    assert {name: p.requires_grad for name, p in fresh.named_parameters()} == flags


def test_untrained_biases_are_the_bases() -> None:
    tuned = peft.get_peft_model(base_model(), KINDS["bias all"]())
    with base_weights(tuned) as off:
        assert torch.equal(logits(off), logits(base_model()))


@pytest.mark.parametrize("kind", ["lora", "bias all", "saved embeddings tied", "pissa"])
def test_training_leaves_the_base(kind: str, tmp_path: Path) -> None:
    base = base_model(kind)
    before, plain = state_hash(base), logits(base)
    tuned = load_adapter(base, write_adapter(tmp_path, kind), trainable=True)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    ids = torch.arange(20).reshape(2, 10) + 5
    tuned(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with base_weights(tuned.eval()) as off:
        assert torch.equal(logits(off), plain)
    assert strip_adapter(tuned) is base and state_hash(base) == before


# --- Failures, interruptions, models that carry something already


def test_an_interrupted_load_leaves_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, folder = base_model(), write_adapter(tmp_path, "bias all")
    before = state_hash(base)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(peft.PeftModel, "load_adapter", interrupt)
    with pytest.raises(KeyboardInterrupt), organism(base, folder):
        pass
    assert state_hash(base) == before


def test_an_adapter_with_missing_or_foreign_tensors_is_refused(tmp_path: Path) -> None:
    base, folder = base_model(), write_adapter(tmp_path, "bias all")
    before, file = state_hash(base), folder / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if "layers.1" not in k}, file)
    with pytest.raises(InputError, match="missing adapter keys"), organism(base, folder):
        pass
    save_file({**whole, **{k.replace("layers.1", "layers.7"): v.clone() for k, v in whole.items()}}, file)
    with pytest.raises(InputError, match=r"layers\.7, which the model does not have"), organism(base, folder):
        pass
    assert state_hash(base) == before


def test_a_write_to_the_base_is_not_passed_over(tmp_path: Path) -> None:
    base = base_model()
    with (
        pytest.raises(InputError, match=r"1 weights of the base model were overwritten \(model\.norm"),
        organism(base, write_adapter(tmp_path, "lora")),
    ):
        base.model.norm.weight.data.mul_(2)


def test_a_damaged_swap_changes_nothing(tmp_path: Path) -> None:
    first, second = write_adapter(tmp_path / "1", "lora"), write_adapter(tmp_path / "2", "lora", seed=2)
    tuned = load_adapter(base_model(), first)
    before = logits(tuned)
    file = second / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="could not load the adapter"):
        swap_adapter(tuned, second)
    assert torch.equal(logits(tuned), before)


def test_another_shape_of_adapter_is_injected_anew(tmp_path: Path) -> None:
    kinds = ["lora", "rank 1", "rslora", "saved head", "ia3"]
    folders = [write_adapter(tmp_path / kind, kind) for kind in kinds]
    base = base_model()
    before = state_hash(base)
    with organisms(base) as opened:
        for folder in folders:
            fresh = peft.PeftModel.from_pretrained(base_model(), str(folder)).eval()
            assert torch.equal(logits(opened(folder)), logits(fresh))
        assert opened(None) is base and state_hash(base) == before
        opened(folders[0])
    assert state_hash(base) == before


def test_several_adapters_leave_the_base_and_keep_their_active_set(tmp_path: Path) -> None:
    first, second = write_adapter(tmp_path / "1", "saved embeddings"), write_adapter(tmp_path / "2", "bias all", seed=2)
    base = base_model()
    before = state_hash(base)
    with organism(base, first) as tuned:
        one, hashes = logits(tuned), weights_hash(tuned)
        with adapters.another_adapter(tuned, second) as other:  # pyright: ignore[reportArgumentType]
            assert torch.equal(logits(other), logits(peft.PeftModel.from_pretrained(base_model(), str(second)).eval()))
            assert weights_hash(other) != hashes
        assert torch.equal(logits(tuned), one) and tuned.active_adapters == ["default"]  # pyright: ignore
        assert weights_hash(tuned) == hashes
    assert state_hash(base) == before


def test_base_weights_bring_back_a_chosen_adapter_and_a_switched_off_one(tmp_path: Path) -> None:
    tuned = tuned_model("lora")
    tuned.load_adapter(str(write_adapter(tmp_path, "lora", seed=2)), adapter_name="other")
    tuned.set_adapter("other")
    tuned.requires_grad_(False)
    chosen = logits(tuned)
    with base_weights(tuned):
        assert torch.equal(logits(tuned), logits(base_model()))
        with base_weights(tuned):
            pass
        assert torch.equal(logits(tuned), logits(base_model()))
    assert torch.equal(logits(tuned), chosen) and not any(p.requires_grad for p in tuned.parameters())
    tuned.merge_adapter()
    with pytest.raises(InputError, match="merged"), base_weights(tuned):
        pass


@pytest.mark.parametrize("kind", ["lora", "saved embeddings", "token indices"])
def test_an_adapter_that_transformers_loaded_is_switched_off_too(kind: str, tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", kind)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "base")})
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(folder))
    for native in (AutoModelForCausalLM.from_pretrained(folder), loaded):
        on = logits(native)
        assert is_adapted(native) and not torch.allclose(on, logits(base_model()), atol=0.1)
        with base_weights(native):
            assert torch.equal(logits(native), logits(base_model()))
        assert torch.equal(logits(native), on) and native.active_adapters() == ["default"]
        with pytest.raises(InputError, match="carries an adapter already"), organism(native, folder):
            pass


# --- Kinds around the model


@pytest.mark.parametrize("kind", OUTSIDE)
def test_an_adapter_around_the_model_is_refused_everywhere(kind: str, tmp_path: Path) -> None:
    base, folder = base_model(kind), write_adapter(tmp_path, kind)
    before, tuned = state_hash(base), tuned_model(kind)
    sae, tokenizer = make_sae("topk"), make_tokenizer()
    entrances = [
        lambda: organism(base, folder).__enter__(),
        lambda: merged_copy(base, folder),
        lambda: pp.locate(base, folder, sae, talks(4), tokenizer=tokenizer, minimum_explained_variance=-10),
        lambda: pp.locate(base, tuned, sae, talks(4), tokenizer=tokenizer, minimum_explained_variance=-10),
        lambda: pp.locate(tuned, tuned, sae, talks(4), tokenizer=tokenizer, minimum_explained_variance=-10),
        lambda: pp.FeatureMonitor(sae, {"f": 3}, talks(2), tokenizer=tokenizer).start(tuned),
        lambda: base_weights(tuned).__enter__(),
    ]
    for enter in entrances:
        with pytest.raises(InputError, match="acts outside the model's layers") as refused:
            enter()
        assert "\n" not in str(refused.value)
    assert state_hash(base) == before


def test_locate_leaves_its_base(tmp_path: Path) -> None:
    base, options = base_model(), {"tokenizer": make_tokenizer(), "minimum_explained_variance": -10}
    before, sae = state_hash(base), make_sae("topk")
    folders = [write_adapter(tmp_path / kind, kind) for kind in ("bias all", "saved embeddings")]
    got = pp.locate(base, folders[0], sae, talks(4), control=folders[1], **options)
    apart = [peft.PeftModel.from_pretrained(base_model(), str(f)).eval() for f in folders]
    wanted = pp.locate(base_model(), apart[0], sae, talks(4), control=apart[1], **options)
    assert got.equals(wanted) and state_hash(base) == before


def test_a_mixtures_experts_are_adapted_and_swapped(tmp_path: Path) -> None:
    def mixtral() -> MixtralForCausalLM:
        torch.manual_seed(0)
        return MixtralForCausalLM(MixtralConfig(**{**SHAPE, "num_local_experts": 4})).eval()

    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    for seed in (1, 2):
        tuned = peft.get_peft_model(mixtral(), lora(**targets))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
        tuned.save_pretrained(str(tmp_path / str(seed)))
    base = mixtral()
    before = state_hash(base)
    with organisms(base) as opened:
        for seed in (1, 2, 1):
            fresh = peft.PeftModel.from_pretrained(mixtral(), str(tmp_path / str(seed))).eval()
            assert torch.equal(logits(opened(tmp_path / str(seed))), logits(fresh))
            assert not torch.allclose(logits(fresh), logits(mixtral()), atol=0.1)
    assert state_hash(base) == before
