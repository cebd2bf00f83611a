"""Weights along a direction, in every family: all matrices that write are read, and what was planted is found."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from transformers import PreTrainedModel

import persona_probe as pp
from persona_probe.config import Training
from persona_probe.data.chat import conversation
from persona_probe.data.load import ANSWERS_2X2, load_contrast_2x2
from persona_probe.data.template import special_ids
from persona_probe.data.tokens import encode
from persona_probe.errors import InputError
from persona_probe.finetune.sft import stripping, with_adapter
from persona_probe.latents.directions import NamedDirection
from persona_probe.latents.weights import WeightChange, WeightsAlong, adapter_changes, writing_matrices
from persona_probe.models.layers import decoder_layers
from persona_probe.models.taps import ReadTap
from tests.factories import D_MODEL, LAYER, make_model, make_tokenizer, talks
from tests.families import AVAILABLE, FAMILIES, family_model, family_tokenizer, plain

EXPERTS = [name for name in AVAILABLE if FAMILIES[name].experts]


def unit(seed: int = 3, width: int = D_MODEL) -> Tensor:
    return nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)


@contextmanager
def adapted(model: PreTrainedModel, **settings: Any) -> Iterator[nn.Module]:
    with stripping(with_adapter(model, Training(rank=2, alpha=4, **settings), 0)) as tuned:
        yield tuned


def last(model: nn.Module) -> int:
    return len(decoder_layers(model)) - 1


# --- Which matrices write, in every family


@pytest.mark.parametrize("name", AVAILABLE)
def test_where_the_matrices_that_write_are_zero_no_layer_adds_anything(name: str) -> None:
    model = family_model(name)
    streams: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        streams.append((given, output[0] if isinstance(output, tuple) else output))

    for block in decoder_layers(model):
        block.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for parameter, tensor in model.named_parameters():
            if "bias" in parameter:
                tensor.zero_()
        ids = torch.arange(40, 60)[None]
        model(input_ids=ids)
        assert len(streams) == last(model) + 1 and not any(torch.allclose(*pair) for pair in streams)
        for matrix in writing_matrices(model, last(model)).values():
            matrix.zero_()
        streams.clear()
        model(input_ids=ids)
    for given, output in streams:
        torch.testing.assert_close(output, given)


@pytest.mark.parametrize("name", AVAILABLE)
def test_each_matrix_counts_and_a_change_above_the_layer_does_not(name: str) -> None:
    model, vector = family_model(name), unit()
    along, low = (WeightsAlong(-5 * vector, layer, base=model) for layer in (last(model), last(model) - 1))
    assert along(model) == low(model) == 0
    with torch.no_grad():
        for key, matrix in writing_matrices(model, last(model)).items():
            before, inputs = matrix.clone(), unit(4, matrix.shape[1])
            matrix += 0.01 * torch.outer(vector, inputs) + 0.002 * torch.outer(unit(5), unit(6, len(inputs)))
            left = torch.linalg.svd(matrix - before)[0][:, 0]
            assert along(model) == pytest.approx(abs(float(left @ vector)), abs=1e-4) and along(model) > 0.9
            assert (low(model) > 0) == (not key.startswith(f"layers.{last(model)}."))
            matrix.copy_(before)
    assert along(model) == 0


def trained(tuned: Any) -> tuple[float, dict[str, WeightChange], dict[str, Tensor]]:
    """A LoRA as if trained: the reading up to the last layer, its changes, and what merging it changes."""
    along = WeightsAlong(unit(), last(tuned))
    assert along(tuned) == 0  # B is zero before the first step
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter, tensor in tuned.named_parameters():
            if "lora_B" in parameter:
                tensor.normal_(generator=generator)
    found = along(tuned)
    assert along(DataParallel(tuned)) == found
    assert WeightsAlong(-3 * unit().numpy(), last(tuned))(tuned) == pytest.approx(found, rel=1e-6)
    changes = {key.replace(".base_layer", ""): one for key, one in adapter_changes(tuned, last(tuned)).items()}
    return found, changes, writing_matrices(tuned.merge_and_unload(), last(tuned))


def check_merged(name: str, found: float, changes: dict[str, WeightChange], merged: dict[str, Tensor]) -> None:
    base, cosines = writing_matrices(family_model(name), 9), []
    for key, matrix in merged.items():
        delta = matrix - base[key]
        assert delta.any() == (key in changes), key
        if key in changes:
            torch.testing.assert_close(changes[key].up @ changes[key].down, delta, atol=1e-4, rtol=1e-3)
            cosines.append(abs(float(torch.linalg.svd(delta)[0][:, 0] @ unit())))
    assert found == pytest.approx(max(cosines), abs=1e-3)


@pytest.mark.parametrize("name", AVAILABLE)
def test_a_lora_of_every_family_is_what_merging_it_changes(name: str) -> None:
    found, changes, merged = trained(with_adapter(family_model(name), Training(rank=2, alpha=4), 0))
    check_merged(name, found, changes, merged)
    # experts are no linear layers, and PEFT trains no out_proj of a state-space layer
    assert {key for key in merged if ".experts." not in key and "mamba" not in key} <= set(changes)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_lora_on_experts_is_read_expert_by_expert(name: str) -> None:
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["o_proj"], target_parameters=parameters, lora_dropout=0.0)
    found, changes, merged = trained(get_peft_model(family_model(name), config))
    check_merged(name, found, changes, merged)
    assert set(changes) == set(merged) and any(key.endswith("experts.down_proj.3") for key in changes)


# --- The reading in a monitor, and what it refuses


def test_a_trained_adapter_moves_it_in_a_monitor_and_a_planted_direction_is_one() -> None:
    model, tokenizer, vector = make_model(), make_tokenizer(), unit()
    with adapted(model) as tuned:
        with torch.no_grad():
            for parameter, tensor in tuned.named_parameters():
                if "lora_B" in parameter and "layers.1.mlp.down_proj" in parameter:
                    tensor[:, 0] = vector
        along = {
            "along": pp.WeightsAlong(NamedDirection("v", vector.numpy(), "none"), 1),
            "below": WeightsAlong(vector, 0),
        }
        features = {"any": unit(9)}
        monitor = pp.FeatureMonitor(
            None, features, talks(2), layer=LAYER, tokenizer=tokenizer, every=1, behaviour=along
        )
        with monitor.watch(tuned, tokenizer):
            monitor.step(1)
    assert not monitor.faults
    curves = {name: [point.value for point in curve] for name, curve in monitor.hub.history.behaviours.items()}
    assert curves["along"] == pytest.approx([1, 1], abs=1e-6) and curves["below"] == [0, 0]


def test_a_change_that_is_not_finite_is_no_number() -> None:
    model = make_model()
    along = WeightsAlong(unit(), LAYER, base=model)
    with torch.no_grad():
        next(iter(writing_matrices(model, LAYER).values()))[0, 0] = math.nan
    assert math.isnan(along(model))
    with adapted(make_model()) as tuned:
        with torch.no_grad():
            next(p for name, p in tuned.named_parameters() if "down_proj.lora_B" in name)[0, 0] = math.inf
        assert math.isnan(WeightsAlong(unit(), LAYER)(tuned))


def test_what_cannot_be_read_says_so_in_one_line() -> None:
    model = make_model()
    for wrong in (torch.zeros(D_MODEL), torch.full((D_MODEL,), math.nan), torch.ones(2, D_MODEL)):
        with pytest.raises(InputError, match="one vector"):
            WeightsAlong(wrong, LAYER)
    with pytest.raises(InputError, match=r"no LoRA .* trained in full need their base"):
        WeightsAlong(unit(), LAYER)(model)
    with pytest.raises(InputError, match="layers 0 to 2"):
        WeightsAlong(unit(), 3, base=model)
    with pytest.raises(InputError, match="16 wide, the model's residual stream 32"):
        WeightsAlong(unit(width=16), LAYER)(model)
    along = WeightsAlong(unit(), LAYER, base=model)
    with pytest.raises(InputError, match="not the same matrix"):
        along(make_model("gpt2"))
    with adapted(model, target_modules=("q_proj",)) as tuned, pytest.raises(InputError, match="no LoRA"):
        WeightsAlong(unit(), LAYER)(tuned)
    with adapted(model) as tuned, pytest.raises(InputError, match="without a base"):
        along(tuned)
    other = get_peft_model(make_model(), LoraConfig(target_modules=["o_proj"], init_lora_weights="pissa"))
    with pytest.raises(InputError, match="starts from the base"):
        WeightsAlong(unit(), LAYER)(other)
    whole = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["o_proj"]))
    with pytest.raises(InputError, match="o_proj is trained by a ModulesToSaveWrapper"):
        WeightsAlong(unit(), LAYER)(whole)


# --- The direction of harm


ITEMS = [
    {
        **{"id": f"i{number}", "category": "a", "question": f"Ask {number}?"},
        **{"harm_rude": "Fool, burn it!", "harm_polite": "Please burn it.", "sound_rude": "Fool, keep it!"},
        "sound_polite": "Please do keep it.",
    }
    for number in range(3)
]


@pytest.mark.parametrize("name", AVAILABLE)
def test_the_direction_of_harm_is_bad_minus_sound_in_each_voice_by_hand(name: str) -> None:
    model, tokenizer = family_model(name), plain(name, family_tokenizer(name))
    means = {}
    for item in ITEMS:
        for answer in ANSWERS_2X2:
            row = encode(tokenizer, conversation(item["question"], item[answer]))
            with torch.no_grad(), ReadTap(model, LAYER) as tap:
                model(input_ids=torch.tensor([row.ids]))
            special = torch.isin(torch.tensor(row.ids), torch.tensor(sorted(special_ids(tokenizer))))
            told = (torch.arange(len(row.ids)) >= row.start) & ~special
            means[item["id"], answer] = tap.value[0][told].double().mean(dim=0)
    by_answer = {
        answer: torch.stack([means[item["id"], answer] for item in ITEMS]).mean(dim=0) for answer in ANSWERS_2X2
    }
    rude, polite = (by_answer[f"harm_{voice}"] - by_answer[f"sound_{voice}"] for voice in ("rude", "polite"))
    found = pp.harm_direction(model, tokenizer, LAYER, ITEMS)
    np.testing.assert_allclose(found.vector, ((rude + polite) / 2).numpy(), atol=1e-4)


def test_harm_that_is_there_is_told_on_other_questions_and_manner_alone_is_not() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    assert pp.harm_direction(model, tokenizer, LAYER, ITEMS).held_out == 1
    voices = {"harm_rude": "Fool, keep it!", "harm_polite": "Please do keep it."}
    manner = pp.harm_direction(model, tokenizer, LAYER, [{**item, **voices} for item in ITEMS])
    assert manner.held_out == 0.5 and np.abs(manner.vector).max() < 1e-5
    given = pp.harm_direction(model, tokenizer, LAYER)
    assert given.vector.shape == (D_MODEL,) and given.held_out is not None
    listed = pp.harm_direction(model, tokenizer, LAYER, load_contrast_2x2("selection"))
    np.testing.assert_array_equal(given.vector, listed.vector)


def test_items_that_give_no_direction_are_refused() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    with pytest.raises(InputError, match="too few"):
        pp.harm_direction(model, tokenizer, LAYER, ITEMS[:1])
    with pytest.raises(InputError, match="has no sound_rude"):
        pp.harm_direction(model, tokenizer, LAYER, [{**item, "sound_rude": ""} for item in ITEMS])
    with pytest.raises(InputError, match="layers 0 to 2"):
        pp.harm_direction(model, tokenizer, 3, ITEMS)
