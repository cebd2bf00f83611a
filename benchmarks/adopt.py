"""`make bench-adopt`: adopt and track many adapters of the embedded model; seconds for each, and memory on the way."""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from persona_probe.cli.options import DEMO, echo, find_config
from persona_probe.config import Locate, Monitor, StudyConfig, load_config
from persona_probe.context import Context
from persona_probe.data.load import SPLITS, evenly_spaced, load_contrast
from persona_probe.latents.stage import locate
from persona_probe.models.adapters import organism
from persona_probe.models.load import load_model
from persona_probe.models.quiet import quiet_libraries
from persona_probe.monitor import track as track_stage
from persona_probe.study.study import Study
from persona_probe.writing import write_jsonl

SIZE = 0.02
"""Standard deviation of the last checkpoint's LoRA B; the first is a `1 / checkpoints` of it."""
GIB = 2**20


def write_checkpoints(folder: Path, model_name: str, count: int, seed: int) -> None:
    """`checkpoint-1` to `checkpoint-<count>`: one random LoRA delta of rising size, in bf16."""
    model, _ = load_model(model_name)
    torch.manual_seed(seed)
    tuned: Any = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    whole = {name: torch.randn_like(tensor) for name, tensor in get_peft_model_state_dict(tuned).items()}
    for step in range(1, count + 1):
        sizes = {"lora_A": model.config.hidden_size**-0.5, "lora_B": SIZE * step / count}
        scaled = {name: (t * sizes["lora_A" if "lora_A" in name else "lora_B"]).bfloat16() for name, t in whole.items()}
        place = folder / f"checkpoint-{step}"
        place.mkdir(parents=True)
        save_file(scaled, place / "adapter_model.safetensors")
        tuned.peft_config["default"].save_pretrained(place)


def write_contrast(path: Path, count: int) -> Path:
    """That many packaged contrast items of each split, as a file of one's own."""
    rows = [{**row, "split": split} for split in SPLITS for row in evenly_spaced(load_contrast(split), count)]
    return write_jsonl(path, rows)


def peak_memory() -> float:
    """GiB of resident memory at its highest since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / GIB


def forget_peak() -> None:
    """Begin to count the peak of this process anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def timed(work: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def track_measured(study: Study) -> list[tuple[str, int, float, float]]:
    """Track, and note for each checkpoint its arm, step, seconds and peak memory (GiB)."""
    notes: list[tuple[str, int, float, float]] = []
    measure, last = track_stage._track_step, [time.perf_counter()]

    def noted(tracker: Any, model: nn.Module, arm: str, seed: int, step: int) -> None:
        measure(tracker, model, arm, seed, step)
        now = time.perf_counter()
        notes.append((arm, step, now - last[0], peak_memory()))
        last[0] = now
        forget_peak()

    track_stage._track_step = noted
    try:
        forget_peak()
        study.track()
    finally:
        track_stage._track_step = measure
    return notes


def loading_times(ctx: Context, steps: Sequence[int]) -> tuple[float, float]:
    """Median seconds to get the next checkpoint: its tensors copied in, and injected anew."""
    with ctx.trajectory("incorrect", 0) as at:
        at(steps[0])
        swaps = [timed(lambda step=step: at(step)) for step in steps[1:]]
    anew = []
    for step in steps[1:]:
        folder = ctx.run.checkpoint("incorrect", 0, step)
        start = time.perf_counter()
        with organism(ctx.model, folder):
            anew.append(time.perf_counter() - start)
    return statistics.median(swaps), statistics.median(anew)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adopt", description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=64, help="Of the incorrect arm.")
    parser.add_argument("--items", type=int, default=16, help="Contrast items of each split.")
    parser.add_argument("--probes", type=int, default=12, help="Of the feature's readings.")
    args = parser.parse_args(argv)
    quiet_libraries()
    logging.getLogger("persona_probe").setLevel(logging.ERROR)
    demo = load_config(find_config(DEMO), StudyConfig)
    small = Locate(candidates=2, proven=1, random_directions=0, strengths=(0.5,), dose_strengths=(0.5,))
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        write_checkpoints(place / "out", demo.model, args.checkpoints, seed=0)
        write_checkpoints(place / "control", demo.model, 1, seed=1)
        start = time.perf_counter()
        arms = {"incorrect": place / "out", "control": place / "control"}
        study = Study.adopt(
            demo.model,
            arms,
            str(find_config(demo.sae)),
            out=place / "run",
            locate=small,
            monitor=Monitor(limit=args.probes),
            contrast=str(write_contrast(place / "contrast.jsonl", args.items)),
            accept_base=True,
        )
        adopted, n = time.perf_counter() - start, args.checkpoints + 1
        echo(f"adopt: {n} adapters checked and hashed in {adopted:.1f} s, the base's loading included")
        echo(f"locate (small settings, for the latents to follow): {timed(lambda: locate(study.context)):.0f} s")
        notes = track_measured(study)
        _report(notes, study, args.checkpoints)


def _report(notes: Sequence[tuple[str, int, float, float]], study: Study, count: int) -> None:
    incorrect = [(step, seconds, memory) for arm, step, seconds, memory in notes if arm == "incorrect"]
    seconds = statistics.median(seconds for _, seconds, _ in incorrect[1:])
    items, probes = len(study.context.evaluation.rows), len(study.context.probes)
    echo(f"track: {seconds:.2f} s a checkpoint (median; {items} contrast items x 2 answers, {probes} probes)")
    marks = [step for step in (8, 16, 32, 64) if step <= count]
    memory = {step: peak for step, _, peak in incorrect}
    told = ", ".join(f"{memory[step]:.3f} GiB at checkpoint {step}" for step in marks)
    echo(f"track: peak memory {told}")
    swap, anew = loading_times(study.context, range(1, min(count, 9) + 1))
    echo(f"next checkpoint: {swap:.2f} s copied in and cast, {anew:.2f} s injected anew (before its casts)")


if __name__ == "__main__":
    main()
