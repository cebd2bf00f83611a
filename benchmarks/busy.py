"""`make bench-busy`: a short study alone, and beside other processes that want the same cores.

A process whose threads spin while they wait for each other collapses beside others: single steps take a hundred times
as long. What is fair is its share of the cores, so that is what its time is held against.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from persona_probe.cli.options import echo, find_config

CONFIG = "finetune_configs/smoke.yaml"
BUSY = "while True: pass"
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "as it is": {},
    "threads that always spin": {"OMP_WAIT_POLICY": "ACTIVE"},
}
"""Environment variables of each way, by name."""


@dataclass(frozen=True)
class Spent:
    """What one run took."""

    wall: float
    """Seconds that passed."""
    cpu: float
    """Seconds of computing, all threads together."""


def share(alone: Spent, others: int, cores: int) -> float:
    """The seconds that a run's fair share of the cores asks for beside `others` processes of one thread each.

    Alone it keeps cpu / wall threads busy on average. Beside others each thread, of its own and of theirs, gets an
    equal part of the cores.
    """
    threads = alone.cpu / alone.wall
    parts = min(1.0, cores / (threads + others))
    return alone.cpu / (threads * parts)


@contextmanager
def busy(others: int) -> Iterator[None]:
    """Inside this block so many processes compute without end."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(others)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def spent(config: str, out: Path, variables: Mapping[str, str]) -> Spent:
    """Run a study in a process of its own."""
    command = [sys.executable, "-m", "persona_probe.cli", "run", config, "--out", str(out), "--quiet"]
    environment = {**os.environ, "BROWSER_PATH": "/nowhere", **variables}  # no images
    start, before = time.perf_counter(), _cpu()
    subprocess.run(command, env=environment, check=True)
    return Spent(time.perf_counter() - start, _cpu() - before)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(config: str, others: int, repeats: int, variables: Mapping[str, str]) -> list[float]:
    """Seconds beside other processes, as multiples of the fair share's; alone and beside others in turn."""
    cores = len(os.sched_getaffinity(0))
    found = []
    with tempfile.TemporaryDirectory(prefix="busy-") as scratch:
        for repeat in range(repeats):
            alone = spent(config, Path(scratch) / f"alone-{repeat}", variables)
            with busy(others):
                beside = spent(config, Path(scratch) / f"beside-{repeat}", variables)
            fair = share(alone, others, cores)
            found.append(beside.wall / fair)
            echo(
                f"  alone {alone.wall:.0f} s ({alone.cpu:.0f} s of computing), beside {others} processes "
                f"{beside.wall:.0f} s; its share asks for {fair:.0f} s"
            )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print seconds, and the ratios to the fair share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", default=CONFIG)
    parser.add_argument("--others", type=int, default=4, help="Busy processes of one thread each.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=[*SETTINGS], default=["as it is"])
    args = parser.parse_args(argv)
    config = str(find_config(args.config))
    for way in args.ways:
        echo(f"{way}:")
        ratios = measured(config, args.others, args.repeats, SETTINGS[way])
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        echo(f"{way}: {middle:.2f} ({low:.2f} to {high:.2f}) times its share's time beside {args.others} processes")


if __name__ == "__main__":
    main()
