"""The command that joins run folders."""

from pathlib import Path

import click

from persona_probe.cli.options import Common, command, echo
from persona_probe.errors import InputError


@command(
    example="persona-probe merge runs/mine runs/mine-part-0 runs/mine-part-1",
    out="Not used: RUN is where the units go.",
)
@click.argument("run", metavar="RUN", help="The run folder that gets the units; it may be new.")
@click.argument("others", metavar="OTHER...", nargs=-1, required=True, help="Folders of the same config.")
@click.option("--any-versions", is_flag=True, help="Also take folders that other versions of packages made.")
def merge(run: str, others: tuple[str, ...], any_versions: bool, common: Common) -> None:
    """Join run folders of the same config that were made apart.

    Units that RUN lacks are copied, and its tables are joined. A unit that two folders have with different content is
    refused by its name, before anything is copied.
    """
    if common.out is not None:
        raise InputError("merge has no --out: RUN is where the units go")
    from persona_probe.cluster.merge import merge as join
    from persona_probe.runs import RunFolder

    merged = join(run, others, any_versions)
    echo(f"{len(merged.copied)} units copied, {merged.kept} were there already")
    if merged.tables:
        echo(f"tables: {', '.join(merged.tables)}")
    kind = RunFolder.open(run).manifest.get("kind")
    if kind is not None:
        name = {"mitigations": "mitigate", "monitor-study": "monitor study"}.get(kind, "the same command")
        echo(f"tables: `persona-probe {name} CONFIG --out {Path(run)}` makes them; it trains what is missing")
