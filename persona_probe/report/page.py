"""Self-contained pages: the template environment, inlined scripts that alone may run, figures as inert JSON."""

import base64
import hashlib
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

from persona_probe.report.glossary import GLOSSARY, explained
from persona_probe.report.theme import number

SCRIPTS = ("theme.js", "report.js", "tables.js", "answers.js", "terms.js")
"""Our scripts: the first in the head, where it sets the theme before anything is drawn."""

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def figure_json(fig: go.Figure) -> Markup:
    """A figure's data and layout as JSON for a script element: no text in it can close or open a tag."""
    return _inert(str(fig.to_json()))


def visible(token: object) -> str:
    """A token's text with line breaks and tabs made visible; plain text, still to be escaped."""
    return str(token).replace("\n", "⏎").replace("\t", "⇥")


def render(template: str, context: Mapping[str, Any]) -> str:
    """A page from a template of this package, with style, plotly.js and our scripts inlined; all text is escaped.

    The template gets `policy`, `style`, `plotly_js`, `script` (draws figures), `theme_script` and `page_scripts` (the
    report's tables, answers and terms). No other script runs: the policy names the hash of each.
    """
    scripts = {name: asset(name) for name in SCRIPTS}
    assets = {
        "policy": content_policy(),
        "style": Markup(asset("report.css")),
        "plotly_js": Markup(get_plotlyjs()),
        "theme_script": Markup(scripts["theme.js"]),
        "script": Markup(scripts["report.js"]),
        "page_scripts": [Markup(scripts[name]) for name in SCRIPTS[2:]],
        "glossary": GLOSSARY,
    }
    return _environment().get_template(template).render(**assets, **context)


@cache
def content_policy() -> str:
    """No request leaves a page, and no script runs but plotly.js and ours, each by its hash.

    Styles are free: plotly.js writes them, and a style cannot fetch anything either.
    """
    allowed = " ".join(script_hash(text) for text in (get_plotlyjs(), *map(asset, SCRIPTS)))
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def script_hash(text: str) -> str:
    """A script's source expression in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def asset(name: str) -> str:
    """A style or script of this package."""
    return files("persona_probe.report").joinpath(name).read_text(encoding="utf-8")


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all: under a temporary name beside it, then moved into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")  # other line ends would change the scripts' hashes
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
    environment.filters["explained"] = explained
    environment.filters["figure_json"] = figure_json
    environment.filters["number"] = number
    environment.filters["visible"] = visible
    environment.filters["tojson_plain"] = json.dumps  # its result is escaped like any text
    return environment
