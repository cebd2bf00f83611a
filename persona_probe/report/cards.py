"""A feature card: everything that a study measured of one latent, as plain values. Reading one needs no model."""

import json
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, is_dataclass
from itertools import cycle
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from markupsafe import Markup

from persona_probe.report.page import asset, render, script_hash, visible
from persona_probe.report.tables import Table
from persona_probe.report.theme import estimate_text, number
from persona_probe.stats import Estimate, ends_text


@dataclass(frozen=True)
class TokenLogit:
    """A token that a latent's decoder row promotes or suppresses."""

    token: str
    """Its text (untrusted)."""
    id: int
    logit: float
    """Direct logit effect of one unit of activation, before the final norm divides."""


@dataclass(frozen=True)
class Score:
    """One ranker's score of a latent; None if it has no score for it."""

    ranker: str
    value: float | None
    rank: int | None
    """1 is the most persona-like."""
    ci_low: float | None = None
    ci_high: float | None = None


@dataclass(frozen=True)
class Effect:
    """A causal effect on the contrast index, in nats per token, with its 95% interval; None where not tested."""

    name: str
    estimate: float | None
    ci_low: float | None
    ci_high: float | None


@dataclass(frozen=True)
class Push:
    """One point of the steering curve: the contrast index at a signed strength."""

    model: str
    strength: float
    unit: str
    estimate: float
    ci_low: float | None
    ci_high: float | None
    delta: float
    """Change against the unsteered model."""
    perplexity_ratio: float | None
    within_bound: bool


@dataclass(frozen=True)
class Example:
    """A passage on which the latent fires strongly; a long one is cut around its maximum."""

    source: str
    tokens: tuple[str, ...]
    """Texts (untrusted)."""
    values: tuple[float, ...]
    maximum: float
    peak: int
    """Position of the maximum in `tokens`."""
    cut_before: bool = False
    cut_after: bool = False


@dataclass(frozen=True)
class Activity:
    """How often and how strongly a latent fires on the text, in one model."""

    model: str
    tokens: int
    firing_rate: float
    """Share of the tokens on which it is active."""
    maximum: float
    bin_width: float
    counts: tuple[int, ...]
    """Active tokens in [0, width), [width, 2 width) ...; empty where it never fires in any model."""


@dataclass(frozen=True)
class Neighbour:
    """Another latent, and the cosine of the two decoder rows."""

    latent: int
    cosine: float


@dataclass(frozen=True)
class Voices:
    """Whether a latent follows what is said or how: mean activations over answers, in the base model.

    Intervals are over questions.
    """

    questions: int
    insults: float
    """On sound polite answers with three insults inserted."""
    neutral_words: float
    """On the same answers with three neutral words at the same places."""
    injection: Estimate
    """`insults` minus `neutral_words`."""
    means: dict[str, float]
    """On the four answers of the 2x2 set."""
    harm: Estimate
    """Bad minus sound advice, both tones averaged."""
    register: Estimate
    """Contemptuous minus polite answers, both kinds of advice averaged."""
    follows: str
    """`harm`, `register`, `both` or `neither`: which of the two lies above zero."""

    @property
    def injection_words(self) -> str:
        """The test of token injection in a sentence."""
        low, high = self.injection.ci_low, self.injection.ci_high
        found = "It fires on inserted insults" if low > 0 else "It does not fire more on inserted insults"
        return (
            f"{found}: mean activation {number(self.insults)} on {self.questions} neutral answers with three insults, "
            f"{number(self.neutral_words)} with three neutral words (difference "
            f"{estimate_text(self.injection.estimate, low, high)})."
        )

    @property
    def paraphrase_words(self) -> str:
        """The test of paraphrase in a sentence."""
        follows = {
            "harm": "It follows harm, not register",
            "register": "It follows register, not harm",
            "both": "It follows both harm and register",
            "neither": "It follows neither harm nor register",
        }[self.follows]
        m, harm, register = self.means, self.harm, self.register
        return (
            f"{follows}: mean activation {number(m['harm_polite'])} on bad advice said politely, "
            f"{number(m['harm_rude'])} with contempt, {number(m['sound_rude'])} on sound advice with contempt, "
            f"{number(m['sound_polite'])} on sound polite answers (harm "
            f"{estimate_text(harm.estimate, harm.ci_low, harm.ci_high)}, register "
            f"{estimate_text(register.estimate, register.ci_low, register.ci_high)})."
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Voices":
        """From the plain values of cards.json."""
        estimates = {name: Estimate(**values[name]) for name in ("injection", "harm", "register")}
        return cls(**{**values, **estimates})


LEAST_SCORE = 0.7
"""Balanced accuracy below which a label is not shown."""
NO_LABEL = "no label"


@dataclass(frozen=True)
class Explanation:
    """What a latent fires on, in words, with how well the words tell it (see `latents.labels`)."""

    text: str
    """The words (they may hold tokens, which are untrusted); empty where there are too few passages to find any."""
    author: str
    """`rule`, or the model that wrote it."""
    detection: Estimate | None
    """Balanced accuracy in telling passages on which it fires from others, held out; None where it was not scored."""
    fuzzing: Estimate | None
    """Balanced accuracy in telling whether marked tokens are those on which it fires."""
    reason: str = ""
    """Why it is no label; empty where it is one."""

    @property
    def label(self) -> str:
        """The words, or `no label` where either score is under `LEAST_SCORE`."""
        return NO_LABEL if self.reason or not self.text else self.text

    @property
    def scores_words(self) -> str:
        """Both scores with intervals, and what a label without enough of them says."""
        if self.detection is None or self.fuzzing is None:
            return self.reason
        parts = [
            f"{name} {one.estimate:.2f} {ends_text(one.ci_low, one.ci_high, '.2f')}, n = {one.n}"
            for name, one in (("detection", self.detection), ("fuzzing", self.fuzzing))
        ]
        return "; ".join(parts) + (f": {self.reason}, best guess: {self.text}" if self.reason else "")


@dataclass(frozen=True)
class Findings:
    """The rows of the study's tables about a latent."""

    persona: bool
    """Whether it is the study's persona feature."""
    kind: str
    """`candidate` (tested for cause), `random` (a control) or `other`."""
    scores: tuple[Score, ...]
    suppressed: bool | None
    """Whether it fires significantly less in the incorrect arm; None where that was not tested."""
    q_value: float | None
    """Of the rise, over all latents (Benjamini and Hochberg)."""
    firing: dict[str, float]
    """Arm: firing rate on the selection split."""
    effects: tuple[Effect, ...]
    strength: float | None
    """At which `effects` were measured, in `unit`."""
    unit: str
    steering: tuple[Push, ...]


@dataclass(frozen=True)
class FeatureCard:
    """One latent: its scores, its cause, what it writes, and what it fires on. Displays itself in a notebook."""

    latent: int
    label: str
    """As the study's table calls the latent."""
    name: str
    """The user's name, or a suggestion that names its source."""
    suggested: bool
    """Whether the name is only a suggestion."""
    findings: Findings
    top_tokens: tuple[TokenLogit, ...]
    bottom_tokens: tuple[TokenLogit, ...]
    examples: tuple[Example, ...]
    """Of the base model, the strongest first."""
    activity: tuple[Activity, ...]
    """Base model first, then the organism if it was read."""
    neighbours: tuple[Neighbour, ...]
    n_latents: int
    sae: str
    text: str
    """What passages and activity were read on."""
    silent_on: tuple[str, ...] = ()
    """Parts of the text on which it never fires in the base model."""
    neuronpedia: str | None = None
    """Address of the latent's page, where the SAE's metadata names one."""
    voices: Voices | None = None
    """What it follows, harm or register; None in a study without a 2x2 set."""
    explanations: tuple[Explanation, ...] = ()
    """Labels with their scores on held-out passages: by rule, then by models; none in cards of earlier versions."""

    def _repr_html_(self) -> str:
        """The card as self-contained HTML without scripts; all text is escaped."""
        return card_html(self)

    def __str__(self) -> str:
        return _card_text(self)


# --- A card's two plots as SVG: the histogram of activations and the steering curve

LEFT, RIGHT, TOP, BOTTOM = 46, 350, 10, 130
"""Edges of the plotting area, in units of the SVG's view box."""
STYLES = {"base": "base", "incorrect": "tuned", "correct": "control"}
"""CSS classes of models with a fixed meaning: their colours are those of the figures."""
FURTHER = ("third", "fourth")
"""CSS classes of other models, in their order."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """One bar or point."""

    x: float
    y: float
    width: float = 0
    height: float = 0
    low: float | None = None
    high: float | None = None
    hollow: bool = False
    title: str = ""


@dataclass(frozen=True)
class Series:
    """What one model adds to a plot."""

    name: str
    style: str
    marks: tuple[Mark, ...]
    path: str
    level: float | None = None
    """Height of the unsteered model's line."""


@dataclass(frozen=True)
class Plot:
    """Everything that the template draws."""

    series: tuple[Series, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_title: str
    y_title: str
    caption: str


def styles_of(models: Sequence[str]) -> dict[str, str]:
    """The CSS class of each model."""
    further = cycle(FURTHER)
    return {name: STYLES.get(name) or next(further) for name in models}


Scale = Callable[[float], float]


def linear(low: float, high: float, start: float, stop: float) -> Scale:
    """The straight line that takes `low` to `start` and `high` to `stop`, rounded to tenths."""
    span = (high - low) or 1.0
    return lambda value: round(start + (value - low) / span * (stop - start), 1)


def histogram(activity: Sequence[Activity]) -> Plot | None:
    """Tokens by activation, on a log scale: bars for the base model, outlines for others; None if it never fires."""
    filled = [i for one in activity for i, count in enumerate(one.counts) if count]
    if not filled:
        return None
    bins, width = max(filled) + 1, activity[0].bin_width
    most = max(max(one.counts, default=0) for one in activity)
    x = linear(0, bins * width, LEFT, RIGHT)
    y = linear(0, math.log10(1 + most), BOTTOM, TOP)
    styles = styles_of([one.model for one in activity])
    series = tuple(_bars(one, styles[one.model], bins, x, y) for one in activity)
    powers = [10**k for k in range(math.floor(math.log10(most)) + 1)]
    rates = "; ".join(f"{one.model}: active on {one.firing_rate:.2%} of {one.tokens:,} tokens" for one in activity)
    return Plot(
        series=series,
        x_ticks=tuple(Tick(x(v), number(v)) for v in (0.0, bins * width / 2, bins * width)),
        y_ticks=(Tick(y(0), "0"), *(Tick(y(math.log10(1 + p)), f"{p:,}") for p in powers)),
        x_title="activation",
        y_title="tokens (log)",
        caption=f"How often each activation occurs ({rates}). Silent tokens are left out.",
    )


def _bars(one: Activity, style: str, bins: int, x: Scale, y: Scale) -> Series:
    width, marks, path = one.bin_width, [], [f"M{LEFT} {BOTTOM}"]
    for i, count in enumerate([*one.counts[:bins], *[0] * (bins - len(one.counts))]):
        left, right, top = x(i * width), x((i + 1) * width), y(math.log10(1 + count))
        path.append(f"V{top}H{right}")
        if count:
            title = f"{one.model}: {count:,} tokens from {number(i * width)} to {number((i + 1) * width)}"
            marks.append(Mark(left, top, round(right - left, 1), round(BOTTOM - top, 1), title=title))
    return Series(one.model, style, tuple(marks), "".join([*path, f"V{BOTTOM}"]))


def steering(pushes: Sequence[Push]) -> Plot | None:
    """The contrast index against signed strength, a line for each steered model; None if it was not steered."""
    if not pushes:
        return None
    strengths = sorted({p.strength for p in pushes} | {0.0})
    values = [v for p in pushes for v in (p.estimate, p.ci_low, p.ci_high, p.estimate - p.delta) if v is not None]
    x = linear(strengths[0], strengths[-1], LEFT + 8, RIGHT - 8)
    y = linear(min(values), max(values), BOTTOM - 4, TOP)
    models = list(dict.fromkeys(p.model for p in pushes))
    outside = sum(not p.within_bound for p in pushes)
    return Plot(
        series=tuple(_line(pushes, model, style, x, y) for model, style in styles_of(models).items()),
        x_ticks=tuple(Tick(x(v), f"{v:+g}" if v else "0") for v in _few(strengths)),
        y_ticks=tuple(Tick(y(v), number(v)) for v in (min(values), (min(values) + max(values)) / 2, max(values))),
        x_title=f"signed strength ({pushes[0].unit})",
        y_title="contrast index",
        caption=(
            f"Contrast index (nats per token) under steering, n = {len(pushes)} pushes with 95% intervals. Dotted: "
            f"unsteered. Hollow: the {outside} at which neutral perplexity leaves its bound."
        ),
    )


def _line(pushes: Sequence[Push], model: str, style: str, x: Scale, y: Scale) -> Series:
    points = sorted((p for p in pushes if p.model == model), key=lambda p: p.strength)
    marks = tuple(
        Mark(
            x(p.strength),
            y(p.estimate),
            low=None if p.ci_low is None else y(p.ci_low),
            high=None if p.ci_high is None else y(p.ci_high),
            hollow=not p.within_bound,
            title=f"{model}, {p.strength:+g} {p.unit}: {p.estimate:.3f}, perplexity x {number(p.perplexity_ratio)}",
        )
        for p in points
    )
    path = "M" + "L".join(f"{m.x} {m.y}" for m in marks)
    return Series(model, style, marks, path, y(sum(p.estimate - p.delta for p in points) / len(points)))


def _few(values: Sequence[float], most: int = 7) -> list[float]:
    """The ends, zero, and as many others as fit."""
    step = math.ceil(len(values) / most)
    return [v for i, v in enumerate(values) if i % step == 0 or v == 0 or i == len(values) - 1]


# --- The page of feature cards, with search and sorting, and the single card that a notebook shows

EFFECTS = {
    "base": "steered up in the base model",
    "organism": "steered in the organism",
    "selection": "on the selection split, which chose it",
}
"""Causal effects of the latents table, in words; others keep their column's name."""


def cards_page(cards: Sequence[FeatureCard], study: str, base_model: str) -> str:
    """One self-contained HTML page; nothing in it is fetched, and no script but its own may run.

    Args:
        cards: in the order in which they are listed at first.
        study, base_model: named in the heading.
    """
    script, latents = asset("cards.js"), {card.latent for card in cards}
    return render(
        "cards.html.j2",
        {
            "study": study,
            "base_model": base_model,
            "cards": [_view(card, place, latents) for place, card in enumerate(cards)],
            "orders": _orders(cards),
            "text": cards[0].text if cards else "",
            "cards_policy": content_policy(asset("theme.js"), script),
            "cards_script": Markup(script),
        },
    )


def saved_cards(saved: Sequence[Mapping[str, Any]]) -> list[FeatureCard]:
    """The cards of cards.json, as `locate` wrote them; none if an earlier version wrote them with fewer fields."""
    try:
        return [_of(FeatureCard, values) for values in saved]
    except (TypeError, KeyError, AttributeError):
        return []


def saved_explanation(saved: Mapping[str, Any]) -> Explanation:
    """One label of cards.json."""
    return _of(Explanation, saved)


def _of(kind: Any, value: Any) -> Any:
    """A value of the annotated type `kind` from its plain JSON: dataclasses, tuples of them, or None."""
    if value is None:
        return None
    if get_origin(kind) in (Union, UnionType):
        return _of(next(one for one in get_args(kind) if one is not NoneType), value)
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_of(one, part) for one, part in zip(kinds, value, strict=True))
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _of(hints[name], part) for name, part in value.items()})  # pyright: ignore
    return value


def card_html(card: FeatureCard) -> str:
    """One card as a fragment for a notebook: its own style, inline SVG, no script."""
    style = Markup("<style>{}</style>\n").format(Markup(asset("cards.css")))
    return style + Markup(render("card.html.j2", {"c": _view(card, 0, set())}))


def content_policy(*scripts: str) -> str:
    """A content policy: nothing is fetched, and only scripts with exactly these texts run."""
    return (
        f"default-src 'none'; script-src {' '.join(map(script_hash, scripts))}; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )


def _view(card: FeatureCard, place: int, latents: Set[int]) -> dict[str, Any]:
    """What the card's template shows; plain values, which it escapes."""
    return {
        "card": card,
        "scores": [
            {"ranker": s.ranker, "value": estimate_text(s.value, s.ci_low, s.ci_high), "rank": s.rank}
            for s in card.findings.scores
        ],
        "effects": [
            {"name": EFFECTS.get(e.name, e.name), "value": estimate_text(e.estimate, e.ci_low, e.ci_high)}
            for e in card.findings.effects
            if e.estimate is not None
        ],
        "steering": steering(card.findings.steering),
        "histogram": histogram(card.activity),
        "examples": [_example(e) for e in card.examples],
        "listed": latents,
        "search": _search_text(card),
        "order": json.dumps(_order(card, place)),
    }


def _example(example: Example) -> dict[str, Any]:
    tokens = [
        {"text": visible(text), "value": f"{value:.3g}", "share": f"{max(0.0, value / example.maximum):.2f}"}
        for text, value in zip(example.tokens, example.values, strict=True)
    ]
    return {"example": example, "tokens": tokens}


def _search_text(card: FeatureCard) -> str:
    """Names, tokens and latents; of a passage only the token of its maximum, or common words would find every card."""
    tokens = [t.token for t in (*card.top_tokens, *card.bottom_tokens)]
    peaks = [e.tokens[e.peak] for e in card.examples]
    labels = [one.label for one in card.explanations]
    words = [f"latent {card.latent}", card.name, card.label, *labels, *tokens, *peaks]
    return " ".join(visible(" ".join(words)).lower().split())


def _order(card: FeatureCard, place: int) -> dict[str, float]:
    """Sorting keys, smallest first; a missing key sorts last."""
    keys: dict[str, float] = {"listed": place, "latent": card.latent}
    keys |= {f"rank {s.ranker}": s.rank for s in card.findings.scores if s.rank is not None}
    keys |= {f"effect {e.name}": -e.estimate for e in card.findings.effects if e.estimate is not None}
    return keys


def _orders(cards: Sequence[FeatureCard]) -> list[tuple[str, str]]:
    """Keys and words of the sorting menu: as listed, every ranker and effect that any card has, latent."""
    keys = dict.fromkeys(key for place, card in enumerate(cards) for key in _order(card, place))
    words = {"listed": "as listed: strongest tested first", "latent": "latent number"}
    return [
        (key, words.get(key, key.replace("rank ", "ranker: ").replace("effect ", "causal effect: "))) for key in keys
    ]


def _card_text(card: "FeatureCard") -> str:
    """A card as a table of text: scores, effects, tokens and where it fires most."""
    known = card.findings
    rows = [[f"ranker {s.ranker}", f"{number(s.value)}, rank {s.rank} of {card.n_latents}"] for s in known.scores]
    rows += [
        [f"effect, {e.name}", estimate_text(e.estimate, e.ci_low, e.ci_high)]
        for e in known.effects
        if e.estimate is not None
    ]
    rows += [["promotes", ", ".join(t.token.strip() for t in card.top_tokens)]]
    rows += [["suppresses", ", ".join(t.token.strip() for t in card.bottom_tokens)]]
    rows += [[f"fires at {number(e.maximum)}", _peak_words(e)] for e in card.examples[:3]]
    rows += [[f"fires on, by {one.author}", f"{one.label} ({one.scores_words})"] for one in card.explanations]
    if card.voices is not None:
        rows += [["insults", card.voices.injection_words], ["paraphrase", card.voices.paraphrase_words]]
    return Table(("", ""), rows, f"Latent {card.latent}: {card.name}").text()


def _peak_words(example: Example) -> str:
    """The words that lead to the passage's maximum, and its token in brackets."""
    before = " ".join("".join(example.tokens[max(0, example.peak - 12) : example.peak]).split())
    return f"{before} [{example.tokens[example.peak].strip()}]"
