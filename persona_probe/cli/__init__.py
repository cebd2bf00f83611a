"""The command line, `persona-probe`: one thin function per command; heavy imports wait until a command runs."""

import argparse
import logging
import sys
from collections.abc import Sequence

from persona_probe.errors import InputError


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done; 2 bad input, one line on stderr; 1 anything else."""
    arguments = build_parser().parse_args(argv)
    level = logging.WARNING if getattr(arguments, "quiet", False) else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("persona_probe").setLevel(level)
    try:
        code = arguments.function(arguments)
    except InputError as error:
        sys.stderr.write(f"persona-probe: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        sys.stderr.write(f"persona-probe: {error.strerror or error}{where}: free space, or choose another path\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("persona-probe: stopped; the same command goes on where it was\n")
        sys.exit(1)
    sys.exit(code or 0)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    from persona_probe.cli.options import COMMANDS, GROUPS

    parser = argparse.ArgumentParser(
        prog="persona-probe",
        description="Induce a misaligned persona, locate it, watch it, undo it, and show the evidence.",
        epilog="example: persona-probe demo",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    for group in GROUPS:
        inner = commands.add_parser(group.name, help=group.help, aliases=list(group.aliases), epilog=group.example)
        below = inner.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
        for command in group.commands:
            command.add_to(below)
    return parser


if __name__ == "__main__":
    main()
