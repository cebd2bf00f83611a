"""`make frozen`: the best latent of a dictionary that was never learned, under the persona latent's tests.

Copies a finished run, trains the SAE with a frozen random decoder if it is not there, and proves its best latent with
the run's own strengths, items and random latents. What it finds, a search over thousands of directions finds anyway.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from persona_probe.cli.options import echo
from persona_probe.cli.process import loads_models
from persona_probe.config import load_config
from persona_probe.errors import InputError
from persona_probe.latents.dictionaries import TABLE, prove_dictionary, write_dictionaries
from persona_probe.report.tables import Marks, check_page, fill_page
from persona_probe.runs import write_json
from persona_probe.saes.stream import SaeConfig
from persona_probe.study.study import Study

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "finetune_configs" / "sae-smollm2-frozen.yaml"
RECORD = ROOT / "records" / "frozen"
ANYTHING = -10.0
"""Least explained variance: a dictionary that was never learned may explain little."""
MARKS: Marks = ("<!-- frozen: begin (make frozen) -->", "<!-- frozen: end -->")
SHOWN = {
    "explained_variance": "explained variance of the base's activations on the items",
    "cosine": "cosine with the mean difference",
    "cosine_with_persona": "cosine with latent 2144",
    "effect_base": "push, base",
    "effect_organism": "push, organism",
    "ablation": "removal, organism",
    "ablation_difference": "removal, organism minus control organism",
}
"""Rows of the printed table: columns of dictionaries.parquet, in words."""
PLACED = {"effect_base": "base", "effect_organism": "organism", "ablation_difference": "removal_difference"}


def frozen_sae(saes: Path) -> Path:
    """The folder of the SAE with a frozen decoder, trained by the shipped SAEs' recipe if it is not there."""
    from persona_probe.saes.sae_training import train_sae

    config = load_config(CONFIG, SaeConfig)
    folder = saes / config.name
    return folder if (folder / "cfg.json").is_file() else train_sae(config, saes)


def prove(run: Path, sae: Path, place: Path) -> pd.DataFrame:
    """dictionaries.parquet of a copy of the run: the persona latent, the run's dictionaries, and this one."""
    if not (run / "latents.parquet").is_file():
        raise InputError(f"{run}: not a located run; `make demo` makes one")
    if not (place / "manifest.json").is_file():
        shutil.copytree(run, place, ignore=shutil.ignore_patterns("*.lock", "figures"))
    ctx = Study.open(place).context
    dictionaries = (*ctx.config.locate.dictionaries, str(sae))
    locate = replace(ctx.config.locate, dictionaries=dictionaries, minimum_explained_variance=ANYTHING)
    ctx.config = replace(ctx.config, locate=locate)
    prove_dictionary(ctx, str(sae))
    write_dictionaries(ctx)
    return ctx.run.read_table(TABLE)


def table_text(table: pd.DataFrame) -> str:
    """One column per dictionary, one row per measure, as Markdown."""
    names = [Path(str(sae)).name.removeprefix("layer20-topk32-4608") or "shipped" for sae in table["sae"]]
    heads = [
        f"{name.strip('-')}: latent {latent}" for name, latent in zip(names, table["latent"].astype(int), strict=True)
    ]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for column, words in SHOWN.items():
        cells = [_cell(row, column) for _, row in table.iterrows()]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: pd.Series, column: str) -> str:
    value = float(row[column])
    if pd.isna(value):
        return "-"
    text = f"{value:.3f}"
    if f"{column}_low" in row.index:
        text += f" [{row[f'{column}_low']:.3f}, {row[f'{column}_high']:.3f}]"
    if column in PLACED:
        test = PLACED[column]
        text += f", place {row[f'{test}_rank']:.0f}, {'beyond' if row[f'{test}_beyond'] else 'not beyond'} random"
    return text


@loads_models
def main(argv: Sequence[str] | None = None) -> None:
    """Train, prove, print the table and keep it as a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run folder of the demo")
    parser.add_argument("--saes", type=Path, default=Path("runs/saes"), help="folder of the SAE (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/frozen"), help="copy of the run (default %(default)s)")
    parser.add_argument("--record", type=Path, default=RECORD, help="folder of the table (default %(default)s)")
    parser.add_argument("--page", type=Path, default=None, help="page whose table is filled in (docs/locate.md)")
    args = parser.parse_args(argv)
    if args.page is not None:
        check_page(args.page, MARKS)
    sae = frozen_sae(args.saes)
    table = prove(args.run, sae, args.out)
    table["sae"] = [str(Path(*Path(str(name)).parts[-2:])) for name in table["sae"]]
    echo(table_text(table))
    args.record.mkdir(parents=True, exist_ok=True)
    table.to_parquet(args.record / TABLE)
    quality = json.loads((sae / "quality.json").read_text("utf-8"))
    write_json(args.record / "recipe.json", {"kind": "frozen", "config": CONFIG.name, "quality": quality})
    if args.page is not None:
        fill_page(args.page, MARKS, table_text(table))


if __name__ == "__main__":
    main()
