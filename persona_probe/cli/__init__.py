"""The command line, `persona-probe`: thin functions over the library, which is imported when a command runs."""

import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging

PROGRAM = "persona-probe"
COMPLETE = "_PERSONA_PROBE_COMPLETE"
"""Set by a shell that asks for completions."""
STOPPED = "stopped; the same command continues where it stopped"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line, and exit.

    Exit codes: 0 done; 2 bad input, with one line on standard error that says what to change; 1 anything else.

    Args:
        argv: the arguments; None takes the process's.
    """
    # Nothing is imported before this: Ctrl-C is answered in one line from here on.
    _open_streams()
    with _interrupts() as seen:
        try:
            code = _run(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()
        except KeyboardInterrupt:
            code = _say(STOPPED, 1)
        except BrokenPipeError:  # the reader of our output has ended, `| head` for example: nothing to say to it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except OSError as error:  # of the last flush
            from persona_probe.writing import reason

            code = _say(f"could not write to standard output: {reason(error)}", 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception:
            if not seen:
                raise
            code = _say(STOPPED, 1)  # a library made another error of Ctrl-C
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """Run a command line; returns the exit code."""
    import logging

    import click

    from persona_probe.cli.commands import root
    from persona_probe.cli.completion import complete
    from persona_probe.errors import InputError
    from persona_probe.writing import CURES, cure, os_error, reason

    if (answered := complete(root)) is not None:
        return answered
    logging.basicConfig(level=logging.WARNING, handlers=[_log_handler()])
    try:
        with root.make_context(PROGRAM, arguments) as context:
            return root.invoke(context) or 0
    except click.exceptions.NoArgsIsHelpError as group:  # `persona-probe` or `persona-probe data` alone
        sys.stdout.write(f"{group.ctx.get_help()}\n")
        return 0
    except click.exceptions.Exit as done:  # --help, --version
        return done.exit_code
    except click.UsageError as error:
        message = error.format_message().rstrip(".")
        command = error.ctx.command_path if error.ctx is not None else PROGRAM
        return _say(f"{message[:1].lower()}{message[1:]}: see {command} --help", 2)
    except InputError as error:
        return _say(str(error), 2)
    except BrokenPipeError:
        raise
    except Exception as error:
        known = os_error(error)  # also of libraries that have errors of their own
        if known is None:
            raise
        where = f" ({known.filename})" if known.filename else ""
        path = "choose another path" if known.errno in CURES else "check the path, or choose another"
        return _say(f"{reason(known)}{where}: {cure(known, path)}", 2)


def _say(message: str, code: int) -> int:
    """One line on standard error; returns the exit code."""
    from persona_probe.untrusted import one_line

    with suppress(OSError):
        sys.stderr.write(f"{PROGRAM}: {one_line(message)}\n")
    return code


def _log_handler() -> "logging.Handler":
    """Log lines on standard error; text in them cannot steer the terminal."""
    import logging

    from persona_probe.untrusted import terminal_text

    class PlainFormatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return terminal_text(super().format(record))

    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(message)s"))
    return handler


# --- What a process finds when it starts


def _open_streams() -> None:
    """Give closed standard streams a place, and let no character end a command that a terminal cannot show."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:  # otherwise the next file that is opened would be taken for it
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C as `KeyboardInterrupt`, and a list that says whether it came: some imports make other errors of it."""
    seen: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen  # somebody else's, or not ours to take
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
