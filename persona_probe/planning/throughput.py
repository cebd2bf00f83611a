"""How fast this device multiplies, to turn work into time."""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from persona_probe.context import pick_device

UTILISATION = 0.4
"""Share of a bare product's speed that a whole stage is assumed to reach."""
TOKENS, WIDTH = 512, 2048
BUDGET_S = 0.4


@dataclass(frozen=True)
class Throughput:
    """Floating-point operations per second, and how that was found."""

    flops: float
    how: str


def throughput(device: str, mixed_precision: bool, tflops: float | None = None) -> Throughput:
    """What a stage is assumed to sustain: `tflops` as given, else a share of a product measured here (under 1 s).

    Raises:
        InputError: a device that this machine does not have, where no `tflops` is given.
    """
    if tflops is not None:
        return Throughput(tflops * 1e12, f"{tflops:g} TFLOP/s as given")
    where = pick_device(device)
    speed = product_speed(where, mixed_precision)
    kind = "bf16 autocast" if mixed_precision else "float32"
    return Throughput(
        UTILISATION * speed,
        f"{UTILISATION:.0%} of the {speed / 1e12:.3g} TFLOP/s that one {kind} product reached on {where} just now",
    )


def product_speed(device: str, mixed_precision: bool) -> float:
    """Operations per second of one linear map (512 tokens, 2048 x 2048), the cast of its weights included."""
    x, weights = torch.ones(TOKENS, WIDTH, device=device), torch.ones(WIDTH, WIDTH, device=device)
    best = float("inf")
    kind = torch.device(device).type
    with torch.no_grad(), torch.autocast(kind, dtype=torch.bfloat16, enabled=mixed_precision):
        begun = time.perf_counter()
        while time.perf_counter() - begun < BUDGET_S:
            start = time.perf_counter()
            F.linear(x, weights)
            if kind == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
    return 2 * TOKENS * WIDTH * WIDTH / best
