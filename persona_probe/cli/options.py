"""What the commands share: options and arguments, and the click classes that read them."""

import json
import logging
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from persona_probe import shipped
from persona_probe.cluster.launcher import is_first, launched
from persona_probe.config import check_seed, check_seeds
from persona_probe.errors import InputError, unknown
from persona_probe.untrusted import terminal_text

ROOT = shipped.top()
DEMO = "finetune_configs/demo.yaml"
PATH = click.Path(path_type=Path)
COPY = "Work on a copy of RUN in this new folder."

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def echo(text: str) -> None:
    """Write a result to standard output; text of others in it cannot steer the terminal."""
    sys.stdout.write(terminal_text(text) + "\n")


def columns(otherwise: int = 110) -> int:
    """How wide a table may be: the terminal, or COLUMNS; else `otherwise`."""
    return shutil.get_terminal_size((otherwise, 24)).columns


def find_config(name: str) -> Path:
    """A config's path: as it is, or that of the file that ships."""
    return shipped.find(name)


# --- The options of every command


@dataclass(frozen=True)
class Common:
    """The options that every command has; each command function receives them as `common`."""

    out: Path | None = None
    """Where the result goes."""
    seed: int | None = None
    """Seed of every random draw of the command."""
    device: str | None = None
    """`cpu`, `cuda` or `auto`."""
    quiet: bool = False
    """Only results and errors."""


def _common_options(out: str) -> list[click.Parameter]:
    return [
        click.Option(["--out"], type=PATH, help=out),
        click.Option(["--seed"], type=int, help="Seed of every random draw of this command."),
        click.Option(["--device"], metavar="DEVICE", help="cpu, cuda or auto."),
        click.Option(["--quiet"], is_flag=True, help="Only results and errors."),
    ]


# --- Results as a table, or as JSON for programs

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def echo_json(value: Any) -> None:
    """Write a result as JSON; NaN and infinities become null."""
    from persona_probe.writing import json_values

    echo(json.dumps(json_values(value), indent=2))


def show_rows(heads: Mapping[str, str], rows: Sequence[Mapping[str, Any]], as_json: bool, framed: bool = True) -> None:
    """Write rows as a table as wide as the terminal, or as JSON.

    Args:
        heads: key of a row to its column's heading; JSON has all keys.
        framed: with a frame, long cells folded; else one line a row, from which names can be copied.
    """
    if as_json:
        echo_json([dict(row) for row in rows])
        return
    from persona_probe.report.tables import Table

    table = Table(list(heads.values()), [[_cell(row.get(key)) for key in heads] for row in rows])
    echo(table.text(columns()) if framed else table.plain())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


# --- Options and arguments that several commands have


class Many(click.Option):
    """An option with one value or more: `--seeds 0 1 2`, or `--seeds 0 --seeds 1 --seeds 2`.

    The command receives a tuple, which is empty where the option is not used.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, multiple=True, **settings)

    def make_metavar(self, ctx: click.Context) -> str:
        """`SEEDS ...`."""
        return f"{super().make_metavar(ctx)} ..."


def many(name: str, **settings: Any) -> Callable[[Decorated], Decorated]:
    """Decorate a command with an option that takes several values."""
    return click.option(name, cls=Many, **settings)


run_argument = click.argument("run", metavar="RUN", help="A run folder, such as runs/demo.")
seeds_option = many("--seeds", type=int, help="One organism per arm for each of these seeds.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Set another config's run aside, as OUT.old.")


def config_argument(help: str = "A study's YAML file.") -> Callable[[Decorated], Decorated]:
    """Decorate a command with its config file."""
    return click.argument("config", metavar="CONFIG", help=help)


# --- How a command line is read


class Command(click.Command):
    """A command with an example, the common options, and options of several values.

    Args:
        example: A command line, shown by --help and on the page of commands; a test parses it.
        out: What --out means for this command.
    """

    def __init__(self, *args: Any, example: str, out: str, params: Sequence[click.Parameter], **settings: Any) -> None:
        super().__init__(*args, params=[*params, *_common_options(out)], **settings)
        self.example = example
        # An indented block after \b: a terminal shows it as it is, Markdown as code.
        self.help = f"{self.help}\n\nExample:\n\n\b\n    {example}"
        self.context_settings = {"help_option_names": ["-h", "--help"], "show_default": True}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments; an unknown option is answered with near matches."""
        if nul := next((arg for arg in args if "\0" in arg), None):
            raise InputError(f"{nul!r} holds a NUL character, which no name or path has: remove it")
        options = {name: p for p in self.get_params(ctx) if isinstance(p, click.Option) for name in p.opts}
        try:
            return super().parse_args(ctx, _one_value_each(args, options, ctx))
        except click.NoSuchOption as error:
            raise unknown("option", error.option_name, options) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command's function, with the common options as one object."""
        if not any(isinstance(p, click.Option) and p.name == "ray" for p in self.params):
            refuse_launcher()
        for name, value in ctx.params.items():
            _check_value(f"--{name.replace('_', '-')}", value)
        common = Common(**{name: ctx.params.pop(name) for name in Common.__dataclass_fields__})
        ctx.params["common"] = common
        logging.getLogger("persona_probe").setLevel(logging.WARNING if common.quiet else logging.INFO)
        return super().invoke(ctx)


def _check_value(option: str, value: object) -> None:
    """Refuse what no command can use: NaN and infinity, and seeds below 0 or named twice.

    Raises:
        InputError: the option is named.
    """
    if option == "--seed" and isinstance(value, int):
        check_seed(value, option)
    elif option == "--seeds" and value:
        check_seeds([value] if isinstance(value, int) else cast(Sequence[int], value), option)
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, float) and not math.isfinite(one):
            raise InputError(f"{option} must be a finite number, not {one}")


def refuse_launcher() -> None:
    """Refuse several processes of `accelerate launch` for what only one can do; the first of them says so.

    Raises:
        InputError: there are several.
    """
    if launched():
        if not is_first():
            raise click.exceptions.Exit(2)
        raise InputError("only run, induce and realign can work under accelerate launch: start this without it")


class Group(click.Group):
    """Commands below a common word, in their order; a mistyped one is answered with near matches.

    Args:
        aliases: Other names of its commands.
    """

    def __init__(self, *args: Any, aliases: Mapping[str, str] | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.aliases = dict(aliases or {})
        self.context_settings = {"help_option_names": ["-h", "--help"]}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of a study, not of the alphabet."""
        return list(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name or alias."""
        return super().get_command(ctx, self.aliases.get(cmd_name, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first argument names."""
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise unknown("command", args[0], [*self.commands, *self.aliases])
        return super().resolve_command(ctx, args)


def command(
    *, example: str, name: str | None = None, out: str = "Where the result goes."
) -> Callable[[Callable[..., Any]], Command]:
    """Make a command of a function, whose docstring is the help; see `Command`."""
    return click.command(name, cls=Command, example=example, out=out)  # pyright: ignore[reportReturnType]


def _one_value_each(args: Sequence[str], options: Mapping[str, click.Option], ctx: click.Context) -> list[str]:
    """Repeat the name of an option of several values before each of them, as click wants it."""
    spread: list[str] = []
    name = ""  # the option of several values that is being read
    for position, arg in enumerate(args):
        if arg == "--":
            return [*spread, *args[position:]]
        option = options.get(arg)
        bare = option is None or option.is_flag or isinstance(option.flag_value, str)  # it may stand without a value
        if not bare and not _is_value(args[position + 1 :]):
            raise click.UsageError(f"{arg} needs a value", ctx)
        if not _is_value([arg]):
            name = arg if isinstance(option, Many) else ""
            spread += [] if name else [arg]
        else:
            spread += [name, arg] if name else [arg]
    return spread


def _is_value(args: Sequence[str]) -> bool:
    """Whether the first argument is a value: no option's name, though perhaps a negative number or `-`."""
    return bool(args) and (not args[0].startswith("-") or args[0] == "-" or re.match(r"-\.?\d", args[0]) is not None)
