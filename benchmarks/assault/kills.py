"""SIGKILL at random moments: every killed command, started again, must end as if nothing had happened."""

import shutil
import signal
import time
from pathlib import Path

from benchmarks.assault.counts import Count, Settings
from benchmarks.assault.jobs import LIMIT_S, Job, Target, differences, finish, last_line, targets
from benchmarks.assault.jobs import values as values_of

KILLS = 8
"""Of each command."""
IN_A_ROW = 3
"""Most kills of one folder before it may end."""


def assault(settings: Settings) -> list[Count]:
    """Kill each command, and compare what comes of it with an undisturbed run."""
    counts = []
    for target in targets(settings):
        kills, failures, folders = 0, list[str](), 0
        while kills < (2 if settings.short else KILLS):
            out, folders = settings.place / f"{target.job.name}-{folders}", folders + 1
            done, failure = attack(target, out)
            kills += done
            failures += [failure] if failure else []
            shutil.rmtree(out, ignore_errors=True)
        counts.append(Count(f"SIGKILL during {target.job.name}, which then ends with equal tables", kills, failures))
    return counts


def attack(target: Target, out: Path) -> tuple[int, str]:
    """Kill one folder's command once or more, then let it end; the number of kills, and what is wrong."""
    job, materials, reference, dice = target.job, target.materials, target.reference, target.dice
    job.prepare(materials, out)
    log, kills = out.with_suffix(".log"), 0
    for _ in range(dice.randint(1, IN_A_ROW)):
        kills += kill(job, materials, out, log, dice.uniform(0, reference.seconds))
    try:
        finish(job, materials, out, log)
    except RuntimeError as error:
        return kills, str(error)
    differing = differences(reference.values, values_of(out))
    return kills, f"after {kills} kills other content in {', '.join(differing[:5])}" if differing else ""


def kill(job: Job, materials: Path, out: Path, log: Path, after: float) -> bool:
    """Start a command and kill it after some seconds; whether it was still at work."""
    process = job.start(materials, out, log)
    until = time.monotonic() + after
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    code = process.wait(LIMIT_S)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{job.name} ended with {code} before it was killed: {last_line(log)}")
    return code == -signal.SIGKILL
