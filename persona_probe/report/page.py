"""Self-contained pages: the template environment, figures as inert JSON, atomic writes."""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from persona_probe.report.theme import number

CONTENT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
    "base-uri 'none'; form-action 'none'"
)
"""No request leaves a page: nothing may be fetched, from anywhere."""

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def figure_json(fig: go.Figure) -> Markup:
    """A figure's data and layout as JSON for a script element: no text in it can close or open a tag."""
    return _inert(str(fig.to_json()))


def visible(token: object) -> str:
    """A token's text with line breaks and tabs made visible; plain text, still to be escaped."""
    return str(token).replace("\n", "⏎").replace("\t", "⇥")


def render(template: str, context: Mapping[str, Any]) -> str:
    """A page from a template of this package, with style, plotly.js and our script inlined; all text is escaped."""
    assets = {
        "policy": CONTENT_POLICY,
        "style": Markup(_asset("report.css")),
        "plotly_js": Markup(get_plotlyjs()),
        "script": Markup(_asset("report.js")),
    }
    return _environment().get_template(template).render(**assets, **context)


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all: under a temporary name beside it, then moved into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def _inert(text: str) -> Markup:
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return Markup(text)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("persona_probe.report", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure_json"] = figure_json
    environment.filters["number"] = number
    environment.filters["visible"] = visible
    environment.filters["tojson_plain"] = json.dumps  # its result is escaped like any text
    return environment


def _asset(name: str) -> str:
    return files("persona_probe.report").joinpath(name).read_text(encoding="utf-8")
