"""How a study, its latents, its verdict and a card show themselves: HTML in a notebook, a table in a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup

# --- Small tables of values: escaped HTML for a notebook, text for a terminal

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


COLUMNS = ("latent", "rank", "rise", "cosine", "effect_base", "effect_organism", "ablation", "causal", "label")
"""Columns of a feature table; an effect stands with its interval."""


@dataclass(frozen=True, repr=False)
class FeatureTable:
    """The latents worth looking at, one row each: a notebook shows HTML, a terminal a table."""

    frame: pd.DataFrame
    """Rows of `study.features`, with all their columns."""

    @classmethod
    def of(cls, features: pd.DataFrame, count: int = 10) -> "FeatureTable":
        """The persona latent, then those tested for cause by effect, then the best by rank; `count` rows in all."""
        order = ["persona", "effect_base", "rank"]
        rows = features.sort_values(order, ascending=[False, False, True], na_position="last")
        return cls(rows.loc[rows["kind"] != "random"].head(count))

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        columns = [name for name in COLUMNS if name in self.frame]
        rows = self.frame.to_dict("records")
        return [c.replace("_", " ") for c in columns], [[_value(row, c) for c in columns] for row in rows]

    def _repr_html_(self) -> str:
        heads, rows = self._cells()
        return html_table(heads, rows, "Latents; effects in nats per token with 95% intervals")

    def __repr__(self) -> str:
        heads, rows = self._cells()
        return text_table(heads, rows, f"{len(rows)} latents; effects in nats per token with 95% intervals")


@dataclass(frozen=True, repr=False)
class StudyVerdict:
    """What a study found: headline, checks and the verdict of each corrective arm."""

    headline: str
    checks: tuple[tuple[str, bool, str], ...]
    """Name, whether it passed, and its statement."""
    arms: Mapping[str, str]
    """Statement by corrective arm."""

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> "StudyVerdict":
        """From a study's summary."""
        checks = tuple((c["name"], c["passed"], c["statement"]) for c in summary["checks"])
        return cls(summary["headline"], checks, {arm: v["statement"] for arm, v in summary["verdicts"].items()})

    def _cells(self) -> list[list[str]]:
        checks = [["passed" if passed else "FAILED", name, statement] for name, passed, statement in self.checks]
        return checks + [["verdict", arm, statement] for arm, statement in self.arms.items()]

    def _repr_html_(self) -> str:
        words = Markup("<p><strong>{}</strong></p>\n").format(self.headline)
        return words + html_table(("", "what", "statement"), self._cells())

    def __repr__(self) -> str:
        return f"{self.headline}\n{text_table(('', 'what', 'statement'), self._cells())}"


def _value(row: Mapping[Any, Any], column: str) -> str:
    value = row[column]
    if f"{column}_low" in row:
        return _interval_text(value, row[f"{column}_low"], row[f"{column}_high"])
    return str(value) if isinstance(value, (str, bool, int)) else _number(value)


def _interval_text(value: Any, low: Any, high: Any) -> str:
    from persona_probe.report.theme import interval_text
    from persona_probe.stats import Estimate

    nan = float("nan")
    if value is None or value != value:
        return "not tested"
    return interval_text(Estimate(value, nan if low is None else low, nan if high is None else high, 0))


def _number(value: Any) -> str:
    return "–" if value is None or value != value else f"{value:.3g}"


def _around(tokens: Sequence[str], peak: int) -> str:
    """The words that lead to a token, and it in brackets."""
    before = " ".join("".join(tokens[max(0, peak - 12) : peak]).split())
    return f"{before} [{tokens[peak].strip()}]"
