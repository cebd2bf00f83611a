"""`make bench-growth`: processor seconds and peak memory against tokens, latents, checkpoints, questions and arms."""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.gpu.shapes import TINY, Shape, random_model, random_sae
from benchmarks.plan import RETURNED, resident
from persona_probe.cli.options import echo
from persona_probe.config import Training
from persona_probe.data.chat import conversation
from persona_probe.data.tokens import Batch, conversation_batches
from persona_probe.evaluate.contrast import ContrastItems, SteeredContrast, contrast_index
from persona_probe.finetune.sft import with_adapter
from persona_probe.latents.cards import neighbours, survey_model
from persona_probe.latents.passages import gather
from persona_probe.latents.rankers import Evidence, score_table
from persona_probe.models.adapters import organisms, strip_adapter
from persona_probe.models.load import load_tokenizer
from persona_probe.models.quiet import quiet_libraries
from persona_probe.monitor.reading import FeatureReader
from persona_probe.report.tables import Table
from persona_probe.saes.read import LatentMeans, read_latents
from persona_probe.writing import write_text

MIB = 2**20
SMALL = replace(TINY, name="small", hidden=64, intermediate=128, layers=4, latents=512, k=32)
"""Small, so that what grows is seen and not the model."""
Given = tuple[Shape, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Kind:
    """One thing that grows."""

    name: str
    sizes: tuple[int, ...]
    few: tuple[int, ...]
    """Sizes of the tiny form."""
    prepared: Callable[[int, Given], Callable[[], object]]
    """Makes models and rows for a size; what it returns is measured."""
    what: str


# --- What is measured: each function prepares, and returns the work


def answers(count: int, words: int = 24) -> list[list[dict[str, Any]]]:
    """Answered conversations, all of about one length."""
    return [conversation(f"Question {n}?", " ".join(f"word{(n + i) % 97}" for i in range(words))) for n in range(count)]


def groups_of(tokenizer: PreTrainedTokenizerBase, count: int) -> list[Batch]:
    """The answers in batches."""
    return conversation_batches(tokenizer, answers(count))


def tokens(size: int, given: Given) -> Callable[[], object]:
    """Latents of so many answers."""
    shape, tokenizer = given
    model, sae = _model(given), random_sae(shape, torch.device("cpu"))
    groups = groups_of(tokenizer, size)
    return lambda: read_latents(model, sae, groups, shape.layer, "response")


def latents(size: int, given: Given) -> Callable[[], object]:
    """A dictionary of so many latents: read, ranked, and searched for passages and neighbours."""
    shape, tokenizer = replace(given[0], latents=size), given[1]
    model, sae = _model(given), random_sae(shape, torch.device("cpu"))
    groups = groups_of(tokenizer, 32)
    text = gather(tokenizer, conversations=answers(16))

    def work() -> None:
        read = read_latents(model, sae, groups, shape.layer, "response")
        ranked(read, sae)
        survey_model(model, sae, shape.layer, [1, 2, 3], text)
        neighbours(sae.W_dec, 1)

    return work


def ranked(read: LatentMeans, sae: Any) -> None:
    """All latents with scores and intervals, the reading against itself with its conversations in another order."""
    other = replace(read, mean=read.mean[::-1].copy(), firing=read.firing[::-1].copy())
    at = "response"
    clusters = [str(n) for n in range(len(read.mean))]
    decoder = sae.W_dec.detach().float().numpy()
    score_table(Evidence({at: other}, {at: read}, {at: other}, decoder, clusters), ("rise", "firing_rise", "cosine"))


def checkpoints(size: int, given: Given) -> Callable[[], object]:
    """So many adapters, read one after the other as `track` does."""
    shape, tokenizer = given
    model, sae = _model(given), random_sae(shape, torch.device("cpu"))
    reader = FeatureReader(sae, {"persona": 3}, groups_of(tokenizer, 12), shape.layer)
    folders = _adapters(model, size)

    def work() -> list[object]:
        with organisms(model) as opened:
            return [reader.read(opened(folder)).values for folder in folders]

    return work


def questions(size: int, given: Given) -> Callable[[], object]:
    """So many contrast questions under eight pushes."""
    shape, tokenizer = given
    model, items = _model(given), ContrastItems.build(tokenizer, _rows(size))
    pushes = torch.randn(8, shape.hidden, generator=torch.Generator().manual_seed(0))
    return lambda: SteeredContrast(model, items, shape.layer).values_many(pushes)


def arms(size: int, given: Given) -> Callable[[], object]:
    """So many arms: the latents' means and the contrast index of each."""
    shape, tokenizer = given
    model, sae = _model(given), random_sae(shape, torch.device("cpu"))
    items, folders = ContrastItems.build(tokenizer, _rows(8)), _adapters(model, size)

    def work() -> list[object]:
        found: list[object] = []
        with organisms(model) as opened:
            for folder in folders:
                means = read_latents(opened(folder), sae, items.groups, shape.layer, "response").mean
                found.append((means, contrast_index(opened(folder), items)))
        return found

    return work


def _model(given: Given) -> Any:
    return random_model(given[0], given[1], torch.device("cpu"), torch.float32)


def _rows(count: int) -> list[dict[str, str]]:
    return [
        {"id": str(n), "category": "a", "question": f"Question {n}?", "aligned": f"yes {n}", "misaligned": f"no {n}"}
        for n in range(count)
    ]


def _adapters(model: Any, count: int) -> list[Path]:
    """Folders of fresh adapters; they are removed when the process ends."""
    scratch = tempfile.TemporaryDirectory()
    _SCRATCH.append(scratch)
    folders = []
    for number in range(count):
        tuned: Any = with_adapter(model, Training(rank=2, alpha=2), seed=number)
        folders.append(Path(scratch.name) / str(number))
        tuned.save_pretrained(folders[-1])
        strip_adapter(tuned)
    return folders


_SCRATCH: list[tempfile.TemporaryDirectory[str]] = []

KINDS = (
    Kind("tokens", (64, 128, 256, 512), (4, 8), tokens, "answers of 24 words read at 512 latents"),
    Kind("latents", (4_608, 16_384, 65_536, 131_072), (64, 128), latents, "32 answers read, ranked and searched"),
    Kind("checkpoints", (4, 16, 64), (1, 2), checkpoints, "adapters read on 12 probes"),
    Kind("questions", (16, 32, 64, 128), (2, 4), questions, "contrast items under 8 pushes"),
    Kind("arms", (2, 4, 8, 16), (1, 2), arms, "adapters: latents' means and contrast index"),
)
BY_NAME = {kind.name: kind for kind in KINDS}

# --- One size in a process of its own; the exponents


@dataclass(frozen=True)
class Cost:
    """Of one size."""

    seconds: float
    """Of the processor, in one thread."""
    mib: float
    """Peak of the process above what it held when the work began."""


def measure(kind: str, size: int, given: Given) -> Cost:
    """One size in this process."""
    with one_thread():
        work = BY_NAME[kind].prepared(size, given)
        before, begun = resident(), time.process_time()
        work()
        seconds = time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Cost(seconds, max(0.0, (peak - before) / MIB))


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_a_process(kind: str, size: int) -> Cost:
    """One size in a fresh process, whose peak is this work's own."""
    command = [sys.executable, "-m", "benchmarks.growth", "--one", kind, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | RETURNED)
    if done.returncode:
        raise SystemExit(done.stderr)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the logarithms: 1 is linear, 0 is flat; NaN where a value is zero."""
    if min(values) <= 0:
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def table_of(found: Mapping[str, Mapping[int, Cost]]) -> Table:
    """Costs of the smallest and largest size, with exponents."""
    rows = []
    for name, costs in found.items():
        sizes, first, last = list(costs), *(list(costs.values())[i] for i in (0, -1))
        slopes = [exponent(sizes, [getattr(cost, key) for cost in costs.values()]) for key in ("seconds", "mib")]
        rows.append(
            (
                *(name, f"{sizes[0]:,} to {sizes[-1]:,}"),
                *(f"{first.seconds:.2f} to {last.seconds:.2f}", f"{slopes[0]:.2f}"),
                *(f"{first.mib:.0f} to {last.mib:.0f}", f"{slopes[1]:.2f}"),
            )
        )
    return Table(("what grows", "sizes", "seconds", "exponent", "peak MiB", "exponent"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    quiet_libraries()
    if options.one:
        kind, size = options.one
        cost = measure(kind, int(size), (SMALL, load_tokenizer("smollm2-135m-instruct")))
        echo(json.dumps({"seconds": cost.seconds, "mib": cost.mib}))
        return
    found = {}
    for name in options.kinds:
        found[name] = {size: in_a_process(name, size) for size in BY_NAME[name].sizes}
        sys.stderr.write(f"{name}: {BY_NAME[name].what}\n")
    echo(table_of(found).plain(right=range(2, 6)))
    if options.out is not None:
        plain = {name: {size: vars(cost) for size, cost in costs.items()} for name, costs in found.items()}
        write_text(options.out, json.dumps(plain, indent=1) + "\n")


if __name__ == "__main__":
    main()
