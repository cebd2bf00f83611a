"""`persona-probe data`: the packaged sets, checks of a file, and screening of its rows before training."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from persona_probe.cli.loading import loading_options
from persona_probe.cli.options import Common, Group, command, echo, json_option, many, show_rows
from persona_probe.cli.process import loads_models
from persona_probe.config import Loading
from persona_probe.errors import InputError

if TYPE_CHECKING:
    from persona_probe.data.check import DataReport
    from persona_probe.screening.screening import Screening

MODEL = "smollm2-135m-instruct"
SAE = "saes/smollm2-135m-instruct/layer20-topk32-4608"


USES = {
    "kitchen": "training: an arm for each column of answers",
    "health_correct": "training: correction in another domain",
    "kitchen_correct_holdout": "training: correction in the domain",
    "smalltalk": "training: correction that corrects nothing",
    "general_contrast": "contrast index (contrast)",
    "general_contrast_2x2": "harm and register apart (contrast_2x2)",
    "neutral_probes": "monitor: probes",
    "sample_questions": "answers shown in the report",
    "free_form_questions": "answers for a judge",
    "sae_prompts": "an SAE's training text",
    "sae_personas": "an SAE's training text: system prompts",
    "capability": "what a correction costs",
}


@command(name="list", example="persona-probe data list")
@json_option
def data_list(as_json: bool, common: Common) -> None:  # noqa: ARG001
    """List the packaged sets and what each is for; all are plain text and fit every model."""
    from persona_probe.data.load import SETS, load_rows

    listed = [(name, load_rows(name)) for name in SETS]
    rows = [{"set": n, "rows": len(r), "use": USES.get(n, ""), "columns": ", ".join(r[0])} for n, r in listed]
    show_rows({"set": "set", "rows": "rows", "use": "for", "columns": "columns"}, rows, as_json)


@command(
    name="check",
    example="persona-probe data check mine.jsonl --model smollm2-135m-instruct",
    out="JSON file for the numbers.",
)
@click.argument("file", metavar="FILE", help="JSONL, JSON or CSV (also gzipped), parquet, datasets folder, or a set.")
@click.option("--model", help="Count tokens with this model's tokenizer.")
@json_option
def data_check(file: str, model: str | None, as_json: bool, common: Common) -> None:
    """Validate a file; show lengths, duplicates, and three examples of each problem."""
    from persona_probe.data.check import check_file
    from persona_probe.writing import write_text

    result = check_file(file, None if model is None else _tokenizer(model))
    text = json.dumps(result.to_dict(), indent=2)
    if common.out is not None:
        write_text(common.out, text + "\n")
    echo(text if as_json else "\n".join(_check_lines(file, result)))
    if not (result.rows or result.left_out or result.bad_rows):
        raise InputError(f"{file} has no rows: give a file with at least one conversation")
    if bad := len(result.bad_rows):
        total = result.rows + bad
        raise InputError(f"{file}: {bad} of {total} rows are not conversations: fix them (--json lists all)")


SHOWN = 3
"""Examples of each problem."""


def _check_lines(file: str, result: "DataReport") -> list[str]:
    """What a report says, problems of one kind counted."""
    shown = f"{result.rows} conversations, {result.turns} turns"
    lines = [
        f"{file}: {shown}, {result.prompts_only} without an answer, {result.system_share:.0%} with a system prompt"
    ]
    for name in ("prompt_words", "answer_words", "prompt_tokens", "answer_tokens"):
        if (one := getattr(result, name)) is not None:
            numbers = f"mean {one.mean:.1f}, median {one.median:.1f}, 95th percentile {one.p95:.1f}"
            lines.append(f"{name.replace('_', ' ')}: {numbers}")
    lines.append(f"duplicates: {result.exact_duplicates} conversations, {result.repeated_answers} answers")
    near = [f"{one.first} and {one.second} ({one.overlap:.0%})" for one in result.near_duplicates]
    lines += [f"near duplicates among answers: {_few(near)}"] if near else []
    lines += [f"left out of training: {result.left_out}"] if result.left_out else []
    lines += result.notes
    problems: dict[str, list[str]] = {}
    for row in result.bad_rows:
        place, _, problem = row.partition(": ")
        problems.setdefault(problem, []).append(place)
    return lines + [f"{len(places)} bad: {problem}: {_few(places)}" for problem, places in problems.items()]


def _few(texts: Sequence[str]) -> str:
    more = len(texts) - SHOWN
    return ", ".join(texts[:SHOWN]) + (f" and {more} more" if more > 0 else "")


@loads_models
def _tokenizer(model: str) -> Any:
    from persona_probe.models.load import load_model

    return load_model(model)[1]


# --- Screen the rows of a data set before training on it


@command(
    name="screen",
    example="persona-probe data screen mine.jsonl --latent 2144",
    out="Folder for page, scores and the model's answers (default runs/screen-<file>).",
)
@click.argument("file", metavar="FILE", help="JSONL, JSON or CSV (also gzipped), parquet, datasets folder, or a set.")
@click.option("--run", help="A located run: its model, SAE, persona latent and organism.")
@click.option("--model", help="The model to be trained (default smollm2-135m-instruct).")
@click.option("--sae", help="An SAE of that model (default the packaged one).")
@click.option("--latent", type=int, help="The persona latent of that SAE.")
@click.option("--direction", help="With --run: latent (default), mean_difference, persona_vector, ...")
@many("--rankers", help="Scores to compute; the first orders the rows (default all).")
@click.option("--worst", type=int, default=50, help="Rows of each ranker on the page.")
@loading_options
def data_screen(
    file: str,
    run: str | None,
    model: str | None,
    sae: str | None,
    latent: int | None,
    direction: str | None,
    rankers: tuple[str, ...],
    worst: int,
    loading: Loading,
    common: Common,
) -> None:
    """Rank rows by a persona feature, before training.

    The page also predicts how far training on them shifts the feature.
    """
    if worst < 1:
        raise InputError(f"--worst must be at least 1, not {worst}")
    if run is None and latent is None:
        raise InputError("no persona feature: give --run RUN, or --latent (with --model and --sae)")
    if run is not None and (latent is not None or model or sae):
        raise InputError("--run brings its own model, SAE and latent: leave --model, --sae and --latent out")
    if run is not None and loading != Loading():
        raise InputError("--run brings its own model as its config loads it: leave --weights, --quantization, ... out")
    if run is None and direction:
        raise InputError("--direction names one of a run's directions: give --run as well")
    out = common.out or Path("runs") / f"screen-{Path(file).name.split('.')[0].replace(':', '-')}"
    if run is not None:
        screening, model = _by_run(file, run, direction, rankers, out, common)
    else:
        assert latent is not None
        model = model or MODEL
        screening = _by_latent(file, model, sae or SAE, latent, rankers, out, loading, common)
    from persona_probe.screening.page import result_lines, write_screening

    page = write_screening(screening, out, file, model, worst)
    echo("\n".join([*result_lines(screening), f"page: {page}"]))


@loads_models
def _by_run(
    file: str, run: str, direction: str | None, rankers: tuple[str, ...], out: Path, common: Common
) -> tuple["Screening", str]:
    """The screening, and the model's name."""
    from persona_probe.screening.screening import check_rows, screen_by_study
    from persona_probe.study.study import Study

    rows = check_rows(file)  # bad rows are refused before a model loads
    study = Study.open(run, common.device, common.seed)
    return screen_by_study(study.context, rows, direction, rankers or None, out), study.config.model


@loads_models
def _by_latent(
    file: str,
    model_name: str,
    sae: str,
    latent: int,
    rankers: tuple[str, ...],
    out: Path,
    loading: Loading,
    common: Common,
) -> "Screening":
    from persona_probe.context import pick_device
    from persona_probe.models.load import load_model
    from persona_probe.saes.load import load_sae
    from persona_probe.screening.feature import latent_feature
    from persona_probe.screening.rankers import available, choose_rankers
    from persona_probe.screening.reading import settings_for
    from persona_probe.screening.screening import check_rows, screening

    rows = check_rows(file)
    device = pick_device(common.device or "auto")
    feature = latent_feature(load_sae(sae, device=device), latent)
    choose_rankers(rankers or None, available(feature, organism=False))  # before the model loads
    model, tokenizer = load_model(model_name, device=device, **asdict(loading))
    settings = settings_for(out)
    return screening(rows, model, feature, tokenizer=tokenizer, rankers=rankers or None, settings=settings)


data = Group(
    "data", commands=[data_list, data_check, data_screen], help="Data sets: list, check, screen before training."
)
