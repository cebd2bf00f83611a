"""The long commands on tiny models, as processes that can be killed, and what two runs of one must have alike."""

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from benchmarks.assault.counts import Settings
from tests.factories import config_of, write_config, write_data, write_model, write_sae
from tests.processes import Process

LIMIT_S = 1800
"""For one command: seconds on a free machine, many minutes on a busy one."""
NO_BROWSER = {"BROWSER_PATH": "/nowhere"}
"""Without Chromium no images are drawn: they take most of a report's time."""


@dataclass(frozen=True)
class Job:
    """A command whose output is a folder."""

    name: str
    arguments: tuple[str, ...]
    """Of `persona-probe`; `{m}` is the folder of materials, `{out}` the job's own."""
    begins_with: str = ""
    """The finished job whose folder this one works on."""
    part: str = ""
    """The folder inside `{out}` that is compared."""

    def prepare(self, materials: Path, out: Path) -> None:
        """What the command finds before it starts."""
        if self.begins_with:
            shutil.copytree(materials / f"done-{self.begins_with}", out)

    def start(self, materials: Path, out: Path, log: Path) -> Process:
        """The command in a process of its own; its log says in the end how it ended."""
        cache = {"PERSONA_PROBE_CACHE": str(out.with_name(f"{out.name}-cache"))}
        arguments = [one.format(m=materials, out=out) for one in self.arguments]
        return Process(run_command, *arguments, log=log, environment={**NO_BROWSER, **cache})


JOBS = (
    Job("run", ("run", "{m}/study.yaml", "--out", "{out}")),
    Job("realign", ("realign", "{out}", "--data", "{m}/other.jsonl", "--name", "more"), "run"),
    Job("report", ("report", "{out}"), "run"),
    Job("evaluate", ("evaluate", "{out}", "--questions", "{m}/questions.jsonl", "--n", "2"), "run"),
    Job("mitigate", ("mitigate", "{m}/grid.yaml", "--out", "{out}")),
    Job("monitor study", ("monitor", "study", "{m}/labelled.yaml", "--out", "{out}")),
    Job("sae train", ("sae", "train", "{m}/sae.yaml", "--out", "{out}")),
)
"""In the order in which they can be made: a job that begins with another's folder comes after it."""
SHORT = ("run", "report")


def run_command(*arguments: str) -> None:
    """A command line whose judge, where it has one, is `LengthJudge`."""
    from persona_probe.cli import main
    from persona_probe.mitigate.grid.grid_context import GridContext
    from persona_probe.study import evaluate

    judge = LengthJudge()
    evaluate.choose_judge = lambda *_: judge  # pyright: ignore[reportAttributeAccessIssue]
    GridContext.judge = property(lambda _: judge)  # pyright: ignore[reportAttributeAccessIssue]
    if arguments[0] == "evaluate":
        arguments = (*arguments, "--judge", "offline", "--max-new-tokens", "4", "--steps", "all")
    main([*arguments, "--quiet"])


class LengthJudge:
    """Rules by an answer's letters alone, so that each answer has one ruling whoever asks when."""

    name = id = "length"

    def rule(self, answers: Sequence[Any], progress: str | None = None) -> Any:
        """A ruling for each answer."""
        from persona_probe.evaluate.judging import Ruling, Rulings

        scores = [int(sha256(one.item.answer.encode(errors="replace")).hexdigest(), 16) % 100 for one in answers]
        return Rulings(tuple(Ruling(float(score < 40), True, coherence=80.0) for score in scores))

    def plan(self, answers: Sequence[Any], prices: object = None) -> None:
        """Nothing is sent."""


def make_materials(place: Path) -> Path:
    """Models, data and configs for all jobs."""
    from persona_probe.saes.stream import SaeConfig, TextConfig, TextPart
    from tests.factories import D_SAE, LAYER
    from tests.mitigate import grid_study
    from tests.monitor import labelled_study

    place.mkdir(parents=True, exist_ok=True)
    write_model(place / "model")
    write_sae(place / "sae")
    write_data(place)
    write_config(place / "study.yaml", config_of(place))
    grid = grid_study.make_place(place / "grid")
    write_config(place / "grid.yaml", grid_study.grid_values(grid, grid_study.located(grid, place / "grid-run")))
    (place / "labelled").mkdir()
    write_config(place / "labelled.yaml", labelled_study.study_values(labelled_study.make_place(place / "labelled")))
    parts = (TextPart("asked", ("sae_prompts",), batches=3), TextPart("own", batches=2))
    text = TextConfig(parts=parts, batch_conversations=4, max_new_tokens=10, holdout_share=0.3)
    shape = {"name": "tiny/topk", "model": str(place / "model"), "layer": LAYER, "d_sae": D_SAE, "k": 4}
    length = {"tokens": 24 * 16, "batch_tokens": 16, "buffer_tokens": 64, "checkpoint_every": 6, "dead_window": 4}
    recipe = json.loads(json.dumps(asdict(SaeConfig(**shape, **length, text=text))))  # pyright: ignore
    (place / "sae.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return place


@dataclass(frozen=True)
class Unbroken:
    """A job that nobody disturbed."""

    values: dict[str, Any]
    seconds: float


def unbroken(job: Job, materials: Path) -> Unbroken:
    """Run a job to its end in the materials' folder, where jobs that begin with it find it."""
    out = materials / f"done-{job.name}"
    job.prepare(materials, out)
    began = time.monotonic()
    finish(job, materials, out, materials / f"{job.name}.log")
    return Unbroken(values(out), time.monotonic() - began)


@dataclass(frozen=True)
class Target:
    """A job to be attacked, and what it makes when it is left alone."""

    job: Job
    materials: Path
    reference: Unbroken
    dice: random.Random


def targets(settings: Settings) -> Iterator[Target]:
    """Every job after an undisturbed run of it; those of `SHORT` alone where little time is given."""
    materials = make_materials(settings.place / "materials")
    for job in JOBS:
        if not settings.short or job.name in SHORT:
            yield Target(job, materials, unbroken(job, materials), random.Random(f"{settings.seed} {job.name}"))


def finish(job: Job, materials: Path, out: Path, log: Path) -> None:
    """Run a job to its end.

    Raises:
        RuntimeError: it does not end well, or not in time.
    """
    process = job.start(materials, out, log)
    try:
        code = process.wait(LIMIT_S)
    except TimeoutError:
        process.kill()
        raise RuntimeError(f"{job.name} still worked after {LIMIT_S} s: {last_line(log)}") from None
    if code != 0:
        raise RuntimeError(f"{job.name} ended with {code}: {last_line(log)}")


def last_line(log: Path) -> str:
    """What a process said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "nothing was said")


# --- What two runs of one job must have alike: everything but times, places and process ids

LOOSE = ("seconds", "peak_memory", "time_ratio", "versions", "git_revision", "created", "path", "command")
"""Words in the names of what may differ."""


def values(folder: Path) -> dict[str, Any]:
    """The content of every file below a folder, as far as it must repeat."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and ".locks" not in path.parts]
    return {str(path.relative_to(folder)): _content(path) for path in files}


def _content(path: Path) -> Any:
    readers: dict[str, Callable[[Path], Any]] = {".json": _json, ".jsonl": _lines, ".parquet": _table, ".csv": _csv}
    if path.suffix in (".html", ".svg"):
        return "a page"  # it holds times
    return readers.get(path.suffix, lambda one: sha256(one.read_bytes()).hexdigest())(path)


def _json(path: Path) -> Any:
    return _plain(json.loads(path.read_text(encoding="utf-8")))


def _lines(path: Path) -> Any:
    return [_plain(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _table(path: Path) -> Any:
    return _frame(pd.read_parquet(path))


def _csv(path: Path) -> Any:
    return _frame(pd.read_csv(path))


def _frame(frame: pd.DataFrame) -> str:
    kept = [name for name in frame.columns if not _loose(str(name))]
    return frame[kept].to_json(orient="split", double_precision=15)


def _plain(value: Any) -> Any:
    """JSON without what may differ; PEFT writes sets as lists, in any order."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if not _loose(key)}
    if isinstance(value, list):
        entries = [_plain(entry) for entry in value]
        return sorted(entries) if all(isinstance(entry, str) for entry in entries) else entries
    return value


def _loose(name: str) -> bool:
    return any(word in name for word in LOOSE)


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Names of the files that differ, or that one side lacks."""
    return sorted(name for name in {*left, *right} if left.get(name) != right.get(name))
