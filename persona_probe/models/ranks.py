"""Wrapped models and several processes: the model below a wrapper, and the exchange between processes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
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
    old = _old_fsdp()
    if old and any(isinstance(module, old) for module in model.modules()):
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


def shards_here() -> bool:
    """Whether a training of this process spreads its model over several (FSDP), by `accelerate launch`'s word."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and Ranks().many


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of a sharded model holds, whole, on the CPU: of a PEFT model only what is trained.

    Every process must call it; only the first gets the tensors.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    some, first = hasattr(model, "peft_config"), Ranks().first
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if some and name not in trained:
            continue
        whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
        if first:
            weights[name] = whole.detach().cpu().clone()
    return weights


@contextmanager
def parts_callable(model: nn.Module) -> Iterator[None]:
    """Inside the block, parts of a sharded model can be called by themselves; elsewhere nothing changes.

    FSDP gathers a decoder layer's weights when that layer is called, but those outside of layers (embedding, head) only
    when the whole model is called. Every process must run the block's forward passes, all of them, in the same order.
    """
    if not is_sharded(model):
        yield
        return
    root: Any = unwrap(model)
    with torch.no_grad():  # FSDP gets ready at the first call of the whole model
        root(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device), use_cache=False)
    root.unshard()
    try:
        yield
    finally:
        reshard(model)


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
        self.count = dist.get_world_size() if self.many else 1
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
