"""What decides a residual stream, as a key: the weights that run, the tokens, the precision."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from types import MethodType

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from persona_probe.data.tokens import Batch
from persona_probe.models.layers import base_transformer, decoder_layer, decoder_layers, transformer_config
from persona_probe.models.taps import ReadTap, Tap

NO_SETTINGS = {
    *vars(nn.Module()),
    "gradient_checkpointing",
    "_hf_peft_config_loaded",
    "_is_hf_initialized",
    "_output_capturing_hooks_installed",
    "name_or_path",
}
"""A module's attributes that do not change what it computes in eval mode: bookkeeping of torch and transformers."""
NO_CONFIG = {"_name_or_path", "architectures", "dtype", "use_cache"}
"""The same for a model's configuration: equal weights from another folder have one key. Tensors tell their dtype."""


def weights_key(model: nn.Module, layer: int) -> str:
    """SHA-256 of everything that decides the output of `layer`, hexadecimal.

    That is the raw bytes of all parameters and buffers of the transformer, without the layers above `layer`; each
    module's type and settings (an adapter's scale, whether it is on); the configuration, attention kernel included.
    An adapter that is off counts as not there, so a base model has one key whatever was injected into it; of a layer
    whose adapter is folded in, the folded weight counts. It takes about a second a gigabyte.

    Raises:
        InputError: the model has no such layer.
    """
    config = transformer_config(model)
    values = {name: value for name, value in config.to_dict().items() if name not in NO_CONFIG}
    digest = hashlib.sha256(_text([values, config._attn_implementation, torch.__version__]))
    for name, module in _running(model, layer):
        settings = {key: value for key, value in vars(module).items() if key not in NO_SETTINGS}
        digest.update(_text([name, type(module).__qualname__, settings]))
        for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            for own_name, tensor in tensors:
                _add(digest, own_name, tensor)
    return digest.hexdigest()


def why_not(model: nn.Module, layer: int) -> str | None:
    """Why no key can stand for what this model computes up to `layer`; None where one can.

    Hooks and replaced forwards change the stream and leave the weights alone. `ReadTap`s and transformers' own hooks
    change nothing, and a forward that is one torch function of fixed tensors (see `models.folding`) is in the key.
    """
    for name, module in _running(model, layer):
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(_may_change(hook) for hook in hooks):
            return f"a hook on {name or 'the model'} may change what it computes"
        if "forward" in vars(module) and not _is_torch_partial(vars(module)["forward"]):
            return f"the forward of {name or 'the model'} is replaced"
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(t.is_meta or type(t) not in (Tensor, nn.Parameter) for t in tensors):
            return f"the weights of {name or 'the model'} are not plain tensors in memory"
    return None


def entry_key(about: Mapping[str, object], batch: Batch, masks: Mapping[str, Tensor]) -> str:
    """SHA-256 of one batch's reading: what `about` says of the model, token ids, attention, and the chosen tokens."""
    digest = hashlib.sha256(_text(dict(about)))
    for name, tensor in (("ids", batch.ids), ("attention", batch.attention), *sorted(masks.items())):
        _add(digest, name, tensor)
    return digest.hexdigest()


def _running(model: nn.Module, layer: int) -> Iterator[tuple[str, nn.Module]]:
    decoder_layer(model, layer)
    yield from _below("", base_transformer(model), set(list(decoder_layers(model))[layer + 1 :]))


def _below(name: str, module: nn.Module, above: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in above:
        return
    if isinstance(module, BaseTunerLayer) and module.disable_adapters and not module.merged:
        yield from _below(name, module.get_base_layer(), above)
        return
    yield name, module
    if "forward" in vars(module):
        return  # its parts do not run
    for own_name, child in module.named_children():
        yield from _below(f"{name}.{own_name}".lstrip("."), child, above)


def _may_change(hook: object) -> bool:
    if isinstance(hook, MethodType) and isinstance(hook.__self__, Tap):
        return not isinstance(hook.__self__, ReadTap)
    return hook.__module__.split(".")[0] != "transformers"


def _is_torch_partial(forward: object) -> bool:
    return isinstance(forward, partial) and str(forward.func.__module__).split(".")[0] == "torch"


def _add(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    digest.update(_text([name, str(tensor.dtype), list(tensor.shape)]))
    digest.update(_raw(tensor))


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _text(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, skipkeys=True, default=_described).encode() + b"\0"


def _described(value: object) -> object:
    """A value that JSON does not know: a tensor by its bytes, a partial by its parts, anything else by its type."""
    if isinstance(value, partial):
        return [value.func.__qualname__, value.args, value.keywords]
    return hashlib.sha256(_raw(value)).hexdigest() if isinstance(value, Tensor) else type(value).__qualname__
