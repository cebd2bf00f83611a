"""Wrapped models and several processes: the model below a wrapper, and the exchange between processes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """The model below DDP, FSDP and `torch.compile` (the weights are shared); a PEFT wrapper stays."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel, *_old_fsdp())):
            model = model.get_submodule("module")
        elif is_compiled(model):
            model = model.get_submodule("_orig_mod")
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` made this module."""
    dynamo = sys.modules.get("torch._dynamo")  # a heavy import, already done wherever something was compiled
    return dynamo is not None and isinstance(model, dynamo.OptimizedModule)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes, which must then run every forward pass together, to its end.

    FSDP of both kinds, and DTensors (tensor parallelism).
    """
    if any(isinstance(module, _old_fsdp()) for module in model.modules()):
        return True
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and any(isinstance(p, tensors.DTensor) for p in model.parameters())


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds the parameters in parts; it marks them with `ds_id`."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Free gathered parameters (FSDP2): without a backward pass its root would keep them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded: list[Any] = [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
    for module in sharded:
        module.reshard()


def _old_fsdp() -> tuple[Any, ...]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return () if fsdp is None else (fsdp.FullyShardedDataParallel,)


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled modules uncompiled inside this block: hooks that were added after compiling fire there."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class Ranks:
    """The processes that train together; a single one where torch.distributed is not running."""

    def __init__(self) -> None:
        self.many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.first = not self.many or dist.get_rank() == 0

    def total(self, values: list[float], device: torch.device) -> list[float]:
        """Sums over all processes; one small collective, so every process must call it."""
        if not self.many:
            return values
        where = device if dist.get_backend() == "nccl" else torch.device("cpu")
        tensor = torch.tensor(values, dtype=torch.float32 if where.type == "mps" else torch.float64, device=where)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def from_first(self, value: Any) -> Any:
        """The first process's value, everywhere; every process must call it."""
        box = [value]
        if self.many:
            dist.broadcast_object_list(box, src=0)
        return box[0]
