"""Two pretended accelerators, `pretend:0` and `pretend:1`, that compute on the CPU and are as strict as CUDA.

An operation on tensors of different devices fails, and each wait of the host for the device is counted, so that
mistakes which only a GPU shows are found without one. Registering the device changes the process for good: run
the checks in a process of their own, as `tests/test_devices.py` does.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyDeviceGuard, _DummyPrivateUse1Hook, rename_privateuse1_backend

NAME = "pretend"
aten: Any = torch.ops.aten
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default}
COPYING = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_LIBRARY = torch.library.Library("_", "IMPL")


class _Module:
    """What torch asks of a backend's module."""

    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    current_device = staticmethod(lambda: 0)
    set_device = manual_seed = manual_seed_all = set_rng_state = staticmethod(lambda *_: None)
    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    _is_in_bad_fork = staticmethod(lambda: False)


def register() -> None:
    """Make the device known to torch, once in a process; autocast leaves its operations alone."""
    backend: Any = torch._C
    rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _Module())
    backend._acc.register_python_privateuseone_hook(_DummyPrivateUse1Hook())
    backend._acc.register_python_privateuseone_device_guard(_DummyDeviceGuard())
    _LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


class Held(Tensor):
    """A tensor that says it is on a pretended device; its values are in `held`, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> "Held":
        place: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=device, **place)

    def __init__(self, held: Tensor, device: torch.device) -> None:
        self.held = held

    def __repr__(self, **_: Any) -> str:
        return f"Held({self.held}, {self.device})"

    def __getitem__(self, index: Any) -> Any:
        """Lists as indices are sent to the device by torch below the dispatch mode: send them here."""
        return super().__getitem__(_lists_as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_lists_as_tensors(index), value)

    def tolist(self) -> Any:
        """One copy to the host."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on {NAME} outside of the block")


def _lists_as_tensors(index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)


class Pretending(TorchDispatchMode):
    """Computes what is asked of pretended tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """How often the host waited for the device, by what it waited for."""
        self.sent = 0
        """Tensors sent from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        held = [leaf for leaf in leaves if isinstance(leaf, Held)]
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if not held and (target is None or target.type != NAME):
            return func(*args, **kwargs)
        self._note(func, args, leaves, target)
        device = target or (args[0] if func in COPYING else held[0]).device
        if device.type == NAME and device.index is None:
            device = torch.device(NAME, 0)
        inner_args, inner_kwargs = tree_map_only(Held, lambda x: x.held, (args, kwargs))
        if "device" in inner_kwargs:
            inner_kwargs["device"] = torch.device("cpu")
        out = func(*inner_args, **inner_kwargs)
        if device.type != NAME:
            return out
        known = {id(x.held): x for x in held}
        wrapped = tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else Held(x, device), out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def _note(self, func: Any, args: Any, leaves: list[Tensor], target: torch.device | None) -> None:
        """Count a wait, or refuse operands that lie on different devices."""
        if func in COPYING:
            source = args[1] if func is aten.copy_.default else args[0]
            goal = args[0].device if func is aten.copy_.default else target or source.device
            self.sent += source.device.type == "cpu" != goal.type
            self.waits["copy to the host"] += goal.type == "cpu" != source.device.type
            return
        self.waits[str(func)] += func in WAITING
        others = [leaf for leaf in leaves if not isinstance(leaf, Held) and leaf.ndim]
        if func in INDEXING and isinstance(args[0], Held):
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            self.waits["a mask as index"] += bool(masks)
            self.sent += bool(others)  # CUDA takes indices of the host
            others = []
        if others or len({leaf.device for leaf in leaves if isinstance(leaf, Held)}) > 1:
            places = [(str(leaf.device), tuple(leaf.shape)) for leaf in leaves]
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, got {places}")


def _on_the_host_first(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor` and `torch.as_tensor` allocate below the dispatch mode: make the tensor, then send it."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(data, *args, device=device, **kwargs) if device is not None else make(data, *args, **kwargs)
        return (data if isinstance(data, Held) else make(data, *args, **kwargs)).to(device)

    return made


@contextmanager
def pretending() -> Iterator[Pretending]:
    """A block in which tensors can be on the device."""
    makers = [patch.object(torch, name, _on_the_host_first(getattr(torch, name))) for name in ("tensor", "as_tensor")]
    with makers[0], makers[1], Pretending() as mode:
        yield mode


def spread(model: Any, first: int) -> Any:
    """A model with its layers from `first` on, its last norm and its head on the second device, as `device_map` does.

    The inputs of each moved part are sent to it, and the logits back to the first device.
    """
    model = model.to(f"{NAME}:0")
    inner = model.model
    for part in [*inner.layers[first:], inner.norm, model.lm_head]:
        part.to(f"{NAME}:1")
        part.register_forward_pre_hook(_sender(f"{NAME}:1"), with_kwargs=True)
    model.register_forward_hook(_returner(f"{NAME}:0"))
    model.hf_device_map = {"model.embed_tokens": 0, "lm_head": 1}
    return model


def _sender(device: str) -> Callable[..., Any]:
    def send(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))

    return send


def _returner(device: str) -> Callable[..., Any]:
    def send_back(_module: nn.Module, _args: Any, out: Any) -> Any:
        if out.get("logits") is not None:
            out["logits"] = out["logits"].to(device)
        return out

    return send_back
