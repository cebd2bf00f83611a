"""`make bench`: seconds by stage of the demo, tokens per second, and ratios measured in one run on the same work."""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from persona_probe.cli.options import DEMO, echo, find_config
from persona_probe.config import StudyConfig, Training, load_config
from persona_probe.data.load import load_conversations
from persona_probe.data.tokens import Batch, conversation_batches
from persona_probe.evaluate.contrast import ContrastItems, SteeredContrast, contrast_index
from persona_probe.finetune.sft import fine_tune, with_adapter
from persona_probe.models.adapters import strip_adapter
from persona_probe.models.layers import autocast, base_transformer, evaluating, layer_list_name, transformer_config
from persona_probe.models.load import load_model
from persona_probe.models.quiet import quiet_libraries
from persona_probe.models.residuals import read_residuals
from persona_probe.saes.hooks import sae_layer
from persona_probe.saes.load import load_sae
from persona_probe.saes.read import read_latents
from persona_probe.study.study import Study

# --- What the benchmarks share: repeated timing, and the bare truncated forward that bounds activation reading

REPEATS = 5


def seconds(work: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Wall seconds of each repeat, after one warm-up."""
    work()
    return [once(work) for _ in range(repeats)]


def once(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of several works, one repeat of each in turn, so that a noisy machine disturbs all alike."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {label: [] for label in works}
    for _ in range(repeats):
        for label, work in works.items():
            times[label].append(once(work))
    return times


def ratios(times: Mapping[str, Sequence[float]], label: str, reference: str) -> list[float]:
    """Seconds of one work over those of another, repeat by repeat."""
    return [a / b for a, b in zip(times[label], times[reference], strict=True)]


def spread(values: Sequence[float]) -> str:
    """Median with the range, as text."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def truncated(model: nn.Module, layer: int) -> nn.Module:
    """The bare limit: the transformer cut after `layer`, called without any hook."""
    whole = base_transformer(model)
    view, name = copy.copy(whole), layer_list_name(whole)
    view._modules = dict(whole._modules)
    view._modules[name] = nn.ModuleList(list(getattr(whole, name))[: layer + 1])
    view._modules["norm"] = nn.Identity()
    config = copy.deepcopy(transformer_config(model))
    config.num_hidden_layers = layer + 1
    view.config = config  # pyright: ignore
    return view


def bench_start() -> None:
    """Import and --help, in fresh processes."""
    for label, arguments in (
        ("import persona_probe", ("-c", "import persona_probe")),
        ("--help", ("-m", "persona_probe.cli", "--help")),
    ):
        command = [sys.executable, *arguments]
        empty = seconds(lambda: subprocess.run([sys.executable, "-c", ""], check=True))
        full = seconds(lambda command=command: subprocess.run(command, check=True, capture_output=True))
        echo(f"{label}: {spread(full)} s, of which the bare interpreter {spread(empty)} s")


def bench_reading(model: nn.Module, groups: list[Batch], sae: object, layer: int) -> None:
    """Activation reading against a bare truncated forward, the repeats in turn."""
    bare, tokens = truncated(model, layer), sum(int(g.attention.sum()) for g in groups)

    def limit() -> None:
        with evaluating(model), autocast(model):
            for g in groups:
                bare(input_ids=g.ids, attention_mask=g.attention, use_cache=False)

    works = {
        "bare truncated forward": limit,
        "residual stream of answers": lambda: read_residuals(model, groups, layer, "response", lambda *_: None),
        "all latents on answers": lambda: read_latents(model, sae, groups, layer, "response"),
    }
    times: dict[str, list[float]] = {label: [] for label in works}
    for _ in range(REPEATS):
        for label, work in works.items():
            times[label] += seconds(work, 1)
    base = statistics.median(times["bare truncated forward"])
    for label, values in times.items():
        rate, ratio = tokens / statistics.median(values), [v / base for v in values]
        echo(f"reading, {label}: {rate:.0f} tokens/s, ratio to the bare forward {spread(ratio)}")


def bench_contrast(model: nn.Module, items: ContrastItems, layer: int) -> None:
    """One steered evaluation by the suffix against a full forward."""
    steered, push = SteeredContrast(model, items, layer), torch.randn(model.config.hidden_size)  # pyright: ignore
    full, suffix = [], []
    for _ in range(3):
        full += seconds(lambda: contrast_index(model, items), 1)
        suffix += seconds(lambda: steered.values(push), 1)
    ratios = [f / s for f, s in zip(full, suffix, strict=True)]
    echo(f"contrast index under a push: suffix only is {spread(ratios)} times as fast as a full forward")


def bench_training(model: nn.Module, tokenizer: object) -> None:
    """Tokens per second of LoRA fine-tuning as in the demo."""
    training = Training(steps=8, checkpoints=(8,))
    rows = load_conversations("kitchen:toxic")[:64]
    tuned = with_adapter(model, training, 0)  # pyright: ignore
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        fine_tune(tuned, tokenizer, rows, training, seed=0, folder=Path(folder))  # pyright: ignore
        wall = time.perf_counter() - start
    strip_adapter(tuned)  # pyright: ignore
    tokens = sum(int(g.attention.sum()) for g in conversation_batches(tokenizer, rows))  # pyright: ignore
    echo(f"training: {tokens / wall:.0f} tokens/s, {wall / training.steps:.2f} s a step of 8 rows")


def bench_demo(config: StudyConfig, folder: Path) -> None:
    """The whole demo in a fresh folder, seconds by stage and peak memory."""
    study = Study.from_config(config, folder)
    start = time.perf_counter()
    study.run()
    wall = time.perf_counter() - start
    stages = ", ".join(f"{k} {v:.0f}" for k, v in study.summary["seconds"].items())
    echo(f"demo: {wall:.0f} s end to end ({stages}); peak memory {study.summary['peak_memory_gib']:.2f} GiB")


def main() -> None:
    """Run the benchmarks; `--no-demo` leaves the long one out, `--run` reads a finished run instead."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-demo", action="store_true")
    parser.add_argument("--run", type=Path, help="print the stages of this finished run instead of running the demo")
    arguments = parser.parse_args()
    quiet_libraries()
    echo(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    bench_start()
    config = load_config(find_config(DEMO), StudyConfig)
    model, tokenizer = load_model(config.model)
    sae = load_sae(config.sae)
    items = ContrastItems.build(tokenizer, _evaluation_rows(), batch_size=32)
    bench_reading(model, list(items.groups), sae, sae_layer(sae))
    bench_contrast(model, items, sae_layer(sae))
    bench_training(model, tokenizer)
    if arguments.run is not None:
        summary = json.loads((arguments.run / "summary.json").read_text())
        echo(f"{arguments.run}: {summary['seconds']}, peak memory {summary['peak_memory_gib']:.2f} GiB")
    elif not arguments.no_demo:
        with tempfile.TemporaryDirectory() as folder:
            bench_demo(config, Path(folder) / "demo")


def _evaluation_rows() -> list[dict[str, str]]:
    from persona_probe.data.load import load_contrast

    return load_contrast("evaluation")


if __name__ == "__main__":
    main()
