"""`presets`: list ready configs for models and published pairs, and write one."""

import os
import shutil
import sys
from pathlib import Path

import click

from persona_probe.cli.options import Common, command, echo, echo_json, json_option
from persona_probe.cli.process import loads_models
from persona_probe.errors import InputError


@command(example="persona-probe presets qwen2.5-7b-instruct --out mine.yaml", out="YAML file (default: print it).")
@click.argument("name", required=False, metavar="[NAME]", help="A preset; without one, all are listed.")
@click.option("--recipe", is_flag=True, help="The recipe of an SAE, for a model without a published one.")
@click.option("--tflops", type=float, default=200.0, help="Sustained speed for the estimates, in 1e12 operations/s.")
@json_option
def presets(name: str | None, recipe: bool, tflops: float, as_json: bool, common: Common) -> None:
    """List presets, or write one as a study's config.

    Each names its SAE (or says that none is published), layer, template settings and licence, with an estimate of
    memory and time. Nothing is downloaded.
    """
    from persona_probe.study.presets.known_presets import find_preset
    from persona_probe.study.presets.preset_text import recipe_text

    if tflops <= 0:
        raise InputError(f"--tflops must be above 0, not {tflops:g}")
    if name is None:
        if recipe or common.out is not None:
            raise InputError("--recipe and --out are for one preset: name it")
        _list(tflops, as_json)
        return
    preset = find_preset(name)
    if as_json:
        if common.out is not None:
            raise InputError("--out writes YAML: leave --json out")
        values = preset.recipe() if recipe else preset.values()
        if values is None:
            raise InputError(f"preset {name!r} needs no recipe: its SAE is published ({preset.sae})")
        echo_json(values)
        return
    if recipe:
        text = recipe_text(preset)
        if text is None:
            raise InputError(f"preset {name!r} needs no recipe: its SAE is published ({preset.sae})")
        _write(text, common.out)
    else:
        _write(_config(name, tflops), common.out)


@loads_models
def _list(tflops: float, as_json: bool) -> None:
    from persona_probe.study.presets.preset_text import known_presets, listing

    if as_json:
        echo_json(known_presets(tflops))
        return

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else None
    echo(listing(tflops, width))


@loads_models
def _config(name: str, tflops: float) -> str:
    from persona_probe.study.presets.known_presets import find_preset
    from persona_probe.study.presets.preset_text import config_text

    return config_text(find_preset(name), tflops)


def _write(text: str, out: Path | None) -> None:
    if out is None:
        sys.stdout.write(text)
        return
    from persona_probe.writing import write_text

    if out.exists():
        raise InputError(f"{out} exists: give another path")
    echo(f"written: {write_text(out, text)}")
