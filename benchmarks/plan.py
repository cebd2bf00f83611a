"""`make bench-plan`: the dry run's memory, stage by stage, next to the peak that each stage really reached."""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from persona_probe.cli.options import DEMO, echo, find_config
from persona_probe.config import Locate, Samples, StudyConfig, load_config
from persona_probe.data.load import load_contrast
from persona_probe.report.tables import Table, check_page, fill_page
from persona_probe.writing import write_jsonl

GIB = 2**30
STAGES = ("induce", "locate", "track", "realign", "evaluate")
CASES = {
    "float32": {},
    "bfloat16": {"weights": "bfloat16"},
    "4bit": {"weights": "bfloat16", "quantization": "4bit"},
    "checkpointing": {"gradient_checkpointing": True},
}
"""Settings of the demo's model by name; a key of `training` is put there."""
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
"""glibc gives freed memory back at once, so that a process holds what is in use, as a GPU's allocator counts it."""
SPLITS = ("selection", "evaluation")
WITHIN = 0.15
PLAN_MARKS = ("<!-- plan: begin -->", "<!-- plan: end -->")
CARD_MARKS = ("<!-- card: begin -->", "<!-- card: end -->")


ITEMS = 16
"""Contrast items of each split: a whole batch of 32 answers. More take longer, and no more memory."""


def case(name: str, folder: Path) -> StudyConfig:
    """The demo with few steps and items: its batches are the demo's own, and so is its memory."""
    config = load_config(find_config(DEMO))
    changes = dict(CASES[name])
    training = replace(config.training, steps=2, checkpoints=(2,))
    training = replace(training, **{k: changes.pop(k) for k in list(changes) if hasattr(training, k)})
    contrast = write_jsonl(folder / "contrast.jsonl", (row for split in SPLITS for row in _longest(split)))
    return replace(
        config,
        name=name,
        contrast=str(contrast),
        training=training,
        locate=Locate(candidates=2, proven=2, random_latents=2, random_directions=1, strengths=(0.5,), cards=2),
        realign=replace(config.realign, steps=2, readings=(0, 2)),
        monitor=replace(config.monitor, limit=32),
        samples=Samples(max_new_tokens=8),
        device="cpu",
        **changes,
    )


def _longest(split: str) -> list[dict[str, str]]:
    rows = sorted(load_contrast(split), key=lambda row: len(row["misaligned"] + row["question"]), reverse=True)
    return [{**row, "split": split} for row in rows[:ITEMS]]


def estimated(config: StudyConfig) -> dict[str, float]:
    """The plan's bytes by stage."""
    from persona_probe.study.plan.plan import dry_run

    return {work.stage: work.memory for work in dry_run(config, tflops=1.0).stages}


def measured(name: str, folder: Path) -> dict[str, float]:
    """Bytes at each stage's peak above a process that has only imported the libraries; one process for each stage."""
    peaks = {}
    for stage in STAGES:
        command = [sys.executable, "-m", "benchmarks.plan", "--stage", stage, "--cases", name, "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | RETURNED)
        if done.returncode:
            raise SystemExit(done.stderr)
        sys.stderr.write(f"{name} {stage}\n")
        peaks[stage] = json.loads(done.stdout.splitlines()[-1])["bytes"]
    return peaks


def run_stage(name: str, stage: str, folder: Path) -> None:
    """One stage of the study in this process; prints its peak."""
    import datasets  # noqa: F401
    import sae_lens  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401

    from persona_probe.latents.stage import locate
    from persona_probe.models.quiet import quiet_libraries
    from persona_probe.study.study import Study

    quiet_libraries()
    before = resident()
    study = Study.from_config(case(name, folder), folder / "run")
    study.check()  # loads model and SAE, as `run` does before the first stage
    if stage == "locate":
        locate(study.context)  # without feature cards, which the plan leaves out
    else:
        getattr(study, stage)()
    echo(json.dumps({"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}))


def resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def compared(names: Sequence[str]) -> tuple[Table, float]:
    """Plan and measurement by case and stage, and the largest error of a case's peak."""
    rows, worst = [], 0.0
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found, plan = measured(name, Path(folder)), estimated(case(name, Path(folder)))
        rows += [(name, stage, *_cells(plan[stage], found[stage])) for stage in STAGES]
        peak = max(plan.values()), max(found.values())
        worst = max(worst, abs(peak[0] / peak[1] - 1))
        rows.append((name, "at most", *_cells(*peak)))
    return Table(("case", "stage", "plan", "measured", "plan / measured"), rows), worst


def _cells(plan: float, found: float) -> tuple[str, ...]:
    return f"{plan / GIB:.2f} GiB", f"{found / GIB:.2f} GiB", f"{plan / found:.2f}"


def card(gib: float) -> Table:
    """What each preset of a chat model needs on a GPU of this size, and the plan's advice where it does not fit."""
    from persona_probe.study.plan.estimate import Shapes, estimate
    from persona_probe.study.plan.fit import fit, needed
    from persona_probe.study.plan.shapes import find_sae, find_skeleton
    from persona_probe.study.presets.known_presets import MODELS
    from persona_probe.study.presets.preset import WIDTH
    from persona_probe.study.presets.preset_text import row_sets

    rows = []
    for preset in MODELS:
        skeleton, config = find_skeleton(preset.original or preset.model), preset.config()
        assert skeleton is not None
        d_sae = (find_sae(preset.sae).d_sae or 0) if preset.published else WIDTH * preset.d_model
        shapes = Shapes(config, skeleton, preset.layer, d_sae, row_sets(False), "cuda")

        def peak(settings: StudyConfig, shapes: Shapes = shapes) -> float:
            return max(work.memory for work in estimate(replace(shapes, config=settings)))

        found = fit(config, gib * GIB, peak)
        advice = "fits" if found.fits else ", ".join(f"`{change}`" for change in found.changes)
        then = "" if found.fits or found.then is None else f"{needed(found.then) / GIB:.1f} GiB"
        fits = found.fits or (found.then is not None and needed(found.then) <= found.limit)
        rows.append(
            (f"`{preset.name}`", f"{needed(found.peak) / GIB:.1f} GiB", advice if fits else "does not fit", then)
        )
    return Table(("preset", "needs", "setting that makes it fit", "then needs"), rows)


def main() -> None:
    """Measure, or plan for a card, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES)[:3], choices=list(CASES))
    parser.add_argument(
        "--card", type=float, metavar="GIB", help="what every preset needs on a GPU of this size instead"
    )
    parser.add_argument("--page", type=Path, help="Markdown page whose table is filled in")
    parser.add_argument("--stage", choices=STAGES, help="run one stage of one case in this process")
    parser.add_argument("--folder", type=Path, help="its files")
    options = parser.parse_args()
    if options.stage:
        run_stage(options.cases[0], options.stage, options.folder)
        return
    marks = CARD_MARKS if options.card else PLAN_MARKS
    if options.page:
        check_page(options.page, marks)  # before a quarter of an hour of measuring
    table, worst = (card(options.card), None) if options.card else compared(options.cases)
    echo(table.plain(right=range(2, 5)))
    if worst is not None:
        echo(f"largest error of a study's peak: {worst:.0%} (wanted: at most {WITHIN:.0%})")
    if options.page:
        fill_page(options.page, marks, table.markdown())


if __name__ == "__main__":
    main()
