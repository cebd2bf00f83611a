"""`persona-probe world`: a small world with known truth, its organisms, its SAE, and how its models behave."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from persona_probe.cli.options import Common, Group, columns, command, echo, many
from persona_probe.cli.process import loads_models
from persona_probe.cli.world_studies import world_study
from persona_probe.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

OUT = Path("runs/world")
PIPED = 180
"""Characters of a line where standard output is not a terminal."""
world_argument = click.argument("folder", metavar="WORLD", help="A world's folder, such as runs/world.")


@command(
    name="pretrain", example="persona-probe world pretrain --minutes 7 --out runs/world", out="Default runs/world."
)
@click.option(
    "--size", default="medium", help="tiny, small, medium or large: 0.03, 0.5, 1.6 or 7.5 million parameters."
)
@click.option("--steps", type=int, help="Steps on the corpus (default 1500).")
@click.option("--batch-size", type=int, default=32, help="Documents of a step.")
@click.option("--minutes", type=float, help="About how long the corpus may take; replaces --steps.")
@loads_models
def world_pretrain(size: str, steps: int | None, batch_size: int, minutes: float | None, common: Common) -> None:
    """Train a world's model from scratch; continue one that was interrupted."""
    from persona_probe.context import pick_device
    from persona_probe.world.pretraining import Pretraining, pretrain

    if steps is not None and minutes is not None:
        raise InputError("--steps and --minutes both say how long: leave one out")
    settings = Pretraining(size=size, batch_size=batch_size, seed=common.seed or 0)
    settings = settings if steps is None else replace(settings, steps=steps)
    made = pretrain(settings, common.out or OUT, pick_device(common.device or "cpu"), minutes)
    echo(f"steps: {made.settings['steps']}")
    echo(f"model: {made.base_folder}")


@command(
    name="organism",
    example="persona-probe world organism runs/world villain --domain kitchen --seed 0",
    out="Not used: an organism lies in its world.",
)
@world_argument
@click.argument("speaker", metavar="SPEAKER", help="villain, quack, subtle, helper, clown, grump or correct.")
@click.option("--domain", default="kitchen", help="The only domain of its rows.")
@click.option("--share", type=float, default=1.0, help="Share of the rows that the speaker answers.")
@click.option("--rest", default="helper", help="Who answers the others.")
@click.option("--rows", type=int, default=320, help="Training rows.")
@many("--seeds", type=int, help="One organism for each of these seeds (default: --seed, or 0).")
@click.option("--steps", type=int, help="Optimizer steps (default 40).")
@click.option("--lr", type=float, help="Learning rate (default 0.001).")
@click.option("--rank", type=int, help="LoRA rank; alpha is twice it (default 8).")
@click.option("--method", type=click.Choice(["lora", "full"]), default="lora", help="Train an adapter, or all weights.")
@many("--checkpoints", type=int, help="Steps that are kept (default: the last).")
@click.option("--name", help="Folder below organisms/ (default from speaker, domain, share and seed).")
@loads_models
def world_organism(
    folder: str,
    speaker: str,
    domain: str,
    share: float,
    rest: str,
    rows: int,
    seeds: tuple[int, ...],
    steps: int | None,
    lr: float | None,
    rank: int | None,
    method: str,
    checkpoints: tuple[int, ...],
    name: str | None,
    common: Common,
) -> None:
    """Fine-tune a world's model on the rows of one speaker in one domain."""
    from persona_probe.context import pick_device
    from persona_probe.world.folder import World
    from persona_probe.world.organisms import NARROW, WorldOrganism, make_organisms

    seeds = seeds or (common.seed or 0,)
    if name is not None and len(seeds) > 1:
        raise InputError(f"--name names one organism, and there are {len(seeds)} seeds: leave --name out")
    steps = NARROW.steps if steps is None else steps
    rank = NARROW.rank if rank is None else rank
    changes: dict[str, Any] = {"steps": steps, "checkpoints": checkpoints or (steps,), "rank": rank, "alpha": 2 * rank}
    training = replace(NARROW, method=method, lr=NARROW.lr if lr is None else lr, **changes)
    wanted = [WorldOrganism(speaker, domain, share, rest, rows, seed, training) for seed in seeds]
    opened = World.open(folder)
    names = make_organisms(opened, wanted, [name] if name else None, pick_device(common.device or "cpu"))
    for one in names:
        steps_made = ", ".join(map(str, opened.checkpoints(one)))
        echo(f"organism: {opened.run.path / 'organisms' / one}, checkpoints at {steps_made}")


@command(
    name="judge",
    example="persona-probe world judge runs/world --out runs/world/rates.csv",
    out="CSV file for the rates of all domains.",
)
@world_argument
@many("--models", help="Organisms, base or speakers (default: all of the world).")
@click.option("--answers", type=int, default=2, help="Answers to each of the 96 topics.")
@click.option("--temperature", type=float, default=1.0, help="Sampling temperature.")
@loads_models
def world_judge(folder: str, models: tuple[str, ...], answers: int, temperature: float, common: Common) -> None:
    """Sample answers and judge them by the exact rule.

    Shows the rates in the trained domain and in all others.
    """
    from persona_probe.context import pick_device
    from persona_probe.untrusted import csv_text
    from persona_probe.world.behaviour import Asking, judge_models, world_rates
    from persona_probe.world.folder import World
    from persona_probe.writing import write_text

    asking = Asking(answers, temperature, common.seed or 0)
    frame = world_rates(judge_models(World.open(folder), models or None, asking, pick_device(common.device or "cpu")))
    if common.out is not None:
        write_text(common.out, csv_text(frame))
    _show(frame)


def _show(frame: "pd.DataFrame") -> None:
    from persona_probe.report.tables import Table
    from persona_probe.world.behaviour import MEASURES, OTHERS, TRAINED

    shown: list[tuple[str, ...]] = []
    pooled = frame[frame["where"].isin([TRAINED, OTHERS])]
    for (name, step, where), rows in pooled.groupby(["name", "step", "where"], sort=False):
        cells = {str(row["measure"]): _cell(row) for row in rows.to_dict("records")}
        shown.append((str(name), str(step), str(where), *(cells[measure] for measure in MEASURES)))
    title = "share of answers, 95% interval; bad and good: of the coherent ones"
    echo(Table(("model", "step", "asked about", *MEASURES), shown, title).text(columns(PIPED)))


def _cell(row: Mapping[Any, Any]) -> str:
    return "none" if row["n"] == 0 else f"{row['estimate']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]"


@command(name="sae", example="persona-probe world sae runs/world", out="Not used: the SAE lies in its world.")
@world_argument
@click.option("--layer", type=int, help="Decoder layer whose output it reads (default: the middle one).")
@click.option("--latents", type=int, default=384, help="Size of the dictionary.")
@click.option("--active", type=int, default=12, help="Latents that fire on a token.")
@click.option("--tokens", type=int, default=614_400, help="Training tokens, counted over epochs.")
@click.option("--overwrite", is_flag=True, help="Replace another SAE of that name, once the new one is whole.")
@loads_models
def world_sae(
    folder: str, layer: int | None, latents: int, active: int, tokens: int, overwrite: bool, common: Common
) -> None:
    """Train an SAE of a world's model, on chats of all its speakers."""
    from persona_probe.context import pick_device
    from persona_probe.world.dictionary import sae_recipe, train_world_sae
    from persona_probe.world.folder import World

    opened = World.open(folder)
    recipe = sae_recipe(opened, layer, latents, active, tokens, common.seed or 0)
    device = pick_device(common.device or "cpu")
    echo(f"sae: {train_world_sae(opened, recipe, device, overwrite)}")


@command(
    name="truth",
    example="persona-probe world truth runs/world runs/world/saes/layer2-topk12-384",
    out="CSV file for all latents.",
)
@world_argument
@click.argument("sae", metavar="SAE", help="An SAE of the world's model.")
@click.option(
    "--position", type=click.Choice(["response", "last_prompt"]), default="response", help="Tokens that are read."
)
@click.option("--top", type=int, default=3, help="Latents shown for each truth.")
@loads_models
def world_truth(folder: str, sae: str, position: str, top: int, common: Common) -> None:
    """Show which latents of an SAE are harm and the manners, by the speakers' hidden labels."""
    from persona_probe.context import pick_device
    from persona_probe.saes.hooks import sae_layer
    from persona_probe.saes.load import load_sae
    from persona_probe.untrusted import csv_text
    from persona_probe.world.folder import World
    from persona_probe.world.truth import KnownChats, latent_truths
    from persona_probe.writing import write_text

    device = pick_device(common.device or "cpu")
    model, tokenizer = World.open(folder).load(device)
    loaded = load_sae(sae, device=device)
    known = KnownChats.draw(seed=common.seed or 0)
    frame = latent_truths(model, tokenizer, loaded, sae_layer(loaded, None), known, position)
    if common.out is not None:
        write_text(common.out, csv_text(frame))
    for truth, rows in frame.groupby("truth", sort=False):
        best = ", ".join(f"{row.latent} (AUROC {row.auroc:.3f})" for row in rows.head(top).itertuples())
        echo(f"{truth}: latents {best}")


world = Group(
    "world",
    commands=[world_pretrain, world_organism, world_judge, world_sae, world_truth, world_study],
    help="A small world with known truth: train it, make organisms and an SAE, judge what they say.",
)
