"""One process of a distributed run under the monitor's eye; `test_hooks_distributed.py` starts two of them."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from persona_probe.data.tokens import encode
from persona_probe.monitor.actions.action import CallBack, StopTraining
from persona_probe.monitor.monitor import FeatureMonitor
from tests.factories import LAYER, hook_count, make_model, make_tokenizer, talks
from tests.monitor.monitored_runs import DIRECTION, FireAt, KeepEvents, directions, loop_batch


def states() -> list[Any]:
    """The random states of this process."""
    return [torch.get_rng_state().sum().item(), random.getstate()[1][5], int(np.random.get_state()[1][5])]  # pyright: ignore


def rows_of(watching: FeatureMonitor, *columns: str) -> list[Any]:
    """Some columns of the readings; nothing in a process that does not record."""
    return watching.readings[list(columns)].values.tolist() if len(watching.readings) else []


def ddp(folder: Path, watched: bool) -> dict[str, Any]:
    """Three steps by transformers' Trainer; a rule that only the first process asks stops after two."""
    calls, kept, model = list[int](), KeepEvents(), make_model()
    watching = directions(
        mode="both", every=1, sinks=[kept], rules=[FireAt(2)],
        actions=[StopTraining(), CallBack(lambda alarm, context: calls.append(alarm.step))],
    )  # fmt: skip
    rows = [{"input_ids": (ids := encode(make_tokenizer(), c).ids[:24]), "labels": ids} for c in talks(8)]
    arguments = TrainingArguments(
        str(folder), max_steps=3 if watched else 2, per_device_train_batch_size=1, use_cpu=True, save_strategy="no",
        report_to=[], disable_tqdm=True, ddp_backend="gloo", learning_rate=1e-2, seed=3,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        callbacks=[watching] if watched else [],
    )
    trainer.train()
    return {
        "steps": trainer.state.global_step,
        "weights": {n: p.detach().sum().item() for n, p in model.named_parameters()},
        "states": states(),
        "calls": calls,
        "rows": rows_of(watching, "step", "mode", "n_probes", "tokens_seen"),
        "events": [type(event).__name__ for event in kept.events],
        "faults": [f.message for f in watching.faults],
        "hooks": hook_count(model),
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def fsdp(watched: bool) -> dict[str, Any]:
    """Three steps of a plain loop on a model that is spread over the processes."""
    model = make_model().train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    before = hook_count(model)
    watching = FeatureMonitor(
        None, {"mean difference": DIRECTION}, talks(4), layer=LAYER, bf16=False, mode="both", every=1, log=False
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def steps(live: FeatureMonitor | None) -> None:
        for step in range(1, 4):
            ids, labels = loop_batch(2 * step + dist.get_rank())
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if live is not None:
                live.step(step)

    torch.manual_seed(5 + dist.get_rank())
    if watched:
        with watching.watch(model, make_tokenizer()) as live:
            steps(live)
    else:
        steps(None)
    return {
        "weights": {n: p.full_tensor().double().sum().item() for n, p in model.named_parameters()},  # pyright: ignore
        "states": states(),
        "sharded": all("DTensor" in type(p).__name__ for p in model.parameters()),
        "rows": rows_of(watching, "step", "mode", "mean", "n_probes", "tokens_seen"),
        "faults": [f.message for f in watching.faults],
        "hooks": hook_count(model) - before,
    }


def main(folder: Path) -> None:
    """Run all, and write what this process saw."""
    torch.set_num_threads(1)
    found = {"ddp": ddp(folder, True), "ddp plain": ddp(folder, False)}
    found |= {"fsdp": fsdp(True), "fsdp plain": fsdp(False)}
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
