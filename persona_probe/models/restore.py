"""A model's state before something is put on it, and the way back, bit for bit, without a copy of its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from persona_probe.errors import InputError

_VALUES = 64
"""Values of each weight that are compared at the end: whatever trains or merges a weight moves nearly all of them."""
_SMALL = 65_536
"""Buffers of up to this many bytes are copied: a forward pass may write to them."""


class ModelState:
    """A model as it is now: modules, their attributes and hooks, parameters, buffers and configurations.

    Nearly all of it is kept by reference, so it costs a few milliseconds and no memory to speak of. Modules that are
    replaced, tensors that are put in a weight's place, flags and hooks all come back. Of a weight that something will
    write to, `keep` makes a copy first. A weight that was written to without one is noticed at the end.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = [_Attributes.of(module) for module in model.modules()]
        self._settings = [_Settings.of(config) for config in configurations(model)]
        parameters = [_Kept.of(name, parameter) for name, parameter in model.named_parameters()]
        buffers = [_Kept.of(name, buffer, small=True) for name, buffer in model.named_buffers()]
        self._tensors = {id(kept.tensor): kept for kept in [*parameters, *buffers]}

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model has no state to go back to: the tensors here are not the copy's."""
        return

    def keep(self, tensor: Tensor) -> None:
        """Copy a tensor that is about to be written to; those that are not the model's are left alone."""
        kept = self._tensors.get(id(tensor))
        if kept is not None and kept.copy is None:
            kept.copy = kept.data.clone()

    def keep_trainable(self) -> None:
        """Copy each weight that now requires gradients: an optimizer will write to it."""
        for kept in self._tensors.values():
            if kept.tensor.requires_grad and not kept.changed():
                self.keep(kept.tensor)

    @contextmanager
    def values(self) -> Iterator[None]:
        """Inside this block the weights hold the values that they had; then those of now again."""
        moved = [kept for kept in self._tensors.values() if kept.copy is not None or kept.moved()]
        current = [kept.tensor.data for kept in moved]
        try:
            for kept in moved:
                kept.tensor.data = kept.data if kept.copy is None else kept.copy
            yield
        finally:
            for kept, data in zip(moved, current, strict=True):
                kept.tensor.data = data

    def restore(self) -> None:
        """Give everything back.

        Raises:
            InputError: a weight was written to that had no copy; all else is back.
        """
        for attributes in self._modules:
            attributes.restore()
        for settings in self._settings:
            settings.restore()
        changed = [kept.name for kept in self._tensors.values() if kept.changed()]
        with torch.no_grad():
            for kept in self._tensors.values():
                kept.restore()
        if changed:
            some = ", ".join(changed[:3]) + (" ..." if len(changed) > 3 else "")
            raise InputError(f"{len(changed)} weights of the base model were overwritten ({some}): load it again")


def configurations(model: nn.Module) -> list[Any]:
    """All configuration objects of a model: those of its modules, the parts in them, and of generation."""
    found: dict[int, Any] = {}
    todo: list[Any] = [value for module in model.modules() for value in vars(module).values()]
    while todo:
        value = todo.pop()
        if isinstance(value, (PretrainedConfig, GenerationConfig)) and id(value) not in found:
            found[id(value)] = value
            todo += vars(value).values()
    return list(found.values())


@contextmanager
def own_configuration(model: nn.Module) -> Iterator[None]:
    """Restore every field of every configuration when the block ends."""
    settings = [_Settings.of(config) for config in configurations(model)]
    try:
        yield
    finally:
        for config in settings:
            config.restore()


def _copied(value: Any) -> Any:
    """The value; dictionaries, lists and sets as copies, all the way down."""
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    return value.copy() if isinstance(value, set) else value


def _set(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    attributes.update(before)
    for name in attributes.keys() - before.keys():
        del attributes[name]


@dataclass
class _Attributes:
    """The attributes of a module, and what its dictionaries, lists and sets held (parts, parameters, hooks)."""

    module: nn.Module
    attributes: dict[str, Any]
    contents: list[tuple[Any, Any]]

    @classmethod
    def of(cls, module: nn.Module) -> "_Attributes":
        attributes = dict(vars(module))
        containers = [value for value in attributes.values() if isinstance(value, (dict, list, set))]
        return cls(module, attributes, [(value, value.copy()) for value in containers])

    def restore(self) -> None:
        _set(vars(self.module), self.attributes)
        for container, before in self.contents:  # in place: a hook's handle knows its dictionary
            if isinstance(container, list):
                container[:] = before
            else:
                container.clear()
                container.update(before)


@dataclass
class _Settings:
    """The fields of a configuration."""

    config: Any
    fields: dict[str, Any]

    @classmethod
    def of(cls, config: Any) -> "_Settings":
        return cls(config, {name: _copied(value) for name, value in vars(config).items()})

    def restore(self) -> None:
        _set(vars(self.config), self.fields)


@dataclass
class _Kept:
    """A parameter or buffer: its data, flags, and enough of its values to notice that it was written to."""

    name: str
    tensor: Tensor
    data: Tensor
    requires_grad: bool
    grad: Tensor | None
    sample: Tensor | None
    copy: Tensor | None = None

    @classmethod
    def of(cls, name: str, tensor: Tensor, small: bool = False) -> "_Kept":
        data, is_copied = tensor.data, small and tensor.numel() * tensor.element_size() <= _SMALL
        copy = data.clone() if is_copied else None
        grad = tensor.grad if tensor.is_leaf else None
        return cls(name, tensor, data, tensor.requires_grad, grad, _sample(data), copy)

    def moved(self) -> bool:
        """Whether other data stand in the tensor's place."""
        now = self.tensor.data
        return now.data_ptr() != self.data.data_ptr() or now.shape != self.data.shape or now.dtype != self.data.dtype

    def changed(self) -> bool:
        """Whether the data were written to."""
        if self.copy is not None or self.sample is None:
            return False
        sample = _sample(self.data)
        return sample is None or not torch.equal(sample, self.sample)

    def restore(self) -> None:
        if self.moved():
            self.tensor.data = self.data
        if self.copy is not None:
            self.data.copy_(self.copy)
        if self.tensor.requires_grad != self.requires_grad:
            self.tensor.requires_grad_(self.requires_grad)
        if self.tensor.is_leaf and self.tensor.grad is not self.grad:
            self.tensor.grad = self.grad


def _sample(data: Tensor) -> Tensor | None:
    """The bytes of evenly spaced values; None where they are not plain numbers in memory."""
    if data.is_meta or type(data) not in (Tensor, nn.Parameter) or data.numel() == 0:
        return None
    flat = data.view(-1) if data.is_contiguous() else data.flatten()
    return flat[:: max(1, flat.numel() // _VALUES)].clone().view(torch.uint8)
