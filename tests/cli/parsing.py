"""Command lines read by the real parser, without running them."""

from collections.abc import Iterator, Sequence

import click

from persona_probe.cli import PROGRAM
from persona_probe.cli.commands import root
from persona_probe.cli.options import Command


def parse(arguments: Sequence[str]) -> click.Context:
    """The context of the command that the arguments name, with its values in `params`.

    Raises:
        click.UsageError, InputError: what the user would be told.
    """
    resilient, rest = "--help" in arguments, list(arguments)
    context = root.make_context(PROGRAM, list(rest), resilient_parsing=resilient)
    while isinstance(context.command, click.Group):
        name, command, rest = context.command.resolve_command(context, rest)
        assert command is not None
        context = command.make_context(name, rest, parent=context, resilient_parsing=resilient)
    return context


def commands(group: click.Group = root, path: str = "") -> Iterator[tuple[str, Command]]:
    """Every command below a group, with its name as it is typed."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")
        else:
            assert isinstance(command, Command)
            yield f"{path}{name}", command
