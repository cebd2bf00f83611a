"""`persona-probe mitigate`."""

import argparse
import sys
from pathlib import Path

from persona_probe.commands import echo, find_config
from persona_probe.errors import InputError

Arguments = argparse.Namespace
PIPED = 220
"""Characters of a line where standard output is no terminal."""


def mitigate(args: Arguments) -> None:
    """A grid of mitigations against the same inducing data, and its table.

    Args (beside the common ones): config, run, only, page, dry_run.
    """
    from dataclasses import replace

    from persona_probe.config_files import load_config
    from persona_probe.mitigate.config import Grid

    grid = load_config(find_config(args.config), Grid)
    if args.seed is not None:
        grid = replace(grid, seeds=(args.seed,))
    if args.page is not None:
        _check_page(args.page)
    from persona_probe.memory import keep_freed_memory
    from persona_probe.quiet import quiet_libraries

    keep_freed_memory()
    quiet_libraries()
    out = args.out or Path("runs") / grid.name
    if args.dry_run:
        from persona_probe.mitigate.plan import plan_lines

        echo("\n".join(plan_lines(grid, out, args.run, args.only)))
        return
    from persona_probe.mitigate.grid import run_grid

    outcome = run_grid(grid, out, args.device, args.run, args.only)
    from rich.console import Console

    from persona_probe.mitigate.plan import show_tables
    from persona_probe.mitigate.summary import HEADINGS, fill_page, markdown, shown

    console = Console() if sys.stdout.isatty() else Console(width=PIPED)
    for table in show_tables(shown(outcome.table), HEADINGS, grid.name, console.width):
        console.print(table)
    for found in outcome.summary["verdicts"]:
        echo(found["statement"])
    if args.page is not None:
        fill_page(args.page, markdown(outcome.table, outcome.missing))
    if outcome.missing:
        echo(f"{len(outcome.missing)} cells are still missing: the same command without --only trains them")
    echo(f"table: {out / 'mitigations.csv'}")


def _check_page(page: Path) -> None:
    """Told before hours of training, not after."""
    from persona_probe.mitigate.summary import check_page

    try:
        check_page(page)
    except UnicodeDecodeError as error:
        raise InputError(f"{page} is no text: give a Markdown file") from error
