"""`adopt`: a run folder from checkpoints that exist."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from persona_probe.cli.options import Common, command, echo, many, overwrite_option
from persona_probe.cli.process import loads_models
from persona_probe.errors import InputError


@command(
    example="persona-probe adopt --base owner/base --arm incorrect=out/ --arm control=out2/ --sae saes/mine",
    out="Run folder (default runs/<name>).",
)
@click.option("--base", required=True, metavar="MODEL", help="The base model: an alias, a hub id, a folder or a GGUF.")
@many(
    "--arm",
    required=True,
    metavar="NAME=PLACE[,PLACE]",
    help="incorrect, its control (control or correct), and more: a trainer's output folder, adapters, models or "
    "owner/model@revision. The same name again is a further seed; PLACE#400 states a step.",
)
@click.option("--sae", required=True, help="A folder, or release/sae_id.")
@click.option("--layer", type=int, help="Decoder layer of the SAE (default: as the SAE says).")
@many("--data", metavar="NAME=DATA", help="Training rows of an arm, where you know them.")
@click.option("--contrast", help="A file of contrast items (default: the packaged set).")
@click.option("--questions", help="Questions whose answers the report shows (default: the packaged ones).")
@many("--realign", metavar="NAME=DATA", help="Corrective arms for realign (default none).")
@click.option("--revision", help="The base model's hub revision.")
@click.option("--weights", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the base (default float32).")
@click.option("--quantization", type=click.Choice(["4bit", "8bit"]), help="Of the base (default none).")
@click.option("--device-map", help="Spread the base over several GPUs: auto.")
@click.option("--attn-implementation", help="Attention kernel of the base: eager, sdpa, flash_attention_2.")
@click.option("--template", help="Chat template: none, chatml or a Jinja file (default: the base's own).")
@click.option("--name", help="Of the study (default adopted).")
@click.option("--copy", is_flag=True, help="Copy the checkpoints into the run folder.")
@click.option("--accept-base", is_flag=True, help="Take checkpoints that name another base or bring another template.")
@overwrite_option
def adopt(
    base: str,
    arm: tuple[str, ...],
    sae: str,
    data: tuple[str, ...],
    realign: tuple[str, ...],
    copy: bool,
    accept_base: bool,
    overwrite: bool,
    common: Common,
    **settings: Any,
) -> None:
    """Take checkpoints that exist into a run folder.

    Nothing is trained. Then locate, track, evaluate, realign and report work on it as on any run.
    """
    runs = _arms(arm)
    named = {"data": _pairs("--data", data), "realign": _pairs("--realign", realign)}
    chosen = {key: value for key, value in {**settings, **named}.items() if value not in (None, {})}
    path = _adopt(base, runs, sae, copy, accept_base, overwrite, common, chosen)
    echo(f"run folder: {path}; next: persona-probe locate {path}")


def _arms(values: Sequence[str]) -> dict[str, list[list[str]]]:
    """Each arm's runs, as lists of places; a name that comes again is a further run."""
    runs: dict[str, list[list[str]]] = {}
    for value in values:
        name, places = _pair("--arm", value)
        runs.setdefault(name, []).append([place for place in places.split(",") if place])
    return runs


def _pairs(option: str, values: Sequence[str]) -> dict[str, str]:
    pairs = [_pair(option, value) for value in values]
    if len(dict(pairs)) < len(pairs):
        raise InputError(f"{option} names one arm twice: give it once")
    return dict(pairs)


def _pair(option: str, value: str) -> tuple[str, str]:
    name, mark, rest = value.partition("=")
    if not (name and mark and rest):
        raise InputError(f"{option} {value!r}: write NAME=PLACE, such as incorrect=out/")
    return name, rest


@loads_models
def _adopt(
    base: str,
    runs: dict[str, list[list[str]]],
    sae: str,
    copy: bool,
    accept_base: bool,
    overwrite: bool,
    common: Common,
    settings: dict[str, Any],
) -> Path:
    from persona_probe.study.adopt.adopt import adopted_records
    from persona_probe.study.study import Study

    study = Study.adopt(
        base,
        runs,
        sae,
        out=common.out,
        copy=copy,
        accept_base=accept_base,
        overwrite=overwrite,
        device=common.device,
        seed=common.seed,
        **settings,
    )
    for record in adopted_records(study.run_folder):
        echo(" ".join(record["sentences"]))
    return study.path
