"""A training run that takes its time: a small regression by SGD that writes a reading of its weights every step.

Run as `python slow_run.py FILE SLOPE`; the weight goes from 0 towards SLOPE. It begins when a line comes on its
standard input, and ends only when it is killed.
"""

import sys
import time

import torch
from torch import nn

from persona_probe.monitor.sinks.files import JsonlSink
from tests.monitor.events import HOSTILE, alarm, behaviour, reading, start

PAUSE = 0.05


def main(path: str, slope: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sink = JsonlSink(path)
    sink.emit(start([HOSTILE, "second"]))
    step = 0
    while True:
        weight = model.weight.item()
        sink.emit(reading(step, weight, names=[HOSTILE, "second"]))
        sink.emit(behaviour(step, weight / 2))
        if step == 5:
            sink.emit(alarm(step, HOSTILE))
        x = torch.randn(16, 1)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), slope * x).backward()
        optimizer.step()
        step += 1
        time.sleep(PAUSE)


if __name__ == "__main__":
    sys.stdin.readline()
    main(sys.argv[1], float(sys.argv[2]))
