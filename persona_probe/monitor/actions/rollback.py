"""Put the model back to its last clean state at an alarm."""

import copy
import json
import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from persona_probe.errors import InputError, unknown
from persona_probe.files import words
from persona_probe.models.adapters import trainable_parameters
from persona_probe.models.ranks import Ranks, is_sharded
from persona_probe.monitor.actions.action import Action, ActionContext, folder_for, request_stop
from persona_probe.monitor.events import Alarm
from persona_probe.writing import write_tensors

log = logging.getLogger(__name__)

# --- A copy of what training changes: trainable weights and the optimizer's state, in memory or on disk

NonTensors = dict[str, dict[str, Any]]
"""Values of the optimizer's state that are not tensors, by parameter and key."""


@dataclass(frozen=True)
class TrainableState:
    """Weights and optimizer state by name; of a sharded model, the part that this process holds."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    """By parameter and key of its optimizer state."""
    others: NonTensors

    def flat(self) -> dict[str, Tensor]:
        """All tensors, each under one name."""
        moments = {f"optimizer|{n}|{k}": v for n, part in self.moments.items() for k, v in part.items()}
        return {**{f"weights|{n}": v for n, v in self.weights.items()}, **moments}

    @classmethod
    def from_flat(cls, tensors: dict[str, Tensor], others: NonTensors) -> "TrainableState":
        """The inverse of `flat`."""
        weights, moments = {}, {}
        for name, tensor in tensors.items():
            kind, parameter, *key = name.split("|")
            if kind == "weights":
                weights[parameter] = tensor
            else:
                moments.setdefault(parameter, {})[key[0]] = tensor
        return cls(weights, moments, others)


def live_state(model: nn.Module, optimizer: Optimizer | None) -> TrainableState:
    """The tensors themselves, not copies."""
    weights, moments, others = {}, {}, {}
    for name, parameter in trainable_parameters(model).items():
        weights[name] = local(parameter.detach())
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        moments[name] = {k: local(v) for k, v in state.items() if isinstance(v, Tensor)}
        others[name] = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    return TrainableState(weights, moments, others)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that FSDP shards; any other tensor itself. Memory is shared."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class CleanState(ABC):
    """A place for one state; a state that was not copied completely does not count."""

    step: int | None = None
    """Training step of the state."""

    def take(self, model: nn.Module, optimizer: Optimizer | None, step: int) -> None:
        """Replace the state by the present one."""
        self.step = None
        self._write(live_state(model, optimizer))
        self.step = step

    @abstractmethod
    def _write(self, content: TrainableState) -> None: ...

    @abstractmethod
    def content(self) -> TrainableState:
        """The state."""


@dataclass
class InMemory(CleanState):
    """In the host's memory, whatever the device: the weights, and with Adam twice as much for its moments."""

    _tensors: dict[str, Tensor] = field(default_factory=dict)
    _others: NonTensors = field(default_factory=dict)

    def _write(self, content: TrainableState) -> None:
        live = content.flat()
        before, self._tensors = self._tensors, {}
        for name, tensor in live.items():
            # The memory of the old copy is reused, so there is never a second copy.
            old = before.pop(name, None)
            fits = old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype
            target = old if old is not None and fits else torch.empty_like(tensor, device="cpu")
            self._tensors[name] = target.copy_(tensor)
        self._others = copy.deepcopy(content.others)

    def content(self) -> TrainableState:
        """The state; non-tensor values as copies."""
        return TrainableState.from_flat(self._tensors, copy.deepcopy(self._others))


@dataclass
class OnDisk(CleanState):
    """In one safetensors file, replaced as a whole.

    Raises:
        InputError: at writing, if the disk is full or the optimizer's state holds more than tensors and numbers.
    """

    path: Path

    def _write(self, content: TrainableState) -> None:
        try:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in content.flat().items()}
            write_tensors(self.path, tensors, {"others": json.dumps(content.others)})
        except (InputError, SafetensorError, TypeError) as error:
            raise InputError(f"no clean state is kept ({words(error)}): keep it in memory") from error

    def content(self) -> TrainableState:
        """The state.

        Raises:
            InputError: the file is gone or damaged.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
                return TrainableState.from_flat(tensors, json.loads(file.metadata()["others"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"cannot read the clean state in {self.path}: {str(error).splitlines()[0]}") from error


# --- The action

KEEP, OPTIMIZER, THEN = ("memory", "disk"), ("restore", "reset", "keep"), ("continue", "stop")


@dataclass
class OwnedState:
    """The one clean state of a run, and the model that it belongs to."""

    state: CleanState | None = None
    model: "weakref.ref[nn.Module] | None" = None

    def of(self, model: nn.Module) -> CleanState | None:
        """The state, if it belongs to this model and is complete."""
        if self.state is None or self.model is None or self.model() is not model:
            return None
        return None if self.state.step is None else self.state


@dataclass(frozen=True, eq=False)
class RollBack(Action):
    """Put the trainable weights back, bit for bit, to the latest reading at which every rule was inside.

    A reading that is not finite is never clean, nor are weights or optimizer moments that are not, wherever they lie.
    One state is kept, and replaced at each clean reading. Only weights and optimizer are put back: the learning rate
    schedule, the step count and the data continue. Before the first clean reading there is nothing to put back.

    Raises:
        InputError: an unknown choice.
    """

    keep: str = "memory"
    """`memory` (of the host), or `disk` (`last-clean.safetensors`)."""
    optimizer: str = "restore"
    """The optimizer's state (Adam's moments): `restore` it as it was with those weights; `reset` it to none, as at the
    start of training; or `keep` it as it is, which costs no memory but still pushes the way of the bad steps."""
    then: str = "continue"
    """`continue` or `stop` training afterwards."""
    folder: Path | str | None = None
    """For `disk`; None takes the monitor's folder, else the trainer's `output_dir`."""
    _clean: OwnedState = field(default_factory=OwnedState, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, known in (("keep", KEEP), ("optimizer", OPTIMIZER), ("then", THEN)):
            if getattr(self, name) not in known:
                raise unknown(f"{name} of RollBack", getattr(self, name), known)

    @property
    def clean_step(self) -> int | None:
        """Training step of the state that is kept; None before the first clean reading."""
        return None if self._clean.state is None else self._clean.state.step

    def clean(self, context: ActionContext) -> None:
        """Keep the present state of the model.

        Raises:
            InputError: with `disk`, no folder, or it cannot be written.
        """
        optimizer = context.optimizer if self.optimizer == "restore" else None
        if not is_finite(context.model, optimizer):
            log.warning("step %d: weights or moments are not finite, so they are not kept as clean", context.step)
            return
        if self._clean.state is None or self._clean.of(context.model) is None:
            self._clean.state, self._clean.model = self._new_state(context), weakref.ref(context.model)
        self._clean.state.take(context.model, optimizer, context.step)

    def _new_state(self, context: ActionContext) -> CleanState:
        if self.keep == "memory":
            return InMemory()
        return OnDisk(folder_for(self, self.folder, context) / f"last-clean{_rank_suffix()}.safetensors")

    def _do(self, alarm: Alarm, context: ActionContext) -> None:
        state = self._clean.of(context.model)
        if state is None:
            log.warning("step %d: no reading was clean yet, so there is nothing to roll back to", context.step)
        else:
            content = state.content()
            check_same(context.model, content)
            put_weights(context.model, content)
            self._put_optimizer(context, content)
            log.warning("step %d: the weights are back to those of step %s", context.step, state.step)
        if self.then == "stop":
            request_stop(context)

    def _put_optimizer(self, context: ActionContext, content: TrainableState) -> None:
        if context.optimizer is None or self.optimizer == "keep":
            return
        empty = TrainableState(content.weights, {}, {})
        put_moments(context.model, context.optimizer, content if self.optimizer == "restore" else empty)


def is_finite(model: nn.Module, optimizer: Optimizer | None) -> bool:
    """Whether all trainable weights, and the optimizer's state for them, are finite; of a sharded model all parts."""
    tensors = [tensor for tensor in live_state(model, optimizer).flat().values() if tensor.is_floating_point()]
    bad = sum(not bool(tensor.isfinite().all()) for tensor in tensors)
    ranks = Ranks()
    if ranks.many and is_sharded(model):
        (bad,) = ranks.total([float(bad)], next(model.parameters()).device)
    return bad == 0


def check_same(model: nn.Module, content: TrainableState) -> None:
    """Refuse a state that fits only a part of the model.

    Raises:
        InputError: parameters are gone or have other shapes since the state was kept.
    """
    now = {name: local(parameter.detach()).shape for name, parameter in model.named_parameters()}
    for name, value in content.weights.items():
        if now.get(name) != value.shape:
            raise InputError(f"parameter {name!r} changed its shape or went since the clean state: cannot roll back")


def put_weights(model: nn.Module, content: TrainableState) -> None:
    """Write the state's weights into the model's own parameters."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in content.weights.items():
            local(parameters[name].detach()).copy_(value)


def put_moments(model: nn.Module, optimizer: Optimizer, content: TrainableState) -> None:
    """Restore the optimizer's state for the state's parameters; a parameter that had none gets none."""
    parameters = dict(model.named_parameters())
    for name in content.weights:
        moments, others = content.moments.get(name, {}), content.others.get(name, {})
        if not moments and not others:
            optimizer.state.pop(parameters[name], None)
            continue
        present: MutableMapping[str, Any] = optimizer.state[parameters[name]]
        for key in set(present) - set(moments) - set(others):
            del present[key]
        present.update(others)
        for key, value in moments.items():
            _put(present, key, value, parameters[name])


def _put(present: MutableMapping[str, Any], key: str, value: Tensor, parameter: Tensor) -> None:
    """In place if possible: compiled and capturable optimizers keep references to their tensors."""
    now = present.get(key)
    if isinstance(now, Tensor) and local(now).shape == value.shape and local(now).dtype == value.dtype:
        local(now).copy_(value)
    else:
        # Step counts live on the host, where torch's optimizers keep them by default.
        present[key] = value.clone().to("cpu" if value.dim() == 0 else parameter.device)


def _rank_suffix() -> str:
    return f"-{torch.distributed.get_rank()}" if Ranks().many else ""
