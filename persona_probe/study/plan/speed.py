"""How long a stage takes on this machine: its work, turned into time by the speed of a small piece of such work."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from persona_probe.context import pick_device
from persona_probe.study.plan.estimate import Work

UTILISATION = 0.4
"""Share of a bare product's speed that a whole stage is assumed to reach on a GPU."""
TOKENS, WIDTH = 512, 2048
"""Of the product that is timed on a GPU."""
LAYER, ROWS = (576, 9, 1536), (8, 64)
"""Of the layer that is timed on a CPU: width, heads and inner width; rows and their tokens."""
BUDGET_S = 0.4


@dataclass(frozen=True)
class Pace:
    """What a stage reaches on a CPU."""

    share: float
    """Of the speed of one layer (`layer_speed`), on the stage's operations."""
    start: float
    """Seconds that it takes whatever the study's size: imports, models, files, figures."""


CPU_PACE = {
    "induce": Pace(0.67, 10),
    "locate": Pace(1.1, 15),
    "track": Pace(0.75, 3),
    "realign": Pace(0.9, 4),
    "evaluate": Pace(0.31, 4),
    "report": Pace(1, 20),
}
"""Measured on the demo and the smoke config, on two cores; tests/study/plan/stage_seconds.json has the runs."""


@dataclass(frozen=True)
class Throughput:
    """Floating-point operations per second, and how that was found."""

    flops: float
    how: str
    paces: Mapping[str, Pace] = field(default_factory=dict[str, Pace])
    """By stage, where `flops` is that of one layer; other stages sustain `flops`."""

    def seconds(self, work: Work) -> float:
        """Wall seconds of one stage, on a machine that does nothing else."""
        pace = self.paces.get(work.stage, Pace(1.0, 0.0))
        return pace.start + work.flops / (pace.share * self.flops)


def throughput(device: str, bf16: bool, tflops: float | None = None) -> Throughput:
    """What a stage is assumed to sustain: `tflops` as given, else by what is measured here (about 1 s).

    Raises:
        InputError: a device that this machine does not have, where no `tflops` is given.
    """
    if tflops is not None:
        return Throughput(tflops * 1e12, f"{tflops:g} TFLOP/s as given")
    where, kind = pick_device(device), "bf16 autocast" if bf16 else "float32"
    if torch.device(where).type != "cpu":
        speed = product_speed(where, bf16)
        how = f"{UTILISATION:.0%} of the {speed / 1e12:.3g} TFLOP/s that one {kind} product reached on {where} just now"
        return Throughput(UTILISATION * speed, how)
    speed, threads = layer_speed(bf16), torch.get_num_threads()
    reached = f"the {speed / 1e12:.3g} TFLOP/s that one layer in {kind} reached just now"
    return Throughput(speed, f"each stage's measured share of {reached}, in {threads} threads", CPU_PACE)


def layer_speed(bf16: bool) -> float:
    """Operations per second of forward and backward of one Transformer layer on this CPU.

    It is the speed of one thread in the processor's time, times the threads: other work on the machine does not change
    it. A bare product would not do: two processors whose products differed by three trained equally fast.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        layer = torch.nn.TransformerEncoderLayer(*LAYER, dropout=0.0, batch_first=True, norm_first=True)
        weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim > 1)
        x = torch.ones(*ROWS, LAYER[0])

        def train() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                out = layer(x)
            out.float().sum().backward()

        return threads * 6 * weights * ROWS[0] * ROWS[1] / _fastest(train, time.thread_time)
    finally:
        torch.set_num_threads(threads)


def product_speed(device: str, bf16: bool) -> float:
    """Operations per second of one linear map (512 tokens, 2048 x 2048) on a GPU, the cast of its weights included."""
    kind = torch.device(device).type
    x, weights = torch.ones(TOKENS, WIDTH, device=device), torch.ones(WIDTH, WIDTH, device=device)

    def multiply() -> None:
        F.linear(x, weights)
        if kind == "cuda":
            torch.cuda.synchronize(device)

    with torch.no_grad(), torch.autocast(kind, dtype=torch.bfloat16, enabled=bf16):
        return 2 * TOKENS * WIDTH * WIDTH / _fastest(multiply, time.perf_counter)


def _fastest(work: Callable[[], None], clock: Callable[[], float]) -> float:
    """Seconds of the fastest of several calls."""
    best, begun = float("inf"), clock()
    while clock() - begun < BUDGET_S:
        start = clock()
        work()
        best = min(best, clock() - start)
    return best
