"""How long a stage takes on this machine: its work, turned into time by the speed of a product."""

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
BUDGET_S = 0.4


@dataclass(frozen=True)
class Pace:
    """What a stage reaches on a CPU."""

    share: float
    """Of a bare product's speed, on the stage's operations."""
    start: float
    """Seconds that it takes whatever the study's size: imports, models, files, figures."""


CPU_PACE = {
    "induce": Pace(0.15, 10),
    "locate": Pace(0.42, 15),
    "track": Pace(0.25, 3),
    "realign": Pace(0.18, 4),
    "evaluate": Pace(0.075, 4),
    "report": Pace(1, 20),
}
"""Measured on the demo and the smoke config, on two cores; tests/study/plan/stage_seconds.json has the runs."""


@dataclass(frozen=True)
class Throughput:
    """Floating-point operations per second, and how that was found."""

    flops: float
    how: str
    paces: Mapping[str, Pace] = field(default_factory=dict[str, Pace])
    """By stage, where `flops` is that of a bare product; other stages sustain `flops`."""

    def seconds(self, work: Work) -> float:
        """Wall seconds of one stage, on a machine that does nothing else."""
        pace = self.paces.get(work.stage, Pace(1.0, 0.0))
        return pace.start + work.flops / (pace.share * self.flops)


def throughput(device: str, bf16: bool, tflops: float | None = None) -> Throughput:
    """What a stage is assumed to sustain: `tflops` as given, else by a product measured here (under 1 s).

    Raises:
        InputError: a device that this machine does not have, where no `tflops` is given.
    """
    if tflops is not None:
        return Throughput(tflops * 1e12, f"{tflops:g} TFLOP/s as given")
    where = pick_device(device)
    speed = product_speed(where, bf16)
    kind = "bf16 autocast" if bf16 else "float32"
    reached = f"the {speed / 1e12:.3g} TFLOP/s that one {kind} product reached on {where} just now"
    if torch.device(where).type == "cpu":
        threads = torch.get_num_threads()
        return Throughput(speed, f"each stage's measured share of {reached}, in {threads} threads", CPU_PACE)
    return Throughput(UTILISATION * speed, f"{UTILISATION:.0%} of {reached}")


def product_speed(device: str, bf16: bool) -> float:
    """Operations per second of one linear map (512 tokens, 2048 x 2048), the cast of its weights included.

    On a CPU it is the speed of one thread in the processor's time, times the threads: other work on the machine does
    not change it.
    """
    kind = torch.device(device).type
    if kind != "cpu":
        return _fastest(device, bf16, time.perf_counter)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return threads * _fastest(device, bf16, time.thread_time)
    finally:
        torch.set_num_threads(threads)


def _fastest(device: str, bf16: bool, clock: Callable[[], float]) -> float:
    x, weights = torch.ones(TOKENS, WIDTH, device=device), torch.ones(WIDTH, WIDTH, device=device)
    best, kind = float("inf"), torch.device(device).type
    with torch.no_grad(), torch.autocast(kind, dtype=torch.bfloat16, enabled=bf16):
        begun = clock()
        while clock() - begun < BUDGET_S:
            start = clock()
            F.linear(x, weights)
            if kind == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, clock() - start)
    return 2 * TOKENS * WIDTH * WIDTH / best
