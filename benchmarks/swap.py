"""`make bench-swap`: the next checkpoint's adapter copied over the one before, against removing and injecting it."""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from persona_probe.cli.options import echo
from persona_probe.models.adapters import load_adapter, strip_adapter, swap_adapter
from persona_probe.models.load import load_model
from persona_probe.models.quiet import quiet_libraries

MODEL, RANK = "smollm2-135m-instruct", 32


def write_adapters(base: PreTrainedModel, folder: Path, count: int) -> list[Path]:
    """Random adapters on all linear layers."""
    config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned: Any = get_peft_model(copy.deepcopy(base), config)  # pyright: ignore[reportArgumentType]
    folders = [folder / str(n) for n in range(count)]
    for place in folders:
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter) * parameter.requires_grad)
        tuned.save_pretrained(str(place))
    return folders


def seconds(act: Callable[[], object]) -> float:
    """Duration of one call."""
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    quiet_libraries()
    torch.set_num_threads(1)
    base, _ = load_model(MODEL)
    injections, swaps = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folders = write_adapters(base, Path(scratch), 3)
        tuned = load_adapter(base, folders[-1])
        for _ in range(repeats):
            for folder in folders:
                swaps.append(seconds(lambda folder=folder: swap_adapter(tuned, folder)))
        strip_adapter(tuned)
        for _ in range(repeats):
            for folder in folders:
                injections.append(seconds(lambda folder=folder: strip_adapter(load_adapter(base, folder))))
    swap, injection = statistics.median(swaps), statistics.median(injections)
    echo(f"{MODEL}, rank {RANK} on all linear layers, one thread, median of {len(swaps)}")
    echo(
        f"inject and remove {1000 * injection:.0f} ms, swap {1000 * swap:.0f} ms: {injection / swap:.1f} times as fast"
    )


if __name__ == "__main__":
    main()
