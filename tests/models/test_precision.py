"""A model in a format of few bits: what is rounded, what comes back, and what is left of a fine-tune."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from persona_probe.errors import InputError
from persona_probe.models.formats import FORMATS
from persona_probe.models.precision import agreement_with_library, in_format, linear_layers, on_grid
from tests.factories import copied_state, hook_count, make_family, make_model, same_state


def ids() -> torch.Tensor:
    return torch.arange(2, 42).reshape(2, 20)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def nudged(base: nn.Module, size: float, seed: int = 5) -> nn.Module:
    """A copy whose linear weights are changed a little, as a fine-tune does."""
    tuned, draw = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in linear_layers(tuned):
            layer.weight.add_(size * torch.randn(layer.weight.shape, generator=draw))
    return tuned


def put_on_grid(model: nn.Module, name: str) -> nn.Module:
    """The model as it is read from a file in that format."""
    with torch.no_grad():
        for layer in linear_layers(model):
            layer.weight.copy_(FORMATS[name].weights(layer.weight.float()))
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_only_linear_weights_of_the_decoder_are_rounded_and_all_comes_back(architecture: str) -> None:
    model = make_model(architecture)
    before, untouched = copied_state(model), logits(model)
    with in_format(model, FORMATS["nf4"]) as change:
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {f"{n}.weight" for n, m in model.named_modules() if m in linear_layers(model)}
        assert not any("embed" in name or "lm_head" in name or "norm" in name for name in changed)
        assert not torch.allclose(logits(model), untouched)
        assert 0 < change.parameters < 1 and math.isnan(change.kept)
    assert same_state(copied_state(model), before) and torch.equal(logits(model), untouched)


def test_gpt2s_transposed_weights_are_rounded_along_their_inputs() -> None:
    model = make_model("gpt2")
    layer = next(one for one in linear_layers(model) if isinstance(one, Conv1D))
    wanted = FORMATS["int8"].weights(layer.weight.detach().T).T
    with in_format(model, FORMATS["int8"]):
        assert torch.equal(layer.weight, wanted)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = make_model()
    before = copied_state(model)
    with pytest.raises(RuntimeError), in_format(model, FORMATS["mxfp4"], activations=True):
        raise RuntimeError
    assert same_state(copied_state(model), before) and hook_count(model) == 0


def test_the_reference_changes_nothing() -> None:
    model = make_model()
    untouched = logits(model)
    with in_format(model, FORMATS["none"], activations=True) as change:
        assert torch.equal(logits(model), untouched) and hook_count(model) == 0
        assert change.noise != change.noise  # nothing to compare with


def test_activations_are_what_the_layers_then_compute_with() -> None:
    """With one linear layer as the model's last, its output is that of rounded weights times rounded inputs."""
    model, form = make_model(), FORMATS["int4"]
    layer = linear_layers(model)[0]
    assert isinstance(layer, nn.Linear) and form.activations is not None
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with in_format(model, form, activations=True):
        handle = layer.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))  # pyright: ignore[reportArgumentType]
        logits(model)
        handle.remove()
        x, out = seen[0]
        assert torch.equal(x, form.activations(x)) and torch.allclose(out, x @ layer.weight.T)
    assert hook_count(model) == 0
    with pytest.raises(InputError, match="weights alone"), in_format(model, FORMATS["nf4"], activations=True):
        pass


def test_eight_bits_keep_what_the_model_says_and_three_do_not() -> None:
    model = make_model()
    untouched = logits(model).log_softmax(-1)
    error = {}
    for name in ("int8", "fp8", "hif8", "nf4", "int3"):
        with in_format(model, FORMATS[name]):
            error[name] = float((logits(model).log_softmax(-1) - untouched).abs().mean())
    assert max(error["int8"], error["fp8"], error["hif8"]) < error["nf4"] < error["int3"]


# --- The trap: a format whose grid the base lies on already


def test_requantising_on_the_bases_own_grid_erases_the_fine_tune() -> None:
    """What a GGUF's users do: the base was read from Q4_1, and its merged fine-tune is written to Q4_1 again."""
    base = put_on_grid(make_model(), "q4_1")
    tuned = nudged(base, 2e-3)
    assert on_grid(base, FORMATS["q4_1"]) and not on_grid(base, FORMATS["nf4"]) and not on_grid(tuned, FORMATS["q4_1"])
    with in_format(tuned, FORMATS["q4_1"], base=base) as change:
        assert change.erased and abs(change.kept) < 0.2
        left = logits(tuned) - logits(base)
    shift = logits(tuned) - logits(base)
    assert float((left * shift).sum() / shift.square().sum()) < 0.4  # of what the fine-tune did to the answers
    for name in ("nf4", "mxfp4", "nvfp4", "hif4", "int8", "fp8"):
        with in_format(tuned, FORMATS[name], base=base) as change:
            assert not change.erased, name


def test_a_base_off_the_grid_keeps_its_fine_tune_in_the_same_format() -> None:
    base = make_model()
    tuned = nudged(base, 2e-3)
    with in_format(tuned, FORMATS["q4_1"], base=base) as change:
        assert not change.erased and change.noise > 1  # noise larger than the change, yet the change is in it


def test_the_whole_change_is_kept_where_nothing_is_rounded() -> None:
    base = make_model()
    with in_format(nudged(base, 0.01), FORMATS["none"], base=base) as change:
        assert change.kept == pytest.approx(1) and change.noise == 0 and not change.erased


@pytest.mark.parametrize("family", ["mixtral", "qwen3", "gemma2"])
def test_other_families_have_linear_layers_too(family: str) -> None:
    model = make_family(family)
    model = model[0] if isinstance(model, tuple) else model
    with in_format(model, FORMATS["int8"]) as change:
        assert 0 < change.parameters <= 1


def test_a_model_with_an_adapter_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="merge the adapter"), in_format(model, FORMATS["int8"]):
        pass


def test_a_library_is_asked_about_a_weight_of_the_model() -> None:
    model = make_model(seed=1)
    layers = linear_layers(model)
    share = agreement_with_library(layers, FORMATS["hif4"])
    assert math.isnan(share)
