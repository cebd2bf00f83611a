"""Small tables of values: escaped HTML for a notebook, text for a terminal."""

from collections.abc import Iterable, Sequence

from markupsafe import Markup

Cells = Sequence[object]
WIDTH = 110
"""Characters of a table in a terminal."""


def html_table(heads: Cells, rows: Iterable[Cells], caption: str = "") -> str:
    """A table for a notebook, in its own colours; every cell is escaped."""
    line, cell = Markup("<tr>{}</tr>\n"), Markup('<td style="text-align: left; vertical-align: top">{}</td>')
    head = Markup("").join(Markup('<th style="text-align: left">{}</th>').format(h) for h in heads)
    body = Markup("").join(line.format(Markup("").join(cell.format(value) for value in row)) for row in rows)
    top = Markup("<thead>{}</thead>").format(line.format(head)) if heads else ""
    said = Markup("<caption>{}</caption>").format(caption) if caption else ""
    return str(Markup("<table>{}{}<tbody>{}</tbody></table>").format(said, top, body))


def text_table(heads: Cells, rows: Iterable[Cells], title: str = "") -> str:
    """A table for a terminal, as plain text."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, show_header=any(heads), title_justify="left")
    for head in heads:
        table.add_column(Text(str(head)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    out = StringIO()
    Console(file=out, width=WIDTH, color_system=None, force_jupyter=False).print(table)
    return out.getvalue().rstrip("\n")
