"""`study.realign`: the config's arms, or corrections of one's own beside them, and stress tests of either."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from persona_probe.context import Context
from persona_probe.data.readers import read_conversations
from persona_probe.errors import InputError, unknown
from persona_probe.finetune.realign import realign
from persona_probe.finetune.realignment.bench import Bench
from persona_probe.finetune.realignment.correct import ROWS, SPEC, checkpoint_in, correct, place_of
from persona_probe.finetune.realignment.spec import Correction
from persona_probe.finetune.realignment.verdict import write_verdict
from persona_probe.finetune.stress.run import TESTS, run_stress

log = logging.getLogger(__name__)

WITHOUT_DATA = {"rows": None, "choose_by": "random", "method": "continued", "name": None}
"""Settings that say nothing where there is no data."""


def realign_study(
    ctx: Context,
    data: str | Sequence[str] | None,
    seeds: Sequence[int] | None,
    stress: Sequence[str],
    settings: Mapping[str, Any],
) -> list[Path]:
    """What `study.realign` does; see there. `settings`: rows, choose_by, method, name.

    Returns:
        The folders of corrections and of stress tests.
    """
    for test in stress:
        if test not in TESTS:
            raise unknown("stress test", test, TESTS)
    wanted = tuple(seeds or ctx.config.seeds)
    if missing := [seed for seed in wanted if seed not in ctx.config.seeds]:
        raise InputError(f"the study has no seed {missing[0]}: its seeds are {list(ctx.config.seeds)}")
    if data is not None:
        return correct_all(ctx, data, wanted, stress, settings)
    if given := [key for key, value in settings.items() if value != WITHOUT_DATA[key]]:
        raise InputError(f"{given[0]} needs corrective data: name a packaged set or a file")
    realign(ctx)
    return stress_arms(ctx, wanted, stress) if stress else []


def correct_all(
    ctx: Context,
    data: str | Sequence[str],
    seeds: Sequence[int],
    stress: Sequence[str],
    settings: Mapping[str, Any],
) -> list[Path]:
    """A correction of each seed, with its stress tests and verdict; what is there already is kept."""
    changes = {key: value for key, value in settings.items() if key != "name"}
    correction, bench = Correction.of_study(ctx.config, data, **changes), Bench(ctx)
    folders = [correct(bench, correction, seed, settings["name"] or correction.name) for seed in seeds]
    for seed, folder in zip(seeds, folders, strict=True):
        if stress:
            stress_correction(ctx, folder, seed, stress)
        write_verdict(ctx, folder)
    return folders


def stress_correction(ctx: Context, folder: Path, seed: int, tests: Sequence[str]) -> None:
    """Stress tests of a correction, into its own folder."""
    arm = json.loads((folder / SPEC).read_text(encoding="utf-8"))["name"]
    corrective = read_conversations(folder / ROWS)
    run_stress(ctx, arm, seed, tests, folder, checkpoint=checkpoint_in(folder), corrective=corrective)


def stress_arms(ctx: Context, seeds: Sequence[int], tests: Sequence[str]) -> list[Path]:
    """Stress tests of the config's corrective arms, into RUN/realign/<arm>-s<seed>/."""
    folders = []
    for seed in seeds:
        for arm in ctx.config.realign.arms:
            folder = ctx.run.path / place_of(arm, seed)
            run_stress(ctx, arm, seed, tests, folder)
            folders.append(folder)
    return folders
