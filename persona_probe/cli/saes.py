"""`persona-probe saes`: sparse autoencoders of the checkout, training and quality."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from persona_probe.cli.loading import loading_options
from persona_probe.cli.options import (
    PATH,
    ROOT,
    Common,
    Group,
    command,
    config_argument,
    echo,
    echo_json,
    find_config,
    json_option,
    many,
    show_rows,
)
from persona_probe.cli.process import loads_models
from persona_probe.config import Loading
from persona_probe.files import read_json

if TYPE_CHECKING:
    from persona_probe.saes.stream import SaeConfig

DEVICE = "cpu"


@command(name="list", example="persona-probe saes list")
@json_option
def saes_list(as_json: bool, common: Common) -> None:  # noqa: ARG001
    """List the SAEs that come with the package, and the model that each fits."""
    folder = ROOT / "saes"
    heads = {"sae": "sae", "model": "fits the model", "hook": "reads", "latents": "latents"}
    heads |= {"explained_variance": "explained variance", "l0": "L0", "dead_share": "never firing"}
    show_rows(heads, [_about(cfg, folder) for cfg in sorted(folder.rglob("cfg.json"))], as_json, framed=False)


def _about(cfg: Path, folder: Path) -> dict[str, Any]:
    quality = cfg.with_name("quality.json")
    numbers = read_json(quality, dict, "fetch the SAE again") if quality.is_file() else {}
    config = read_json(cfg, dict, "fetch the SAE again")
    told = config.get("metadata") or {}
    names = {"sae": f"saes/{cfg.parent.relative_to(folder)}", "model": told.get("model_name")}
    measured = {name: numbers.get(name) for name in ("explained_variance", "l0", "dead_share")}
    return {**names, "hook": told.get("hook_name"), "latents": config.get("d_sae"), **measured}


@command(
    name="train", example="persona-probe sae train finetune_configs/sae-smollm2.yaml", out="Folder (default saes)."
)
@config_argument("A recipe's YAML file.")
@click.option("--overwrite", is_flag=True, help="Replace another SAE of that name, once the new one is whole.")
def saes_train(config: str, overwrite: bool, common: Common) -> None:
    """Train an SAE by its recipe; one that is there already is kept."""
    from persona_probe.config import load_config
    from persona_probe.saes.stream import SaeConfig

    recipe = load_config(find_config(config), SaeConfig)
    _train(recipe if common.seed is None else replace(recipe, seed=common.seed), overwrite, common)


@loads_models
def _train(recipe: "SaeConfig", overwrite: bool, common: Common) -> None:
    from persona_probe.saes.sae_training import train_sae

    echo(f"sae: {train_sae(recipe, common.out or Path('saes'), common.device or DEVICE, overwrite)}")


@command(
    name="check",
    example="persona-probe sae check saes/smollm2-135m-instruct/layer20-topk32-4608",
    out="JSON file for the numbers.",
)
@click.argument("sae", metavar="SAE", help="A folder, or release/sae_id.")
@click.option("--model", default="smollm2-135m-instruct", help="The model that the SAE reads.")
@many("--data", help="Packaged sets or files; default: the recipe's held-out samples and two packaged sets.")
@click.option("--layer", type=int, help="Decoder layer, where the SAE's metadata does not say.")
@click.option("--template", help="Chat template: none, chatml or a Jinja file (default: the model's own).")
@loading_options
@json_option
@loads_models
def saes_check(
    sae: str,
    model: str,
    data: tuple[str, ...],
    layer: int | None,
    template: str | None,
    loading: Loading,
    as_json: bool,
    common: Common,
) -> None:
    """Measure an SAE on chat text."""
    from persona_probe.cli.output import show_quality
    from persona_probe.saes.quality import quality_report
    from persona_probe.writing import write_text

    result = quality_report(sae, model, data or None, layer, common.device or DEVICE, loading, template)
    if common.out is not None:
        write_text(common.out, result.to_json(orient="records", indent=2) + "\n")
    if as_json:
        echo_json(result.to_dict(orient="records"))
    else:
        show_quality(result)


@command(
    name="convert",
    example="persona-probe saes convert downloads/resid_post_layer_15/trainer_1 saes/qwen-layer15",
    out="Not used: OUT is the second argument.",
)
@click.argument("source", metavar="IN", type=PATH, help="A folder with another library's SAE.")
@click.argument("target", metavar="OUT", type=PATH, help="The SAELens folder to write.")
@click.option("--kind", help="dictionary_learning's class, where its config.json does not say it.")
@click.option("--hook", help="Where the SAE reads, e.g. blocks.12.hook_resid_post, where its files do not say it.")
@click.option("--model", help="The model that it was trained on.")
def saes_convert(
    source: Path,
    target: Path,
    kind: str | None,
    hook: str | None,
    model: str | None,
    common: Common,  # noqa: ARG001
) -> None:
    """Write another library's SAE as a SAELens folder: dictionary_learning, sparsify, Gemma Scope."""
    from persona_probe.saes.foreign import convert

    echo(f"sae: {convert(source, target, kind=kind, hook=hook, model=model)}")


@command(
    name="shrink",
    example="persona-probe saes shrink saes/my-model/layer20 saes/my-model/layer20-bf16",
    out="Not used: OUT is the second argument.",
)
@click.argument("source", metavar="IN", type=PATH, help="A SAELens folder.")
@click.argument("target", metavar="OUT", type=PATH, help="The folder to write.")
def saes_shrink(
    source: Path,
    target: Path,
    common: Common,  # noqa: ARG001
) -> None:
    """Store an SAE's weights in bfloat16: half the bytes. `saes check` says whether anything is lost."""
    from persona_probe.saes.shrink import shrink

    echo(f"sae: {shrink(source, target)}")


saes = Group(
    "saes",
    commands=[saes_list, saes_train, saes_check, saes_convert, saes_shrink],
    help="Sparse autoencoders (also: sae): list, train, check, convert, shrink.",
)
