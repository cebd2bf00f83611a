"""docs/cli.md, written from the table of commands by `python -m persona_probe.command_page`."""

from pathlib import Path

from persona_probe.cli.options import COMMANDS, GROUPS, Command, Group, Option

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
NO_OUT = "not used"
HEAD = """# Commands

Written from the table that the program itself reads (`persona_probe/command_table.py`) by
`make docs`. Do not edit it here.

Every command has `--help` with an example, and these options:

| option | meaning |
|---|---|
| `--out OUT` | where the result goes; see each command |
| `--seed SEED` | seed of every random draw of this command |
| `--device DEVICE` | cpu, cuda or auto |
| `--quiet` | only results and errors |

Exit codes: 0 done; 2 bad input, with one line that says what to change; 1 anything else. A stopped command goes on
where it was.
"""


def command_page() -> str:
    """The whole page as Markdown: each command with its help, example, and its own arguments and options."""
    parts = [_command(command, "", "##") for command in COMMANDS]
    return "\n".join([HEAD, *parts, *(_group(group) for group in GROUPS)])


def _group(group: Group) -> str:
    also = f" Also `persona-probe {'`, `'.join(group.aliases)}`." if group.aliases else ""
    head = f"## {group.name}\n{_sentence(group.help)}{also}\n"
    return "\n".join([head, *(_command(command, f"{group.name} ", "###") for command in group.commands)])


def _command(command: Command, prefix: str, level: str) -> str:
    rows = [_row(option) for option in command.options]
    if command.out != NO_OUT:
        rows.append(f"| `--out OUT` | {_cell(command.out)} |")
    table = "\n".join(["| argument | meaning |", "|---|---|", *rows]) + "\n" if rows else ""
    return f"{level} {prefix}{command.name}\n{_sentence(command.help)}\n\n```sh\n{command.example}\n```\n\n{table}"


def _row(option: Option) -> str:
    """`--seeds SEEDS ...` and what it means, with choices and default where the help does not say them."""
    settings, name = option.settings, option.names[-1]
    meaning = str(settings.get("help", ""))
    if settings.get("choices"):
        meaning += f": {', '.join(map(str, settings['choices']))}"
    if settings.get("default") is not None and "default" not in meaning:
        default = settings["default"]
        meaning += f" (default {' '.join(default) if isinstance(default, list) else default})"
    if settings.get("required"):
        meaning += " (required)"
    shown = name if settings.get("action") == "store_true" else _with_value(name, option)
    return f"| `{shown}` | {_cell(meaning)} |"


def _with_value(name: str, option: Option) -> str:
    """The name with its value: `--seeds SEEDS ...`; a positional argument is its value, in brackets where optional."""
    settings = option.settings
    value = settings.get("metavar", name.lstrip("-").upper().replace("-", "_"))
    value = " ".join(value) if isinstance(value, tuple) else value
    many = {"+": f"{value} ...", "?": f"[{value}]"}.get(str(settings.get("nargs")), value)
    return f"{name} {many}" if name.startswith("-") else many


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("_", "\\_").replace("*", "\\*")


def _sentence(text: str) -> str:
    return _cell(text[:1].upper() + text[1:]) + "."


if __name__ == "__main__":
    PAGE.write_text(command_page(), encoding="utf-8")
