"""`persona-probe completion`: what a shell needs to complete commands and options."""

import os

import click

from persona_probe.cli import COMPLETE, PROGRAM
from persona_probe.cli.options import Common, command, echo

SHELLS = ("bash", "zsh", "fish")


@command(example="persona-probe completion bash", out="Not used.")
@click.argument("shell", type=click.Choice(SHELLS), help="Your shell.")
@click.pass_context
def completion(context: click.Context, shell: str, common: Common) -> None:  # noqa: ARG001
    """Print a script that completes commands and options in your shell.

    In the start-up file of bash or zsh: eval "$(persona-probe completion bash)".
    """
    from click.shell_completion import get_completion_class

    of_shell = get_completion_class(shell)
    assert of_shell is not None
    echo(of_shell(context.find_root().command, {}, PROGRAM, COMPLETE).source())


def complete(root: click.Command) -> int | None:
    """Answer a shell that asks for completions; None where none asks."""
    from click.shell_completion import shell_complete

    asked = os.environ.get(COMPLETE)
    return None if asked is None else shell_complete(root, {}, PROGRAM, COMPLETE, asked)
