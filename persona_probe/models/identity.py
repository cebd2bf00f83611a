"""Hashes that say which model computes something: up to a layer, as a whole, or by a quick look at its weights."""

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from types import MethodType

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from persona_probe.models.layers import base_transformer, decoder_layer, decoder_layers, output_head, transformer_config
from persona_probe.models.quantized import PARAMETERS, scales
from persona_probe.models.taps import ReadTap, Tap

NO_SETTINGS = {
    *vars(nn.Module()),
    "gradient_checkpointing",
    "_hf_peft_config_loaded",
    "_is_hf_initialized",
    "_output_capturing_hooks_installed",
    "name_or_path",
}
"""Attributes of a module that do not change its output in eval mode: bookkeeping of torch and transformers."""
NO_CONFIG = {"_name_or_path", "architectures", "dtype", "use_cache"}
"""The same for a model's configuration: equal weights from two folders have one key. Tensors carry their dtype."""
_VALUES = 256
"""Values of each weight that `weights_hash` reads: training moves nearly all values, and hashing all takes long."""


def weights_key(model: nn.Module, layer: int) -> str:
    """SHA-256 of everything that decides the output of `layer`, hexadecimal.

    The key covers the raw bytes of all parameters and buffers of the transformer up to `layer`, each module's type and
    settings (an adapter's scale, whether it is on), and the configuration with the attention kernel. An adapter that is
    off does not count, so a base model keeps its key whatever was injected into it. Of a layer whose adapter is folded
    in, the folded weight counts. Hashing takes about a second per gigabyte.

    Raises:
        InputError: the model has no such layer.
    """
    config = transformer_config(model)
    values = {name: value for name, value in config.to_dict().items() if name not in NO_CONFIG}
    digest = hashlib.sha256(as_bytes([values, config._attn_implementation, torch.__version__]))
    for name, module in _running(model, layer):
        settings = {key: value for key, value in vars(module).items() if key not in NO_SETTINGS}
        digest.update(as_bytes([name, type(module).__qualname__, settings]))
        for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            for tensor_name, tensor in tensors:
                add_tensor(digest, tensor_name, tensor)
        for scale_name, scale in scales(module).items():
            add_tensor(digest, scale_name, scale)
    return digest.hexdigest()


def model_key(model: nn.Module) -> str:
    """SHA-256 of everything that decides a model's next-token probabilities: transformer, adapters and head."""
    digest = hashlib.sha256(weights_key(model, len(decoder_layers(model)) - 1).encode())
    for name, tensor in sorted(output_head(model).state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """A quick hash (16 hexadecimal digits) of names, shapes and evenly spaced values of all weights.

    It covers adapters, which of them are active, and whether they are on. It takes far less time than `model_key`.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // _VALUES)]
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + some.float().cpu().contiguous().numpy().tobytes())
    for name, module in model.named_modules():
        for scale_name, scale in scales(module).items():
            flat = scale.detach().flatten()
            some = flat[:: max(1, flat.numel() // _VALUES)]
            digest.update(f"{name} {scale_name}".encode() + some.float().cpu().contiguous().numpy().tobytes())
    adapted = [(n, m) for n, m in model.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    off = [name for name, m in adapted if m.disable_adapters]
    digest.update(" ".join(off).encode())
    if len({name for _, m in adapted for name in m._get_available_adapters()}) > 1:
        digest.update(as_bytes([[name, list(m.active_adapters)] for name, m in adapted]))
    return digest.hexdigest()[:16]


def why_not(model: nn.Module, layer: int) -> str | None:
    """Why no key identifies what this model computes up to `layer`; None if `weights_key` does.

    Hooks and replaced forwards change the stream but not the weights. `ReadTap`s and transformers' own hooks change
    nothing, and the key covers a forward that is one torch function of fixed tensors (see `adapters.folded`).
    """
    for name, module in _running(model, layer):
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(_may_change(hook) for hook in hooks):
            return f"a hook on {name or 'the model'} may change what it computes"
        if "forward" in vars(module) and not _is_torch_partial(vars(module)["forward"]):
            return f"the forward of {name or 'the model'} is replaced"
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(t.is_meta or not _is_plain(t) for t in tensors):
            return f"the weights of {name or 'the model'} are not plain tensors in memory"
    return None


# --- The modules that run, and the bytes that stand for them


def _running(model: nn.Module, layer: int) -> Iterator[tuple[str, nn.Module]]:
    decoder_layer(model, layer)
    yield from _below("", base_transformer(model), set(list(decoder_layers(model))[layer + 1 :]))


def _below(name: str, module: nn.Module, above: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in above:
        return
    if isinstance(module, BaseTunerLayer) and module.disable_adapters and not module.merged:
        yield from _below(name, module.get_base_layer(), above)
        return
    if isinstance(module, AuxiliaryTrainingWrapper) and module.disable_adapters:
        original = module.original_module
        yield from _below(name, original, above)
        return
    yield name, module
    if "forward" in vars(module):
        return  # its parts do not run
    for child_name, child in module.named_children():
        yield from _below(f"{name}.{child_name}".lstrip("."), child, above)


def _may_change(hook: object) -> bool:
    if isinstance(hook, MethodType) and isinstance(hook.__self__, Tap):
        return not isinstance(hook.__self__, ReadTap)
    return hook.__module__.split(".")[0] != "transformers"


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) or type(tensor).__name__ in PARAMETERS


def _is_torch_partial(forward: object) -> bool:
    return isinstance(forward, partial) and str(forward.func.__module__).split(".")[0] == "torch"


def add_tensor(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Add a tensor to a hash: its name, dtype, shape and raw bytes."""
    digest.update(as_bytes([name, str(tensor.dtype), list(tensor.shape)]))
    digest.update(_raw(tensor))


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def as_bytes(value: object) -> bytes:
    """Settings as bytes to hash; the order of keys does not count."""
    return json.dumps(value, sort_keys=True, skipkeys=True, default=_described).encode() + b"\0"


def _described(value: object) -> object:
    """A value that JSON does not know: a tensor by its bytes, a partial by its parts, anything else by its type."""
    if isinstance(value, torch.dtype):  # that a quantised layer multiplies in
        return str(value)
    if isinstance(value, partial):
        return [value.func.__qualname__, value.args, value.keywords]
    return hashlib.sha256(_raw(value)).hexdigest() if isinstance(value, Tensor) else type(value).__qualname__
