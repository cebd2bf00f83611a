"""Two processes on one folder: one works, the other is told so in one line, and nothing is spoiled."""

import shutil
import time
from pathlib import Path

from benchmarks.assault.counts import Count, Settings
from benchmarks.assault.jobs import LIMIT_S, Target, differences, finish, last_line, targets
from benchmarks.assault.jobs import values as values_of

STARTS = 3
"""Of each command: 21 in all."""


def assault(settings: Settings) -> list[Count]:
    """Start each command twice."""
    counts = []
    for target in targets(settings):
        tries, failures = 1 if settings.short else STARTS, list[str]()
        for number in range(tries):
            out = settings.place / f"{target.job.name}-{number}"
            # At once, or while the first is at work.
            apart = 0.0 if number == 0 else target.dice.uniform(0, target.reference.seconds)
            failures += [failure] if (failure := twice(target, out, apart)) else []
            shutil.rmtree(out, ignore_errors=True)
        what = f"{target.job.name} twice in one folder: one works, the other is told or finds it done; equal tables"
        counts.append(Count(what, tries, failures))
    return counts


def twice(target: Target, out: Path, apart: float) -> str:
    """Two processes, the second some seconds after the first; what is wrong."""
    job, materials, reference = target.job, target.materials, target.reference
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
