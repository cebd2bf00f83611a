"""One process of a run under FSDP2; `test_launched.py` has accelerate start two of them.

Accelerate shards models on accelerators only. Told that two processes on CPUs are such a machine, it prepares them by
its own code, which calls `torch.distributed.fsdp.fully_shard`, and gloo does the exchange.
"""

import sys
from typing import Any

import torch.distributed.fsdp
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import fully_shard

from persona_probe.cli import main

make_state = AcceleratorState.__init__


def sharding_state(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
    """The state of accelerate as on a machine with two GPUs and a config of FSDP2."""
    make_state(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = kwargs.get("fsdp_plugin") or FullyShardedDataParallelPlugin(fsdp_version=2)


def seen_sharding(*args: Any, **kwargs: Any) -> Any:
    """Torch's `fully_shard`, which leaves a line."""
    sys.stderr.write(f"{type(args[0]).__name__} sharded by fully_shard\n")
    return fully_shard(*args, **kwargs)


if __name__ == "__main__":
    torch.distributed.fsdp.fully_shard = seen_sharding
    AcceleratorState.__init__ = sharding_state
    main(sys.argv[1:])
