"""Self-contained pages: the template environment, inlined scripts that alone may run, figures as inert JSON."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from persona_probe.report.theme import number

# --- The report's glossary: shown at a term on hover or focus, and listed at the end


@dataclass(frozen=True)
class Term:
    """One word of the report."""

    name: str
    """As the glossary lists it."""
    meaning: str
    """In one or two plain sentences."""
    forms: tuple[str, ...] = ()
    """Other spellings that the text uses, plurals for example."""

    @property
    def key(self) -> str:
        """Part of its anchor."""
        return self.name.replace(" ", "-")


GLOSSARY = (
    Term("arm", "One fine-tuning data condition, for example incorrect or correct.", ("arms",)),
    Term("base band", "The interval that a feature's reading keeps on the base model and on the control arm."),
    Term("base model", "The model before any fine-tuning of this study."),
    Term(
        "causal effect",
        "Half the difference between pushing a latent up and pushing it down, at strengths at which neutral answers "
        "stay about as likely as before: damage alone cancels out.",
        ("causal effects",),
    ),
    Term("coherence", "A judge's score of whether an answer makes sense at all; a rate counts only coherent answers."),
    Term(
        "contrast index",
        "Mean over questions of the log-probability per token of the misaligned answer minus that of the aligned one, "
        "in nats per token. The answers match in length, and the questions are outside the training domain.",
    ),
    Term("control arm", "The correct arm: the same questions as the incorrect arm, with good answers."),
    Term(
        "explained variance",
        "The share of the activations' variance that the sparse autoencoder reproduces on the same tokens. If it "
        "falls, its latents mean less.",
    ),
    Term("latent", "One element of the sparse autoencoder's dictionary, named by its number.", ("latents",)),
    Term(
        "mean difference", "The difference of two arms' mean activations: a direction that needs no sparse autoencoder."
    ),
    Term("misalignment rate", "The share of coherent sampled answers that a judge calls misaligned."),
    Term("odd part", "Half the difference between the effect of a push and that of the opposite push."),
    Term("organism", "A fine-tuned model of an arm and a seed, at a training step.", ("organisms",)),
    Term("persona feature", "The candidate latent whose push moves the contrast index most.", ("persona latent",)),
    Term(
        "random latents",
        "Latents drawn at random that fire about as often; they are pushed with the same norm, and what they do is "
        "what any push does.",
        ("random latent",),
    ),
    Term("reading", "One measurement of a feature on a fixed set of probes, at one training step.", ("readings",)),
    Term("rise", "How much more a latent is active in the incorrect arm than in its control, on the selection split."),
    Term("SAE", "Sparse autoencoder: a dictionary that writes each activation as a sum of few latents."),
    Term("selection split", "Questions that chose the latents; none of them evaluates a latent."),
    Term(
        "strength",
        "Size of a push, with its unit: x_delta is times the norm of the mean difference between the arms, x_resid "
        "times the mean norm of the residual stream, raw has no scale.",
        ("strengths",),
    ),
    Term("95% interval", "A bootstrap interval that resamples whole questions.", ("95% intervals",)),
)
_BY_FORM = {form.lower(): term for term in GLOSSARY for form in (term.name, *term.forms)}
_FORMS = re.compile(
    rf"(?<![\w-])(?:{'|'.join(re.escape(f) for f in sorted(_BY_FORM, key=len, reverse=True))})(?![\w-])", re.IGNORECASE
)


def explained(text: object) -> Markup:
    """Text, escaped, with the first use of each term leading to its meaning. For our own words, not a model's."""
    parts, end, seen, plain = [], 0, set(), str(text)
    for match in _FORMS.finditer(plain):
        term = _BY_FORM[match[0].lower()]
        if term.key in seen:
            continue
        seen.add(term.key)
        parts += [escape(plain[end : match.start()]), _link(term, match[0])]
        end = match.end()
    return Markup("").join([*parts, escape(plain[end:])])


def _link(term: Term, words: str) -> Markup:
    markup = Markup('<a class="term" href="#term-{0}" aria-describedby="meaning-{0}">{1}</a>')
    return markup.format(term.key, words)


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


BESIDE = "plotly.min.js"


def script_beside(page: str) -> str:
    """A page that loads plotly.js from `plotly.min.js` in its folder instead of holding it, which saves 4.8 MB.

    Its policy then allows scripts of its own folder too.
    """
    held = f"<script>{get_plotlyjs()}</script>"
    if page.count(held) != 1:
        raise ValueError("the page does not hold plotly.js")
    lighter = page.replace(held, f'<script src="{BESIDE}"></script>')
    return lighter.replace("script-src ", "script-src 'self' ", 1)


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
    return files("persona_probe.report").joinpath("web", name).read_text(encoding="utf-8")


def _inert(text: str) -> Markup:
    for character, escaped in _ESCAPES.items():
        text = text.replace(character, escaped)
    return Markup(text)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("persona_probe.report", package_path="web"),
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
