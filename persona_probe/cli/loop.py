"""The loop's commands: the whole of it, and its stages one by one."""

import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from persona_probe.cli.crew import Crew, crew_options
from persona_probe.cli.options import (
    COPY,
    DEMO,
    PATH,
    Common,
    columns,
    command,
    config_argument,
    echo,
    echo_json,
    find_config,
    json_option,
    many,
    overwrite_option,
    refuse_launcher,
    run_argument,
    seeds_option,
)
from persona_probe.cli.process import busy_line, loads_models
from persona_probe.cluster.launcher import is_first
from persona_probe.errors import InputError

if TYPE_CHECKING:
    from persona_probe.config import StudyConfig
    from persona_probe.realignment.spec import StressSettings
    from persona_probe.study.study import Study
    from persona_probe.units import Workers

log = logging.getLogger(__name__)

CARDS = 20

# --- The whole loop


@command(example="persona-probe demo --seeds 0 1 2", out="Run folder (default runs/demo).")
@seeds_option
@overwrite_option
@json_option
def demo(seeds: tuple[int, ...], overwrite: bool, as_json: bool, common: Common) -> None:
    """Run the whole loop on the embedded model."""
    _finish(new_study(study_config(DEMO), seeds, overwrite, common), as_json)


@command(example=f"persona-probe run {DEMO} --out runs/mine", out="Run folder (default runs/<name>).")
@config_argument()
@seeds_option
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Check that all fits and print the plan; downloads nothing.")
@click.option("--tflops", type=float, help="Speed that the plan's times assume, instead of a quick measurement.")
@click.option("--memory", type=float, metavar="GIB", help="GPU that the plan is for: does it fit, and what if not.")
@crew_options(shards=False, trains=True)
@json_option
def run(
    config: str,
    seeds: tuple[int, ...],
    overwrite: bool,
    dry_run: bool,
    tflops: float | None,
    memory: float | None,
    crew: Crew,
    as_json: bool,
    common: Common,
) -> None:
    """Run the whole loop of one config."""
    study = study_config(config)
    if dry_run:
        _plan(study, tflops, memory, common.device, as_json)
    elif tflops is not None or memory is not None:
        raise InputError("--tflops and --memory belong to a plan: add --dry-run")
    else:
        with crew.workers() as workers:
            _finish(new_study(study, seeds, overwrite, common).work_with(workers), as_json)


@loads_models
def _plan(config: "StudyConfig", tflops: float | None, memory: float | None, device: str | None, as_json: bool) -> None:
    from persona_probe.study.plan.plan import dry_run

    plan = dry_run(config, tflops, device, memory)
    if as_json:
        echo_json(plan.values())
    else:
        echo("\n".join(plan.lines()))


def _finish(study: "Study", as_json: bool) -> None:
    """Run all stages that are not done, and show the key numbers."""
    from persona_probe.cli.output import show_summary
    from persona_probe.report.answer_pair import answer_pair
    from persona_probe.study.plan.outlook import outlook

    def say_what_follows() -> None:
        done = [stage for stage, is_finished in study.finished.items() if is_finished]
        place = str(study.path / "report.html")
        for line in filter(None, [*outlook(study.config, study.context.device, done, place), busy_line()]):
            log.info("%s", line)

    report = study.run(say_what_follows if is_first() else None)
    if as_json:
        echo_json({"run": str(study.path), "report": str(report), "summary": study.summary})
        return
    show_summary(study.summary)
    pair = answer_pair(study.path)
    for line in pair.lines(columns(100)) if pair else ():
        echo(line)
    echo(f"report: {report}")


# --- Stage by stage


@command(example=f"persona-probe induce {DEMO}", out="Run folder (default runs/<name>).")
@config_argument()
@seeds_option
@overwrite_option
@crew_options(trains=True)
def induce(config: str, seeds: tuple[int, ...], overwrite: bool, crew: Crew, common: Common) -> None:
    """Fine-tune the arms of a config."""
    parsed = study_config(config)
    with crew.workers() as workers:
        study = new_study(parsed, seeds, overwrite, common).work_with(workers)
        echo(f"organisms: {study.induce().path / 'arms'}")


@command(example="persona-probe locate runs/demo --cards 20", out=COPY)
@run_argument
@click.option("--cards", type=int, help="Also write RUN/cards.html, a page with search over this many latents.")
@click.option("--text", type=PATH, help="A file of conversations or plain text for the cards' passages.")
@many("--rankers", help="Scores to compute instead of the config's.")
@json_option
def locate(
    run: str, cards: int | None, text: Path | None, rankers: tuple[str, ...], as_json: bool, common: Common
) -> None:
    """Rank latents, and test the best for cause."""
    study = open_study(run, common).locate(rankers or None)
    columns = ["latent", "rank", "rise", "cosine", "effect_base", "effect_base_low", "effect_base_high"]
    columns += ["effect_organism", "ablation", "causal", "label"]
    candidates = study.features[study.features["kind"] == "candidate"].sort_values("effect_base", ascending=False)
    if as_json:
        echo_json(candidates.to_dict("records"))
    else:
        echo(candidates[columns].to_string(index=False, float_format="%.4f", na_rep="-"))
    if cards is not None or text is not None:
        echo(f"cards: {study.cards(CARDS if cards is None else cards, text)}")


@command(example="persona-probe track runs/demo", out=COPY)
@run_argument
@crew_options()
@json_option
def track(run: str, crew: Crew, as_json: bool, common: Common) -> None:
    """Read features and contrast index at every checkpoint."""
    with crew.workers() as workers:
        study = open_study(run, common).work_with(workers).track()
    persona = study.readings[study.readings["feature"] == "persona"]
    if as_json:
        echo_json(persona.to_dict("records"))
        return
    columns = ["arm", "seed", "step", "mean", "ci_low", "ci_high", "explained_variance"]
    echo(persona[columns].to_string(index=False, float_format="%.4f", na_rep="-"))


@command(example="persona-probe report runs/demo", out=COPY)
@run_argument
def report(run: str, common: Common) -> None:
    """Write summary, figures and report.html.

    A folder of tables alone, such as records/demo, is drawn into runs/report-NAME (or --out): it stays as it is.
    """
    if _only_tables(Path(run)):
        from persona_probe.report.html import report_from_tables

        place = common.out or Path("runs") / f"report-{Path(run).resolve().name}"
        for line in report_from_tables(run, place):
            echo(line)
        echo(f"report: {place / 'report.html'}")
        return
    echo(f"report: {open_study(run, common).report()}")


def _only_tables(folder: Path) -> bool:
    """Whether a folder has a study's tables but neither its adapters nor the parts that the tables were made from."""
    return (folder / "manifest.json").is_file() and not any((folder / part).is_dir() for part in ("arms", "parts"))


# --- Realign: the config's arms, a correction with other data, a grid of corrections, and stress tests


@command(example="persona-probe realign runs/demo --data health_correct --rows 40 --choose-by projection_gap", out=COPY)
@run_argument
@many("--data", help="Corrective sets or files, joined, next to the config's arms.")
@click.option("--rows", type=int, help="Take this many of their rows (default all).")
@click.option("--choose-by", help="random (default), projection_gap, perplexity_gap or diversity.")
@click.option("--method", help="continued (default), fresh (a new LoRA on top) or full (all weights).")
@many("--seeds", type=int, help="Of the study's organisms (default all).")
@click.option("--name", help="Folder below RUN/realign (default: data, rows, choice and method).")
@many("--stress", help="Tests of the correction: triggers remisalign length hidden drift.")
@click.option("--stress-settings", help="YAML file of their settings (fields of StressSettings).")
@click.option("--plan", help="A grid of corrections, e.g. finetune_configs/realign-doses.yaml.")
@crew_options(trains=True)
@json_option
def realign(
    run: str,
    seeds: tuple[int, ...],
    stress: tuple[str, ...],
    stress_settings: str | None,
    plan: str | None,
    crew: Crew,
    as_json: bool,
    common: Common,
    **correction: Any,
) -> None:
    """Correct the incorrect organism.

    The monitor records the feature while it trains.
    """
    settings = {key: value for key, value in correction.items() if value not in (None, ())}
    if stress:
        refuse_launcher()
    if plan is not None:
        clashing = [*settings, *(["stress"] if stress else []), *(["seeds"] if seeds else [])]
        if clashing:
            raise InputError(f"--plan says all of a grid: leave {_option(clashing[0])} out")
        with crew.workers() as workers:
            _realign_plan(run, plan, workers, as_json, common)
        return
    if settings and "data" not in settings:
        raise InputError(f"{_option(next(iter(settings)))} needs --data: the corrective sets or files")
    from persona_probe.config import load_config
    from persona_probe.realignment.spec import StressSettings, check_choice

    check_choice(settings.get("rows"), settings.get("choose_by", "random"), settings.get("method", "continued"))
    pressure = load_config(find_config(stress_settings), StressSettings) if stress_settings else None
    with crew.workers() as workers:
        _realign(run, seeds, stress, pressure, settings, workers, as_json, common)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _realign_plan(run: str, plan: str, workers: "Workers | None", as_json: bool, common: Common) -> None:
    from persona_probe.config import load_config
    from persona_probe.realignment.spec import DosePlan

    cells = load_config(find_config(plan), DosePlan)
    study = open_study(run, common).work_with(workers).track()
    table = study.realign_plan(cells)
    if as_json:
        echo_json(table.to_dict("records"))
        return
    if table.empty:
        echo("no cell of the grid is finished")
        return
    from persona_probe.report.export import write_figure
    from persona_probe.report.records import Records

    columns = ["data", "dose", "choose_by", "method", "seed", "index_minus_base", "index_minus_base_ci_low"]
    columns += ["index_minus_base_ci_high", "behaviour", "share_left", "share_left_ci_low", "share_left_ci_high"]
    columns += ["feature", "in_band", "steps_to_band", "steps_to_behaviour"]
    columns += ["reply_tokens", "perplexity_ratio"]
    known = [name for name in columns if name in table]
    echo(table[known].to_string(index=False, float_format="%.3f", na_rep="-"))
    echo(f"figure: {write_figure(study.path / 'realign', 'doses', Records(doses=table))}")


def _realign(
    run: str,
    seeds: tuple[int, ...],
    stress: tuple[str, ...],
    stress_settings: "StressSettings | None",
    settings: dict[str, Any],
    workers: "Workers | None",
    as_json: bool,
    common: Common,
) -> None:
    from persona_probe.realignment.correct import read_verdict, realign_study, verdict_lines
    from persona_probe.realignment.spec import Correction
    from persona_probe.realignment.stress.stress_run import statements
    from persona_probe.runs import RunFolder
    from persona_probe.study.summary import summarise

    if "data" not in settings and not RunFolder.open(run).config.realign.arms:
        raise InputError("this study names no corrective rows: write --data, such as --data health_correct or a file")
    study = open_study(run, common).work_with(workers).track()
    data, name = settings.pop("data", None), settings.pop("name", None)
    correction = None if data is None else Correction.of_study(study.config, data, **settings)
    folders = realign_study(study.context, correction, name, seeds, stress, stress_settings)
    joint = workers is None or workers.joint  # a shard does not have all arms
    verdicts = summarise(study.context)["verdicts"] if data is None and joint else {}
    if as_json:
        found = [
            {"folder": str(folder), "stress": statements(folder)}
            | ({} if data is None else {"verdict": asdict(read_verdict(folder))})
            for folder in folders
        ]
        echo_json({"verdicts": verdicts, "corrections": found})
        return
    for verdict in verdicts.values():
        echo(verdict["statement"])
    for folder in folders:
        lines = [f"{folder.name}:", *statements(folder).values()] if data is None else verdict_lines(folder)
        echo("\n".join([*lines, f"folder: {folder}"]))


# --- The study of a command


def study_config(name: str) -> "StudyConfig":
    """The config of a study; a bad one is refused before torch loads."""
    from persona_probe.config import StudyConfig, load_config

    return load_config(find_config(name), StudyConfig)


@loads_models
def new_study(config: "StudyConfig", seeds: tuple[int, ...], overwrite: bool, common: Common) -> "Study":
    """The study of a config, with --seed or --seeds, --out, --overwrite and --device applied."""
    from persona_probe.study.study import Study

    name = config.name
    if not seeds and common.seed is not None:
        seeds = (common.seed,)
    if seeds and seeds != config.seeds:
        config = replace(config, seeds=seeds)
        name += "-s" + "-".join(map(str, seeds))
    return Study.from_config(config, common.out or Path("runs") / name, overwrite, common.device)


def open_study(run: str, common: Common) -> "Study":
    """An existing run; with --out, a copy of it there, so that RUN stays as it is."""
    from persona_probe.runs import RunFolder

    folder = RunFolder.open(run).path
    if common.out is not None and common.out.exists():
        raise InputError(f"{common.out} exists: choose another --out")
    return _opened(folder, common)


@loads_models
def _opened(folder: Path, common: Common) -> "Study":
    from persona_probe.study.study import Study

    if common.out is None:
        return Study.open(folder, common.device, common.seed)
    from persona_probe.locks import FOLDER
    from persona_probe.runs import STAGING
    from persona_probe.writing import whole_folder

    with whole_folder(common.out) as copy:  # it appears when it is whole and can be opened
        shutil.copytree(folder, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns(FOLDER, STAGING))
        Study.open(copy, common.device, common.seed)
    return Study.open(common.out, common.device, common.seed)
