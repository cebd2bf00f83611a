"""Two processes on one folder: one works, the other is told so in one line, and nothing is spoiled."""

import random
import shutil
import time
from pathlib import Path

from benchmarks.assault.counts import Count, Settings
from benchmarks.assault.jobs import (
    JOBS,
    LIMIT_S,
    Job,
    Unbroken,
    differences,
    finish,
    last_line,
    make_materials,
    unbroken,
)
from benchmarks.assault.jobs import values as values_of

STARTS = 3
"""Of each command: 21 in all."""
SHORT = ("run", "report")


def assault(settings: Settings) -> list[Count]:
    """Start each command twice."""
    materials = make_materials(settings.place / "materials")
    counts = []
    for job in JOBS:
        if settings.short and job.name not in SHORT:
            continue
        reference = unbroken(job, materials)
        dice = random.Random(f"{settings.seed} {job.name}")
        tries, failures = 1 if settings.short else STARTS, list[str]()
        for number in range(tries):
            out = settings.place / f"{job.name}-{number}"
            # At once, or while the first is at work.
            failure = twice(job, materials, out, reference, 0.0 if number == 0 else dice.uniform(0, reference.seconds))
            failures += [failure] if failure else []
            shutil.rmtree(out, ignore_errors=True)
        what = f"{job.name} twice in one folder: one works, the other is told or finds it done; equal tables"
        counts.append(Count(what, tries, failures))
    return counts


def twice(job: Job, materials: Path, out: Path, reference: Unbroken, apart: float) -> str:
    """Two processes, the second some seconds after the first; what is wrong."""
    job.prepare(materials, out)
    logs = [out.with_suffix(f".{number}.log") for number in (1, 2)]
    first = job.start(materials, out, logs[0])
    time.sleep(apart)
    both = (first, job.start(materials, out, logs[1]))
    codes = [process.wait(LIMIT_S) for process in both]
    for code, log in zip(codes, logs, strict=True):
        if code not in (0, 2) or (code == 2 and "in use by process" not in last_line(log)):
            return f"{apart:.1f} s apart one ended with {code}: {last_line(log)}"
    if codes == [2, 2]:
        return f"{apart:.1f} s apart both were refused: {last_line(logs[0])}"
    try:
        finish(job, materials, out, logs[0])
    except RuntimeError as error:
        return str(error)
    differing = differences(reference.values, values_of(out))
    return f"{apart:.1f} s apart other content in {', '.join(differing[:5])}" if differing else ""
