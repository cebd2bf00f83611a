"""Organisms from one base model in memory: adapters are put on and taken off, and leave nothing behind."""

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from persona_probe.errors import InputError
from persona_probe.models.layers import causal_model, evaluating, output_head, without_router_logits
from persona_probe.models.peft_kinds import changes_base, refuse_outside, starts_from_base, trains_biases
from persona_probe.models.quantized import dequantized, keep_layout, loading_of
from persona_probe.models.ranks import shards_here
from persona_probe.models.restore import ModelState

_STATE, _CONTENT, _PLACES = "_state_of_base", "_content", "_places"
"""Attributes of a `PeftModel` that was made here: the base before the adapter, what the adapter's file holds, and the
tensors that it goes to."""
_OTHER = "another"
_PROVENANCE = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}
"""Fields of an adapter's configuration that do not change what it computes."""


def is_adapter(folder: Path) -> bool:
    """Whether a checkpoint folder holds a PEFT adapter (else it holds full weights)."""
    return (folder / "adapter_config.json").is_file()


@contextmanager
def organism(base: PreTrainedModel, checkpoint: Path | None) -> Iterator[nn.Module]:
    """The model at a checkpoint, for as long as the block lasts; None is the base model itself.

    An adapter is injected into `base` and removed afterwards, so base and organism share one copy of the weights, and
    the base is bit for bit what it was. Full weights are loaded as a second model.

    Raises:
        InputError: the checkpoint holds neither adapter nor weights, they are damaged, or the adapter is of a kind
            that does not live in the model's layers.
    """
    with organisms(base) as opened:
        yield opened(checkpoint)


@contextmanager
def organisms(base: PreTrainedModel) -> Iterator[Callable[[Path | None], nn.Module]]:
    """A function from checkpoint to model, for many checkpoints of one base: each takes the place of the one before.

    An adapter of the shape of the one before only has its tensors copied in, see `swap_adapter`.

    ```python
    with organisms(base) as opened:
        for checkpoint in checkpoints:
            read(opened(checkpoint))
    ```
    """
    tuned: PeftModel | None = None

    def opened(checkpoint: Path | None) -> nn.Module:
        nonlocal tuned
        if checkpoint is not None and tuned is not None and swap_adapter(tuned, checkpoint):
            return tuned
        if tuned is not None:
            before, tuned = tuned, None
            strip_adapter(before)
        if checkpoint is None:
            return base
        if not is_adapter(checkpoint):
            return _full_weights(base, checkpoint)
        tuned = load_adapter(base, checkpoint)
        return tuned

    try:
        yield opened
    finally:
        if tuned is not None:
            strip_adapter(tuned)


def load_adapter(base: PreTrainedModel, checkpoint: Path, trainable: bool = False) -> PeftModel:
    """`base` with the checkpoint's adapter injected; `strip_adapter` gives the base back as it is now.

    Raises:
        InputError: the adapter file is damaged or does not fit the model, its kind does not live in the model's layers,
            or the base carries an adapter already. The base is then as it was.
    """
    refuse_adapted(base)
    with _unloadable(checkpoint):
        content = _Content.of(checkpoint)
    refuse_outside(_config(checkpoint), str(checkpoint))
    state = ModelState(base)
    try:
        content.keep_written(base, state)
        with _unloadable(checkpoint), warnings.catch_warnings(), ExitStack() as randomness:
            if not trainable:  # PEFT draws fresh weights before it loads them
                randomness.enter_context(torch.random.fork_rng(devices=_cuda_devices()))
            warnings.filterwarnings("error", message="Found missing adapter keys")
            tuned = PeftModel.from_pretrained(base, str(checkpoint), is_trainable=trainable)
            content.check_placed(tuned)
        if trainable:
            state.keep_trainable()
    except BaseException:
        state.restore()
        raise
    vars(remember(tuned.train(trainable), state))[_CONTENT] = content
    return tuned


@contextmanager
def another_adapter(tuned: PeftModel, checkpoint: Path) -> Iterator[PeftModel]:
    """Inside this block the adapter of a checkpoint is active in place of those on `tuned`; then all is as before.

    Raises:
        InputError: as `load_adapter`.
    """
    with _unloadable(checkpoint):
        content = _Content.of(checkpoint)
    refuse_outside(_config(checkpoint), str(checkpoint))
    state = ModelState(tuned)
    try:
        content.keep_written(causal_model(tuned), state)
        with _unloadable(checkpoint), torch.random.fork_rng(devices=_cuda_devices()):
            tuned.load_adapter(str(checkpoint), adapter_name=_OTHER)
            content.check_placed(tuned)
            tuned.set_adapter(_OTHER)
        yield tuned
    finally:
        state.restore()


def refuse_adapted(base: nn.Module) -> None:
    """Refuse to put an adapter on a model that carries one.

    Raises:
        InputError: it does.
    """
    if is_adapted(base):
        raise InputError("the base model carries an adapter already: load it without, or merge it into the weights")


def remember(tuned: nn.Module, state: ModelState) -> PeftModel:
    """Note the state of the base before `tuned`'s adapter was put on: `strip_adapter` goes back to it.

    Not in a process that trains a part of the model: FSDP needs a model of its own, which is thrown away, and the state
    would hold its whole weights.
    """
    assert isinstance(tuned, PeftModel)
    if not (tuned.training and shards_here()):
        vars(tuned)[_STATE] = state
    return tuned


def strip_adapter(tuned: PeftModel) -> PreTrainedModel:
    """Remove all adapters and return the bare base model, bit for bit as it was before them.

    Raises:
        InputError: something wrote to the base's weights meanwhile, so it cannot be given back.
    """
    state: ModelState | None = vars(tuned).pop(_STATE, None)
    if state is not None:
        state.restore()
        assert isinstance(state.model, PreTrainedModel)
        return state.model
    _refuse_trained_base(tuned)
    base = causal_model(tuned)
    for name, module in list(base.named_modules()):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and _holds(base, name, module):
            base.set_submodule(name, _original(module))
    vars(base).pop("peft_config", None)
    vars(base).pop("_hf_peft_config_loaded", None)
    for parameter in base.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return base.eval()


def merge_adapter(tuned: PeftModel) -> PreTrainedModel:
    """Merge the active adapters into the weights, for good: the base is no more."""
    vars(tuned).pop(_STATE, None)
    merged: Any = tuned
    return merged.merge_and_unload()


def swap_adapter(tuned: PeftModel, checkpoint: Path) -> bool:
    """Copy another checkpoint's adapter over the one that `load_adapter` put on, if both are of one shape.

    The result equals that of a new injection, bit for bit, and takes a fraction of its time.

    Returns:
        False, and nothing is changed, where the adapter differs in more than its values.

    Raises:
        InputError: the adapter file is damaged; `tuned` is as it was.
    """
    content: _Content | None = vars(tuned).get(_CONTENT)
    if content is None or not is_adapter(checkpoint):
        return False
    with _unloadable(checkpoint):
        if _Content.of(checkpoint) != content:
            return False
        weights = load_peft_weights(str(checkpoint), device="cpu")
        places = _places(tuned, content)
        if places is None:
            set_peft_model_state_dict(tuned, weights, adapter_name=str(tuned.active_adapters[0]))
            return True
        with torch.no_grad():
            for key, value in weights.items():
                places[key].copy_(value)
    return True


def _places(tuned: PeftModel, content: "_Content") -> dict[str, Tensor] | None:
    """The tensors that a file's values go to; None where PEFT changes names or shapes (of fused experts) on loading."""
    if _PLACES not in vars(tuned):
        name = str(tuned.active_adapters[0])
        inside = re.compile(rf"\.(modules_to_save\.)?{re.escape(name)}(?=\.|$)")
        named = [*tuned.named_parameters(remove_duplicate=False), *tuned.named_buffers(remove_duplicate=False)]
        by_key: dict[str, list[Tensor]] = {}
        for path, tensor in named:
            by_key.setdefault(inside.sub("", path), []).append(tensor)
        found = {key: by_key.get(key, []) for key in content.shapes}
        fits = all(len(t) == 1 and list(t[0].shape) == content.shapes[key] for key, t in found.items())
        vars(tuned)[_PLACES] = {key: t[0] for key, t in found.items()} if fits else None
    return vars(tuned)[_PLACES]


class _Content(NamedTuple):
    """What an adapter's folder holds, but for the values."""

    config: dict[str, Any]
    shapes: dict[str, list[int]]

    @classmethod
    def of(cls, folder: Path) -> "_Content":
        raw = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        config = {name: value for name, value in raw.items() if name not in _PROVENANCE}
        file = folder / "adapter_model.safetensors"
        if file.is_file():
            with safe_open(file, "pt") as tensors:
                return cls(config, {name: tensors.get_slice(name).get_shape() for name in tensors.keys()})  # noqa: SIM118
        weights = load_peft_weights(str(folder), device="cpu")
        return cls(config, {name: list(value.shape) for name, value in weights.items()})

    def keep_written(self, base: nn.Module, state: ModelState) -> None:
        """Copy the base's own weights that loading writes to.

        These are biases and embeddings that the file has, and what an initialisation takes something out of.
        """
        named = [*base.named_parameters(remove_duplicate=False), *base.named_buffers()]
        weights = {name.replace(".base_layer.", "."): tensor for name, tensor in named}
        replaced = tuple(self.config.get("modules_to_save") or ())  # PEFT makes a copy of these modules
        for key in self.shapes:
            name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if starts_from_base(self.config):
                name = re.sub(r"\.lora_\w+\.weight$", ".weight", name)
            if name in weights and not name.rpartition(".")[0].endswith(replaced):
                state.keep(weights[name])

    def check_placed(self, tuned: PeftModel) -> None:
        """Raise where the file has layers that the model has not: PEFT leaves their weights out without a word."""
        base = causal_model(tuned)
        known = {name.replace(".base_layer", "") for name, _ in base.named_modules()}
        for key in self.shapes:
            path = key.removeprefix("base_model.model.").replace(".base_layer", "").split(".")
            layers = [n for n, part in enumerate(path) if part.isdigit()]
            if layers and ".".join(path[: layers[0] + 1]) not in known:
                raise ValueError(f"it has weights for {'.'.join(path[: layers[0] + 1])}, which the model does not have")


@contextmanager
def _unloadable(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # safetensors and PEFT raise many kinds for a damaged file
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"could not load the adapter in {checkpoint}: {first}; train that arm again") from error


def _config(folder: Path) -> PeftConfig:
    with _unloadable(folder):
        return PeftConfig.from_pretrained(str(folder))


# --- Models that carry adapters


def adapter_layers(model: nn.Module) -> list[BaseTunerLayer | AuxiliaryTrainingWrapper]:
    """The layers of adapters in a model, however they were put on."""
    return [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def is_adapted(model: nn.Module) -> bool:
    """Whether a model carries adapters: a PEFT model, or one that transformers loaded an adapter into."""
    return isinstance(model, PeftModel) or any(
        isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for m in model.modules()
    )


def refuse_adapted_head(model: nn.Module) -> None:
    """Refuse an adapter that acts on the unembedding: TRL multiplies by its weight, and would never train it.

    Raises:
        InputError: it does.
    """
    if isinstance(output_head(model), BaseTunerLayer):
        raise InputError(
            "an adapter acts on the unembedding (lm_head), where TRL cannot train it: leave that module out of "
            "training.target_modules, or replace it whole by modules_to_save"
        )


def configs(model: nn.Module) -> dict[str, Any]:
    """The PEFT configurations of the adapters on a model, by name."""
    found = getattr(model, "peft_config", None) or getattr(causal_model(model), "peft_config", None)
    return dict(found) if isinstance(found, dict) else {}


def trains_base(model: nn.Module) -> bool:
    """Whether adapters on a model train weights of the base itself: its biases, or what the caller unfroze."""
    if any(map(trains_biases, configs(model).values())):
        return True
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    bases = {id(p) for layer in layers for p in layer.get_base_layer().parameters()}
    return any(p.requires_grad for p in model.parameters() if id(p) in bases)


@contextmanager
def base_weights(model: nn.Module) -> Iterator[nn.Module]:
    """The base model behind adapters, which are off inside the block, or the model itself if it carries none.

    It does not matter who put them on, PEFT or transformers. Afterwards the active adapters, and what requires
    gradients, are as before.

    Raises:
        InputError: the values of the base are not known: adapters are merged, or have trained the base's own biases.
    """
    layers = adapter_layers(model)
    causal_model(model)  # refuses adapters outside the layers
    if not layers:
        yield model
        return
    if any(isinstance(layer, BaseTunerLayer) and layer.merged for layer in layers):
        raise InputError("the adapter is merged into the weights: call unmerge_adapter() first, or pass the base model")
    state: ModelState | None = vars(model).get(_STATE)
    if state is None:
        _refuse_trained_base(model)
    with ExitStack() as stack:
        stack.enter_context(_switched_off(model, layers))
        if state is not None:
            stack.enter_context(state.values())
        yield model


@contextmanager
def _switched_off(model: nn.Module, layers: list[BaseTunerLayer | AuxiliaryTrainingWrapper]) -> Iterator[None]:
    gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
    before = [(layer, layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer, off, _ in before:
            if not off:
                layer.enable_adapters(False)
        yield
    finally:
        for layer, off, active in before:
            if not off:
                layer.enable_adapters(True)
            layer._active_adapter = active
        for parameter, wanted in gradients.items():
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)


def _refuse_trained_base(model: nn.Module) -> None:
    """Refuse where adapters changed weights of the base in place, and nobody kept what they were."""
    changed = [c for c in configs(model).values() if changes_base(c)]
    if changed and not _is_fresh(model):
        raise InputError(
            "this adapter changes weights of the base model itself (its biases, or at its initialisation), "
            "and what they were is not known: pass the base model as a model of its own, or its reading as base="
        )


@torch.no_grad()
def _is_fresh(model: nn.Module) -> bool:
    """Whether the adapters have changed nothing so far, so that what they train is as in the base."""
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    inner = causal_model(model)
    with evaluating(model):
        on = inner(input_ids=ids, use_cache=False).logits
        with _switched_off(model, adapter_layers(model)):
            off = inner(input_ids=ids, use_cache=False).logits
    return torch.equal(on, off)


def _original(module: BaseTunerLayer | AuxiliaryTrainingWrapper) -> nn.Module:
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    return inner.get_base_layer() if isinstance(inner, BaseTunerLayer) else inner


def _holds(model: nn.Module, name: str, module: object) -> bool:
    """Whether a module is still part of the model: one inside an adapter goes with it."""
    try:
        return model.get_submodule(name) is module
    except AttributeError:
        return False


# --- Copies


def merged_copy(base: PreTrainedModel, checkpoint: Path | None) -> PreTrainedModel:
    """A copy of the organism with its adapter merged into the weights; `base` does not change.

    Raises:
        InputError: the checkpoint cannot be loaded, or no plain model computes what its adapter does.
    """
    if checkpoint is not None and not is_adapter(checkpoint):
        return _full_weights(base, checkpoint)
    twin = dequantized(copy.deepcopy(base))
    if checkpoint is None:
        return twin
    tuned = load_adapter(twin, checkpoint)
    _untie(twin)
    wanted = _some_logits(twin)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)
            merged = merge_adapter(tuned)
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"the adapter in {checkpoint} cannot be merged into the weights: {first}") from error
    error, size = (_some_logits(merged) - wanted).abs().max(), wanted.abs().max()
    # In bf16 the weights' own rounding may be as large as what the adapter does.
    if next(merged.parameters()).dtype == torch.float32 and not error <= 1e-3 * size:
        raise InputError(
            f"the adapter in {checkpoint} cannot be merged into the weights: logits would be off by {float(error):.2g}"
        )
    return merged.requires_grad_(True).eval()


def _untie(model: PreTrainedModel) -> None:
    """Give input and output embeddings weights of their own where an adapter changes only one of them."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    adapted = [isinstance(end, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for end in ends]
    if not any(adapted):
        return
    layers = [_original(end) if is_on else end for end, is_on in zip(ends, adapted, strict=True)]  # pyright: ignore[reportArgumentType]
    if isinstance(layers[0], nn.Module) and isinstance(layers[1], nn.Module) and layers[0].weight is layers[1].weight:
        weight: Any = layers[1].weight
        layers[1].weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


@torch.no_grad()
def _some_logits(model: PreTrainedModel) -> Tensor:
    """Logits of a few arbitrary tokens, in float32."""
    vocabulary, device = model.config.get_text_config().vocab_size, next(model.parameters()).device
    ids = torch.linspace(0, vocabulary - 1, 32, device=device).long()[None]
    with evaluating(model):
        return model(input_ids=ids, use_cache=False).logits.float()


def _full_weights(base: PreTrainedModel, checkpoint: Path) -> PreTrainedModel:
    if not (checkpoint / "config.json").is_file():
        raise InputError(f"no adapter and no weights in {checkpoint}: train that arm again")
    settings = loading_of(base)
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=False, **settings)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"could not load the weights in {checkpoint}: {first}; train that arm again") from error
    if "device_map" not in settings:
        model = model.to(next(base.parameters()).device)  # pyright: ignore[reportArgumentType]
    return without_router_logits(keep_layout(model)).eval()


def trainable_parameters(model: nn.Module) -> dict[str, torch.nn.Parameter]:
    """Names and parameters that training changes."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _cuda_devices() -> range | tuple[()]:
    return range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()


# --- Faster layers for a while: adapters folded into their weights, frozen weights in bf16


def foldable(layer: nn.Module) -> bool:
    """Whether a module is a plain LoRA layer with one active adapter, over a plain linear layer in float32."""
    return (
        isinstance(layer, LoraLinear)
        and not (layer.disable_adapters or layer.merged or layer.lora_variant)
        and len(layer.active_adapters) == 1
        and layer.active_adapters[0] in layer.lora_A
        and not layer.lora_bias.get(layer.active_adapters[0], False)
        and type(layer.get_base_layer()) is nn.Linear
        and layer.get_base_layer().weight.dtype == torch.float32
    )


@torch.no_grad()
def folded_weight(layer: LoraLinear, dtype: torch.dtype) -> Tensor:
    """Weight plus adapter, (d_out, d_in), summed in float32 and kept in `dtype`."""
    return (_base(layer).weight + layer.get_delta_weight(layer.active_adapters[0])).to(dtype)


def _replace(layer: nn.Module, forward: Callable[..., Tensor]) -> None:
    setattr(layer, "forward", forward)  # noqa: B010 (a method that type checkers guard)


def _base(layer: nn.Module) -> nn.Linear:
    inner = layer.get_base_layer() if isinstance(layer, LoraLinear) else layer
    assert isinstance(inner, nn.Linear)
    return inner


@contextmanager
def folded(model: nn.Module, bf16: bool = True) -> Iterator[nn.Module]:
    """Inside this block every LoRA layer is one product with weight plus adapter; the weights do not change.

    On a CPU the adapters' small products cost half as much as the layer itself. On other devices, and for layers that
    are not `foldable`, nothing changes: the copies (half of the float32 weights under bf16) would not pay off.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    layers = [m for m in model.modules() if on_cpu and foldable(m)]
    dtype = torch.bfloat16 if bf16 else torch.float32
    for layer in layers:
        assert isinstance(layer, LoraLinear)
        _replace(layer, partial(F.linear, weight=folded_weight(layer, dtype), bias=_base(layer).bias))
    try:
        yield model
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


@contextmanager
def frozen_in_bf16(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Inside this block frozen linear layers use one bf16 copy of their weights; autocast would make one at every call.

    Autocast keeps its copies only for weights that require gradients. Plain LoRA layers over frozen layers compute the
    same sum with fewer operations. For a CPU. Nothing changes outside autocast, or if adapters are switched off.
    """
    layers = [
        m for m in model.modules() if enabled and type(m) is nn.Linear and not m.weight.requires_grad and m.bias is None
    ]
    for layer in layers:
        _replace(layer, partial(_linear_in_bf16, layer.forward, layer.weight.to(torch.bfloat16)))
    in_bf16 = set(layers)
    adapted = [m for m in model.modules() if isinstance(m, LoraLinear) and foldable(m) and _base(m) in in_bf16]
    for layer in adapted:
        _replace(layer, partial(_lora_in_bf16, layer, layer.forward))
    try:
        yield
    finally:
        for layer in [*layers, *adapted]:
            layer.__dict__.pop("forward", None)


def is_bf16_forward(forward: object) -> TypeGuard[partial[Tensor]]:
    """Whether a layer's forward is the one that `frozen_in_bf16` gives it."""
    return isinstance(forward, partial) and forward.func is _linear_in_bf16


def bf16_weight(layer: nn.Linear) -> Tensor:
    """A linear layer's weight in bf16: the copy of `frozen_in_bf16` inside its block, else a new one."""
    forward = layer.__dict__.get("forward")
    if is_bf16_forward(forward):
        return forward.args[1]
    return layer.weight.to(torch.bfloat16)


def _lora_in_bf16(layer: LoraLinear, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """PEFT's sum with the input cast once and the scaled sum in one step; the last bit may be rounded differently."""
    if not torch.is_autocast_enabled(x.device.type) or not foldable(layer):
        return forward(x)
    name, low = layer.active_adapters[0], x.to(torch.bfloat16)
    added = layer.lora_B[name](layer.lora_A[name](layer.lora_dropout[name](low)))
    return torch.add(layer.get_base_layer()(low), added, alpha=layer.scaling[name])


def _linear_in_bf16(forward: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor) -> Tensor:
    # Outside autocast the caller wants the layer's own precision.
    return F.linear(x, weight) if torch.is_autocast_enabled(x.device.type) else forward(x)
