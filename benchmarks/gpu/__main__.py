"""The command line of `make bench-gpu`."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.gpu.parts import PARTS, Numbers, seconds_of_demo
from benchmarks.gpu.shapes import FEW, SHAPES, TINY, Amount, GpuCase, Shape, random_model, random_sae
from benchmarks.gpu.values import TOLERANCE, differences
from persona_probe.cli.options import echo
from persona_probe.data.load import load_contrast, load_conversations
from persona_probe.models.load import load_tokenizer
from persona_probe.models.quiet import quiet_libraries
from persona_probe.runs import versions
from persona_probe.writing import write_text

MODEL = "smollm2-135m-instruct"
"""Only its tokenizer is used."""
SECONDS = 210
"""No part begins after this long, so that the whole ends within five minutes."""
GIB = 2**30


def make_case(shape: Shape, amount: Amount, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> GpuCase:
    """The shape on the device, with packaged rows."""
    contrast = load_contrast("evaluation")[: amount.items]
    rows = load_conversations("kitchen:toxic")[: amount.rows]
    probes = load_conversations("neutral_probes")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(shape, tokenizer, device, dtype)
    return GpuCase(shape, amount, model, tokenizer, random_sae(shape, device), contrast, rows, probes)


def measured(
    shapes: Sequence[Shape],
    amount: Amount,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    parts: Sequence[str] = tuple(PARTS),
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Every part on every shape, as plain values; prints as it goes.

    Raises:
        RuntimeError: a number of the small model differs from the CPU's by more than the tolerance.
    """
    begun = time.perf_counter()
    apart = differences(tokenizer, load_contrast("evaluation")[: max(3, min(6, amount.items))], device)
    echo(f"largest relative difference to the CPU, tolerance {TOLERANCE:g}: {_listed(apart)}")
    if wrong := {name: value for name, value in apart.items() if not value <= TOLERANCE}:
        raise RuntimeError(f"{device} gives other numbers than the CPU: {_listed(wrong)}")
    record: dict[str, Any] = {"device": described(device), "versions": versions(), "values": apart, "shapes": {}}
    for shape in shapes:
        case = make_case(shape, amount, tokenizer, device)
        results = record["shapes"][shape.name] = {}
        for part in parts:
            if time.perf_counter() - begun > seconds:
                echo(f"{shape.name}, {part}: left out, {seconds:g} s are over")
                continue
            results[part] = _with_memory(case, part)
            echo(f"{shape.name}, {part}: {_listed(results[part])}")
        del case
        if device.type == "cuda":
            torch.cuda.empty_cache()
    record["seconds"] = time.perf_counter() - begun
    return record


def _with_memory(case: GpuCase, part: str) -> Numbers:
    """A part's numbers and, on a GPU, the most memory it held beyond what it began with."""
    if case.device.type != "cuda":
        return PARTS[part](case)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(case.device)
    before = torch.cuda.memory_allocated(case.device)
    found = PARTS[part](case)
    peak = torch.cuda.max_memory_allocated(case.device)
    return {**found, "peak GiB": peak / GIB, "GiB above model and SAE": (peak - before) / GIB}


def _listed(numbers: Mapping[str, float | None]) -> str:
    return "; ".join(f"{name} {value:.4g}" for name, value in numbers.items() if value is not None)


def described(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Speed on one large GPU.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="every part on a tiny model; always so on a CPU")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no part begins after this long")
    parser.add_argument("--demo", action="store_true", help="time the demo on the device too")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    options = parser.parse_args(arguments)
    quiet_libraries()
    device = torch.device(options.device)
    tiny = options.tiny or device.type != "cuda"
    shapes, amount = ([TINY], FEW) if tiny else ([SHAPES[name] for name in options.shapes], Amount())
    echo(f"{described(device)}, torch {torch.__version__}{', tiny: times mean nothing' if tiny else ''}")
    record = measured(shapes, amount, load_tokenizer(MODEL), device, options.parts, options.seconds)
    if options.demo:
        record["demo"] = seconds_of_demo(str(device))
        echo(f"demo: {_listed(record['demo'])}")
    if options.out is not None:
        write_text(options.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
