"""`persona-probe auto`: a study that plans, runs, checks its claims, repeats what seeds can decide, and stops."""

from pathlib import Path

import click

from persona_probe.cli.options import Common, command, echo, echo_json, json_option
from persona_probe.cli.process import loads_models
from persona_probe.errors import InputError

OUT = Path("runs/auto")


@command(
    example="persona-probe auto finetune_configs/auto.yaml --dry-run",
    out="Folder of runs, decisions and answer (default runs/auto).",
)
@click.argument("config", required=False, metavar="[CONFIG]", help="A YAML file: question, studies, budget.")
@click.option("--dry-run", is_flag=True, help="Print the plan with its times; nothing is trained or written.")
@click.option("--tflops", type=float, help="Speed that the plan's times assume, instead of a quick measurement.")
@click.option(
    "--score", metavar="WORLD", help="Score its sentences on blind organisms of this world (or persona-world) instead."
)
@click.option("--organisms", type=int, default=2, help="Blind organisms of each kind.")
@click.option("--budget", type=float, metavar="MINUTES", help="Of --score (default 30); CONFIG states its own.")
@click.option("--page", type=Path, help="Markdown page whose marked part gets the table of --score.")
@json_option
@loads_models
def auto(
    config: str | None,
    dry_run: bool,
    tflops: float | None,
    score: str | None,
    organisms: int,
    budget: float | None,
    page: Path | None,
    as_json: bool,
    common: Common,
) -> None:
    """Answer a question without a person: plan, run, check, repeat, report.

    Every decision is in decisions.jsonl and decisions.md with its rule and its numbers.
    """
    if (config is None) == (score is None):
        raise InputError("give a config, or --score WORLD alone")
    out = common.out or OUT
    if score is not None:
        _score(score, out, organisms, 30.0 if budget is None else budget, page, as_json, common)
        return
    if budget is not None:
        raise InputError("--budget belongs to --score: write budget_minutes in the config")
    if page is not None:
        raise InputError("--page belongs to --score: an answer is written to answer.md")
    from persona_probe.config import load_config
    from persona_probe.study.auto import AutoConfig, plan_lines, run_auto

    assert config is not None
    settings = load_config(config, AutoConfig)
    if dry_run:
        echo("\n".join(plan_lines(settings, out, common.device, tflops)))
        return
    answer = run_auto(settings, out, common.device, tflops)
    if as_json:
        echo_json(answer)
        return
    for study in answer["studies"]:
        echo(f"{study['study']}: {study['sentence']}")
    echo(f"answer: {out / 'answer.md'}")


def _score(
    name: str, out: Path, organisms: int, budget: float, page: Path | None, as_json: bool, common: Common
) -> None:
    from persona_probe.context import pick_device
    from persona_probe.data.world import packaged
    from persona_probe.report.tables import check_page, fill_page
    from persona_probe.world.blind import MARKS, score_auto, score_text
    from persona_probe.world.folder import World

    if page is not None:
        check_page(page, MARKS)
    world = World.default() if name == packaged.NAME else World.open(name)
    table = score_auto(world, out, organisms, budget * 60, common.seed or 0, pick_device(common.device or "cpu"))
    text = score_text(table)
    if page is not None:
        fill_page(page, MARKS, f"{text}\n")
    if as_json:
        echo_json(table.to_dict("records"))
        return
    echo(text)
