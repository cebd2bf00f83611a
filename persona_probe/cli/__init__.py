"""The command line, `persona-probe`: thin functions over the library, which is imported when a command runs."""

import errno
import logging
import os
import sys
from collections.abc import Sequence

import click

from persona_probe import __version__
from persona_probe.cli import adopt, data, doctor, judge_commands, loop, merge, presets, runs, saes, studies, world
from persona_probe.cli.options import Group
from persona_probe.errors import InputError

PROGRAM = "persona-probe"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

root = Group(
    PROGRAM,
    commands=[
        *(loop.demo, loop.run, loop.induce, adopt.adopt, loop.locate, loop.track, loop.realign),
        *(studies.mitigate, judge_commands.evaluate, loop.report),
        *(runs.figures, runs.compare, merge.merge, runs.verify, runs.cite, runs.watch, doctor.doctor),
        *(presets.presets, saes.saes, data.data, judge_commands.judge, studies.monitor, studies.bench),
        world.world,
    ],
    aliases={"sae": "saes"},
    help="Induce a misaligned persona, locate it, watch it, undo it, and show the evidence.\n\nExample:\n\n\b\n"
    "    persona-probe demo",
)
root = click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")(root)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line, and exit.

    Exit codes: 0 done; 2 bad input, with one line on standard error that says what to change; 1 anything else.

    Args:
        argv: the arguments; None takes the process's.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        with root.make_context(PROGRAM, list(sys.argv[1:] if argv is None else argv)) as context:
            code = root.invoke(context)
    except click.exceptions.NoArgsIsHelpError as group:  # `persona-probe` or `persona-probe data` alone
        sys.stdout.write(f"{group.ctx.get_help()}\n")
        sys.exit(0)
    except click.exceptions.Exit as done:  # --help, --version
        sys.exit(done.exit_code)
    except click.UsageError as error:
        _refuse(_usage(error))
    except InputError as error:
        _refuse(str(error))
    except BrokenPipeError:  # the reader of our output has ended, `| head` for example: nothing to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        change = "free space, or choose another path" if error.errno in FULL else "check the path, or choose another"
        _refuse(f"{error.strerror or error}{where}: {change}")
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROGRAM}: stopped; the same command continues where it stopped\n")
        sys.exit(1)
    sys.exit(code or 0)


def _usage(error: click.UsageError) -> str:
    """A usage error in one line, with the command whose --help shows the right usage."""
    message = error.format_message().rstrip(".")
    command = error.ctx.command_path if error.ctx is not None else PROGRAM
    return f"{message[:1].lower()}{message[1:]}: see {command} --help"


def _refuse(message: str) -> None:
    sys.stderr.write(f"{PROGRAM}: {' '.join(message.split())}\n")
    sys.exit(2)
