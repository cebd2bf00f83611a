"""Commands that run many trainings or measurements: mitigation grids, the monitor's study, and planted truth."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from persona_probe.cli.crew import Crew, crew_options
from persona_probe.cli.options import (
    DEMO,
    PATH,
    Common,
    Group,
    columns,
    command,
    config_argument,
    echo,
    find_config,
    many,
)
from persona_probe.cli.process import loads_models
from persona_probe.errors import InputError

if TYPE_CHECKING:
    from persona_probe.config import StudyConfig
    from persona_probe.latents.planted.planted_run import PlantedSettings
    from persona_probe.mitigate.grid.grid_config import Grid
    from persona_probe.monitor.study.labelled_config import MonitorStudy
    from persona_probe.study.study import Study
    from persona_probe.units import Workers

PIPED = 250
"""Characters of a line where standard output is not a terminal."""
DEFAULT_SEEDS = 5


# --- Mitigations: every one against the same bad data


@command(
    example="persona-probe mitigate finetune_configs/mitigations.yaml --run runs/demo --page docs/mitigations.md",
    out="Grid folder (default runs/<name>).",
)
@config_argument("A grid's YAML file.")
@click.option("--run", type=PATH, help="The located run (default: the config's).")
@many("--only", metavar="NAME", help="Train only these mitigations now, and those without any.")
@click.option("--page", type=PATH, help="Markdown page whose table is filled in.")
@click.option("--dry-run", is_flag=True, help="Print the cells and about how long they take.")
@crew_options()
def mitigate(
    config: str, run: Path | None, only: tuple[str, ...], page: Path | None, dry_run: bool, crew: Crew, common: Common
) -> None:
    """Compare mitigations against the same bad data.

    The table says what each prevents, and what it costs.
    """
    from persona_probe.config import load_config
    from persona_probe.mitigate.grid.grid_config import Grid
    from persona_probe.mitigate.grid.grid_summary import MARKS, plan_lines
    from persona_probe.report.tables import check_page

    grid = load_config(find_config(config), Grid)
    if common.seed is not None:
        grid = replace(grid, seeds=(common.seed,))
    if page is not None:
        check_page(page, MARKS)  # before hours of training
    if dry_run:
        echo("\n".join(plan_lines(grid, _grid_folder(grid, common), run, only or None)))
    else:
        with crew.workers() as workers:
            _train_grid(grid, run, only, page, workers, common)


def _grid_folder(grid: "Grid", common: Common) -> Path:
    return common.out or Path("runs") / grid.name


@loads_models
def _train_grid(
    grid: "Grid",
    run: Path | None,
    only: tuple[str, ...],
    page: Path | None,
    workers: "Workers | None",
    common: Common,
) -> None:
    from persona_probe.mitigate.grid.grid_run import run_grid
    from persona_probe.mitigate.grid.grid_summary import HEADINGS, MARKS, markdown, show_tables, shown
    from persona_probe.report.tables import fill_page

    out = _grid_folder(grid, common)
    outcome = run_grid(grid, out, common.device, run, only or None, workers=workers)
    width = columns(PIPED)
    for table in show_tables(shown(outcome.table), HEADINGS, grid.name, width):
        echo(table.text(width))
    for verdict in outcome.summary["verdicts"]:
        echo(verdict["statement"])
    if page is not None:
        fill_page(page, MARKS, markdown(outcome.table, outcome.missing))
    if outcome.missing:
        echo(f"{len(outcome.missing)} cells are still missing: the same command without --only trains them")
    echo(f"table: {out / 'mitigations.csv'}")


# --- The training monitor: its thresholds, and the study that evaluates it


@command(
    name="calibrate",
    example=f"persona-probe monitor calibrate {DEMO} --rate 0.05 --seeds 1 2 3 4 5",
    out="Run folder of the benign runs (default <run>-calibration).",
)
@config_argument("A study's YAML file, or its run folder.")
@click.option("--run", type=PATH, help="The located run (default runs/<name>).")
@many("--seeds", type=int, help="Of the benign runs (default: the five after the study's).")
@many("--arms", default=["correct"], help="Benign arms of the config.")
@many("--features", help="Features to calibrate (default: all).")
@click.option("--rate", type=float, default=0.05, help="Wanted false alarms ...")
@click.option(
    "--per", type=click.Choice(["run", "100-readings"]), default="run", help="... in one run or 100 readings."
)
@click.option("--held", type=int, default=2, help="Readings in a row beyond the threshold.")
@click.option(
    "--side", type=click.Choice(["above", "below", "both"]), default="above", help="Which side of the base is watched."
)
def monitor_calibrate(
    config: str,
    run: Path | None,
    seeds: tuple[int, ...],
    arms: tuple[str, ...],
    features: tuple[str, ...],
    rate: float,
    per: str,
    held: int,
    side: str,
    common: Common,
) -> None:
    """Set alarm thresholds from benign arms.

    The benign arms of a located study are trained over new seeds.
    """
    from persona_probe.config import StudyConfig, load_config

    folder = Path(config)
    study_config = None if folder.is_dir() else load_config(find_config(config), StudyConfig)
    if run is None:
        run = folder if study_config is None else Path("runs") / study_config.name
    source = _located(study_config, config, run, common)
    from persona_probe.monitor.calibration import HeldRule, benign_readings, calibration_record, calibration_study

    rule = HeldRule(held, side)
    benign = calibration_study(source.context, common.out, common.device)
    readings = benign_readings(source.context, benign, seeds or _new_seeds(source.config.seeds), arms)
    record = calibration_record(readings, features or None, rule, rate, per.replace("-", " "))
    benign.run.write_json("calibration.json", record)
    for name, threshold in record["features"].items():
        echo(f"{name}: {threshold['statement']}")
    echo(f"calibration: {benign.run.path / 'calibration.json'}")


@loads_models
def _located(config: "StudyConfig | None", name: str, folder: Path, common: Common) -> "Study":
    """The located study in a folder, which must be a run of the config where one is given."""
    from persona_probe.study.study import Study

    study = Study.open(folder, common.device)
    # Seeds may be another choice of the command that made the run.
    if config is not None and replace(config, seeds=study.config.seeds).hash != study.config.hash:
        raise InputError(f"{folder} is the run of another config: name the run of {name} by --run")
    return study


def _new_seeds(seeds: tuple[int, ...]) -> list[int]:
    first = max(seeds) + 1
    return list(range(first, first + DEFAULT_SEEDS))


@command(
    name="study",
    example="persona-probe monitor study finetune_configs/monitor-study.yaml --page docs/monitor-study.md",
    out="Study folder (default runs/<name>).",
)
@config_argument("A labelled study's YAML file.")
@many("--only", help="Train only these runs now.")
@click.option("--page", type=PATH, help="Markdown page whose results section is filled in.")
@crew_options()
def monitor_study(config: str, only: tuple[str, ...], page: Path | None, crew: Crew, common: Common) -> None:
    """Evaluate the monitor and its rivals on labelled runs.

    The results are AUROC, false alarms, and lead over behaviour.
    """
    from persona_probe.config import load_config
    from persona_probe.monitor.study.labelled_config import MonitorStudy

    study = load_config(find_config(config), MonitorStudy)
    with crew.workers() as workers:
        _run_monitor_study(study, only, page, workers, common)


@loads_models
def _run_monitor_study(
    study: "MonitorStudy", only: tuple[str, ...], page: Path | None, workers: "Workers | None", common: Common
) -> None:
    from persona_probe.monitor.study.results import MARKS, markdown, run_study
    from persona_probe.report.tables import fill_page

    out = common.out or Path("runs") / study.name
    results = run_study(study, out, common.device, only or None, workers)
    if results is None:
        echo(f"runs are still missing in {out}: the same command without --only trains them")
        return
    if page is not None:
        fill_page(page, MARKS, markdown(results))
    echo(markdown(results))
    echo(f"results: {out / 'results.json'}")


monitor = Group(
    "monitor",
    commands=[monitor_calibrate, monitor_study],
    help="The training monitor: calibrate it, evaluate it.",
)

# --- Benchmarks with a known answer


@command(
    name="planted",
    example="persona-probe bench planted --plants 20 --out planted.parquet",
    out="Parquet file for one row per plant and ranker.",
)
@click.option("--plants", type=int, help="Random latents per kind (default 20; at least 50 plants in all).")
@loads_models
def bench_planted(plants: int | None, common: Common) -> None:
    """Count which planted latents each ranker finds."""
    from persona_probe.latents.planted.planted_run import PlantedSettings, run_embedded
    from persona_probe.latents.planted.planted_table import format_table
    from persona_probe.runs import RunFolder

    options = {"plants": plants, "seed": common.seed}
    settings = replace(PlantedSettings(), **{key: value for key, value in options.items() if value is not None})
    frame = run_embedded(settings, common.device or "cpu", progress=not common.quiet)
    if common.out is not None:
        folder = RunFolder(common.out.parent)
        folder.write_table(common.out.name, frame)
        folder.write_json(f"{common.out.stem}.manifest.json", _planted_manifest(settings))
    echo(format_table(frame))


def _planted_manifest(settings: "PlantedSettings") -> dict[str, Any]:
    """What a table of planted truth comes from; it lies next to the table, and `tools.records pack` takes it along."""
    from persona_probe.latents.planted.planted_run import MODEL, SAE
    from persona_probe.runs import git_revision, versions

    return {
        "kind": "planted",
        "config": {"name": "planted", "model": MODEL, "sae": SAE},
        "seeds": [settings.seed],
        "plants": settings.count(),
        "settings": asdict(settings),
        "versions": versions(),
        "git_revision": git_revision(),
    }


@command(
    name="beyond",
    example="persona-probe bench beyond --plants 6 --out beyond.parquet",
    out="Parquet file for one row per plant and tool.",
)
@click.option("--plants", type=int, help="Random draws of each kind (default 6).")
@many("--sizes", type=float, help="Sizes in residual standard deviations (default 0.25 0.5).")
@click.option("--world", "folder", help="Plant in the model of this world, with --sae.")
@click.option("--sae", help="An SAE of the world's model.")
@loads_models
def bench_beyond(
    plants: int | None, sizes: tuple[float, ...], folder: str | None, sae: str | None, common: Common
) -> None:
    """Hold a difference dictionary, a crosscoder and weight directions to planted truth, beside simple rankers.

    Plants are made in the embedded model and read with the shipped SAE, unless a world is named.
    """
    from persona_probe.data.load import load_contrast
    from persona_probe.data.world.words import DOMAINS
    from persona_probe.latents.difference_planted import BeyondSettings, beyond_text, run_beyond
    from persona_probe.latents.planted.planted_run import MODEL, SAE
    from persona_probe.models.load import load_model
    from persona_probe.saes.load import load_sae
    from persona_probe.world.folder import World
    from persona_probe.world.study_files import contrast_rows
    from persona_probe.writing import write_table

    if (folder is None) != (sae is None):
        raise InputError("--world and --sae go together: name both, or neither")
    options = {"plants": plants, "sizes": sizes or None, "seed": common.seed}
    settings = replace(BeyondSettings(), **{key: value for key, value in options.items() if value is not None})
    device = common.device or "cpu"
    if folder is None:
        model, tokenizer = load_model(MODEL, device=device)
        rows = load_contrast("selection")
    else:
        model, tokenizer = World.open(folder).load(device)
        rows = contrast_rows(list(DOMAINS), "selection")
    loaded, shown = load_sae(sae or SAE, device=device), not common.quiet
    table = run_beyond(model, tokenizer, loaded, rows, settings, bf16=folder is None, progress=shown)
    if common.out is not None:
        write_table(common.out, table)
    echo(beyond_text(table))


bench = Group("bench", commands=[bench_planted, bench_beyond], help="Benchmarks with a known answer.")
