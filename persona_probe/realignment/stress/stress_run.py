"""Run stress tests of a correction: each once, in its own folder, and all as one table."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from persona_probe.context import Context
from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError, unknown
from persona_probe.realignment.corrected import CorrectedOrganism
from persona_probe.realignment.spec import StressSettings
from persona_probe.realignment.stress.drift import drift
from persona_probe.realignment.stress.hidden import hidden
from persona_probe.realignment.stress.length import length
from persona_probe.realignment.stress.remisalign import Keep, remisalign
from persona_probe.realignment.stress.stress_table import StressResult, as_table
from persona_probe.realignment.stress.triggers import triggers
from persona_probe.report.export import write_figure
from persona_probe.report.records import Records
from persona_probe.runs import RunFolder, file_sha256, same_settings
from persona_probe.units import writes_run

TABLE, RECORD, PARTS = "stress.parquet", "stress.json", "stress"


Test = Callable[[CorrectedOrganism, StressSettings, Keep], StressResult]
TESTS: Mapping[str, Test] = {
    "triggers": lambda corrected, s, _: triggers(corrected, s.trigger_draws),
    "remisalign": lambda corrected, s, keep: remisalign(
        corrected, keep, s.bad_rows, s.relearn_steps, s.relearn_seeds, s.back_at
    ),
    "length": lambda corrected, s, _: length(corrected, s.length_rows),
    "hidden": lambda corrected, s, _: hidden(corrected, s.latents),
    "drift": lambda corrected, s, _: drift(corrected, s.drift_factor),
}
"""Stress tests by name."""
FROM_ROWS = ("triggers", "remisalign", "length")
"""Those that use the rows of the organism's training."""


def refuse_unknown_rows(ctx: Context, tests: Sequence[str]) -> None:
    """Refuse tests that use training rows where those of an adopted arm are not known.

    Raises:
        InputError: the test, and how to name the rows.
    """
    start = ctx.config.realign.start
    if (without := [name for name in tests if name in FROM_ROWS]) and not ctx.config.arms[start].data:
        raise InputError(
            f"the stress test {without[0]!r} needs the rows that arm {start!r} was trained on, which are not known: "
            f"adopt it with --data {start}=FILE"
        )


@writes_run
def run_stress(
    ctx: Context,
    arm: str,
    seed: int,
    tests: Sequence[str],
    out_folder: str | Path,
    *,
    checkpoint: Path | None = None,
    corrective: Sequence[Conversation] | None = None,
    settings: StressSettings | None = None,
) -> pd.DataFrame:
    """Run the stress tests of a corrected organism that are not in `out_folder` yet; finished ones are kept.

    Writes stress.parquet (columns: `stress_table.COLUMNS`) and stress.json (what was tested, and a statement for each
    test) into `out_folder`, parts below `stress/`, and the figure as stress.html with its numbers in stress.csv.

    Args:
        arm: a corrective arm of the study's config, or the name of a correction.
        tests: names of `TESTS`; an empty list only reads the results so far.
        checkpoint: of that correction; its rows are then needed too (`corrective`).
        settings: how hard the tests press; None takes the defaults of `StressSettings`.

    Returns:
        The rows of all tests that are finished, in the order of `TESTS`.

    Raises:
        InputError: an unknown test or arm, or a folder with tests of another correction or of other settings.
    """
    for name in tests:
        if name not in TESTS:
            raise unknown("stress test", name, TESTS)
    corrected, settings = CorrectedOrganism.of(ctx, arm, seed, checkpoint, corrective), settings or StressSettings()
    refuse_unknown_rows(ctx, tests)
    folder = RunFolder(Path(out_folder))
    _claim(folder, corrected, settings)
    for name in TESTS:
        if name in tests and not folder.has(f"{PARTS}/{name}.json"):
            with ctx.run.timed("stress"):
                _run_one(folder, name, corrected, settings)
    return _merge(folder)


def statements(out_folder: str | Path) -> dict[str, str]:
    """Test to its statement, of the tests that `run_stress` has finished in a folder; empty where there are none."""
    folder = RunFolder(Path(out_folder))
    return {name: folder.read_json(f"{PARTS}/{name}.json")["statement"] for name in _finished(folder)}


def _finished(folder: RunFolder) -> list[str]:
    return [name for name in TESTS if folder.has(f"{PARTS}/{name}.json")]


def _claim(folder: RunFolder, corrected: CorrectedOrganism, settings: StressSettings) -> None:
    """Refuse a folder of another correction; mark a new one."""
    identity = json.loads(json.dumps(_identity(corrected, settings)))
    if not folder.has(RECORD):
        folder.write_json(RECORD, {**identity, "statements": {}})
        return
    record = folder.read_json(RECORD)
    other = [key for key in identity if not same_settings(record.get(key), identity[key])]
    if other:
        raise InputError(f"{folder.path} holds stress tests with another {other[0]}: choose another folder")


def _identity(corrected: CorrectedOrganism, settings: StressSettings) -> dict[str, Any]:
    weights = {p.name: file_sha256(p) for p in sorted(corrected.checkpoint.glob("*.safetensors"))}
    return {"arm": corrected.arm, "seed": corrected.seed, "weights": weights, "settings": asdict(settings)}


def _run_one(folder: RunFolder, name: str, corrected: CorrectedOrganism, settings: StressSettings) -> None:
    def keep(part: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        file = f"{PARTS}/{part}.parquet"
        if not folder.has(file):
            folder.write_table(file, make())
        return folder.read_table(file)

    result = TESTS[name](corrected, settings, keep)
    folder.write_table(f"{PARTS}/{name}.parquet", as_table(result.to_rows()))
    # Written last: it says that the test is whole.
    folder.write_json(f"{PARTS}/{name}.json", {"statement": result.statement()})


def _merge(folder: RunFolder) -> pd.DataFrame:
    parts = [folder.read_table(f"{PARTS}/{name}.parquet") for name in _finished(folder)]
    table = pd.concat(parts, ignore_index=True) if parts else as_table([])
    folder.write_table(TABLE, table)
    folder.write_json(RECORD, {**folder.read_json(RECORD), "statements": statements(folder.path)})
    if parts:
        write_figure(folder.path, "stress", Records(stress=table))
    return table
