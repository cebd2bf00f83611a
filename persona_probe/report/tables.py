"""Tables of words and numbers: for a terminal, a notebook and a Markdown page; and a study's own displays."""

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from persona_probe.errors import InputError
from persona_probe.untrusted import terminal_text
from persona_probe.writing import write_text

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 110
"""Characters of a table in a terminal."""


@dataclass(frozen=True)
class Table:
    """Rows of cells under their heads; a cell is shown as `str` gives it."""

    heads: Sequence[object]
    """One a column; none, or empty ones, give a table without a header."""
    rows: Sequence[Sequence[object]]
    title: str = ""

    def text(self, width: int = WIDTH) -> str:
        """Framed, without colours, at most `width` characters wide: for a terminal.

        The frame is of ASCII where standard output has no other characters.
        """
        from io import StringIO

        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        title = Text(terminal_text(self.title)) if self.title else None
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        frame = box.HEAVY_HEAD if encoding.lower().startswith("utf") else box.ASCII
        table = RichTable(title=title, box=frame, show_header=any(self.heads), title_justify="left")
        names = max((len(terminal_text(str(row[0]))) for row in self.rows if row), default=0)
        for place, head in enumerate(self.heads):
            whole = place == 0 and names <= width // 3  # a name that is broken in two cannot be copied
            table.add_column(Text(terminal_text(str(head))), overflow="fold", no_wrap=whole)
        for row in self.rows:
            table.add_row(*(Text(terminal_text(str(value))) for value in row))
        out = StringIO()
        Console(file=out, width=width, color_system=None, force_jupyter=False).print(table)
        return out.getvalue().rstrip("\n")

    def plain(self, right: Collection[int] = ()) -> str:
        """Aligned columns, two spaces apart, without a frame; the columns `right` are aligned to the right."""
        lines = [[str(value) for value in line] for line in ([self.heads] if any(self.heads) else [])]
        lines += [[str(value) for value in row] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join(
                cell.rjust(width) if place in right else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *aligned] if self.title else aligned)

    def html(self) -> str:
        """For a notebook, in the notebook's colours; every cell is escaped."""
        line, cell = Markup("<tr>{}</tr>\n"), Markup('<td style="text-align: left; vertical-align: top">{}</td>')
        head = Markup("").join(Markup('<th style="text-align: left">{}</th>').format(h) for h in self.heads)
        body = Markup("").join(line.format(Markup("").join(cell.format(value) for value in row)) for row in self.rows)
        top = Markup("<thead>{}</thead>").format(line.format(head)) if self.heads else ""
        caption = Markup("<caption>{}</caption>").format(self.title) if self.title else ""
        # a plain string: Markup would escape whatever HTML a caller adds to it
        return str(Markup("<table>{}{}<tbody>{}</tbody></table>").format(caption, top, body))

    def markdown(self) -> str:
        """For a page of the docs; a bar in a cell is escaped, and the title is left out."""
        lines = [self.heads, ["---"] * len(self.heads), *self.rows]
        return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


# --- A page of the docs with tables between two marks

Marks = tuple[str, str]
"""The lines, usually HTML comments, before and after what a command writes into a page."""


def fill_page(path: Path, marks: Marks, text: str) -> None:
    """Replace the text between a page's two marks.

    Raises:
        InputError: no such page, or one of the marks is missing.
    """
    check_page(path, marks)
    begin, end = marks
    head, _, rest = path.read_text(encoding="utf-8").partition(begin)
    write_text(path, f"{head}{begin}\n\n{text}\n{end}{rest.partition(end)[2]}")


def check_page(path: Path, marks: Marks) -> None:
    """Refuse a page that cannot be filled; call it before the work whose result goes there.

    Raises:
        InputError: no such page, not a text, or one of the marks is missing.
    """
    begin, end = marks
    if not path.is_file():
        raise InputError(f"no page at {path}: give a Markdown file with {begin} and {end}")
    try:
        _, mark, rest = path.read_text(encoding="utf-8").partition(begin)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text: give a Markdown file") from error
    if not mark or end not in rest:
        raise InputError(f"{path} has not the marks {begin} and {end}: add them where the tables go")


# --- What a study shows of its latents and its verdict

COLUMNS = ("latent", "rank", "rise", "cosine", "effect_base", "effect_organism", "ablation", "causal", "label")
"""Columns of a feature table; an effect is shown with its interval."""


@dataclass(frozen=True, repr=False)
class FeatureTable:
    """The latents worth looking at, one row each: HTML in a notebook, text in a terminal."""

    frame: "pd.DataFrame"
    """Rows of `study.features`, with all their columns."""

    @classmethod
    def of(cls, features: "pd.DataFrame", count: int = 10) -> "FeatureTable":
        """The persona latent, then those tested for cause by effect, then the best by rank; `count` rows in all."""
        order = ["persona", "effect_base", "rank"]
        rows = features.sort_values(order, ascending=[False, False, True], na_position="last")
        return cls(rows.loc[rows["kind"] != "random"].head(count))

    def _table(self, title: str) -> Table:
        columns = [name for name in COLUMNS if name in self.frame]
        rows = [[_value(row, column) for column in columns] for row in self.frame.to_dict("records")]
        return Table([column.replace("_", " ") for column in columns], rows, title)

    def _repr_html_(self) -> str:
        return self._table("Latents; effects in nats per token with 95% intervals").html()

    def __repr__(self) -> str:
        return self._table(f"{len(self.frame)} latents; effects in nats per token with 95% intervals").text()


@dataclass(frozen=True, repr=False)
class StudyVerdict:
    """A study's result: its headline, its checks and the verdict on each corrective arm."""

    headline: str
    checks: tuple[tuple[str, bool, str], ...]
    """Name, whether it passed, and its statement."""
    arms: Mapping[str, str]
    """Statement by corrective arm."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What the table calls an arm, where that is not its id."""

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> "StudyVerdict":
        """From a study's summary."""
        checks = tuple((c["name"], c["passed"], c["statement"]) for c in summary["checks"])
        verdicts = summary["verdicts"]
        labels = {arm: v["label"] for arm, v in verdicts.items() if "label" in v}
        return cls(summary["headline"], checks, {arm: v["statement"] for arm, v in verdicts.items()}, labels)

    def _table(self) -> Table:
        rows = [["passed" if passed else "FAILED", name, statement] for name, passed, statement in self.checks]
        rows += [["verdict", self.labels.get(arm, arm), statement] for arm, statement in self.arms.items()]
        return Table(("", "what", "statement"), rows)

    def _repr_html_(self) -> str:
        return Markup("<p><strong>{}</strong></p>\n{}").format(self.headline, Markup(self._table().html()))

    def __repr__(self) -> str:
        return f"{self.headline}\n{self._table().text()}"


def _value(row: Mapping[Any, Any], column: str) -> str:
    from persona_probe.report.theme import estimate_text, number

    value = row[column]
    if f"{column}_low" in row:
        return estimate_text(value, row[f"{column}_low"], row[f"{column}_high"], missing="not tested")
    return str(value) if isinstance(value, (str, bool, int)) else number(value)


# --- Numbers of a decision, in a line


def number_words(numbers: Mapping[str, Any]) -> str:
    """Numbers in a line: `seconds 12.3, over_control 0.21 [0.15, 0.27]`."""
    return ", ".join(f"{name} {_number_words(value)}" for name, value in numbers.items())


def _number_words(value: Any) -> str:
    if isinstance(value, Mapping) and {"estimate", "ci_low", "ci_high"} <= set(value):
        return (
            f"{_number_words(value['estimate'])} [{_number_words(value['ci_low'])}, {_number_words(value['ci_high'])}]"
        )
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_number_words(one)}" for name, one in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(_number_words, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
