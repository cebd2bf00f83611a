"""A feature card: everything that a study knows of one latent, as plain values. Reading one needs no model."""

from dataclasses import dataclass


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
    """What one ranker says of a latent; None where it does not say."""

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
class Findings:
    """What the study's tables say of a latent."""

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
    """One latent: its scores, its cause, what it writes, and what it fires on. Shows itself in a notebook."""

    latent: int
    label: str
    """As the study's table calls the latent."""
    name: str
    """The user's, or a suggestion that says what it is made of."""
    suggested: bool
    """Whether nobody has given the name."""
    findings: Findings
    top_tokens: tuple[TokenLogit, ...]
    bottom_tokens: tuple[TokenLogit, ...]
    examples: tuple[Example, ...]
    """Of the base model, the strongest first."""
    activity: tuple[Activity, ...]
    """Base model first, then the organism where it was read."""
    neighbours: tuple[Neighbour, ...]
    n_latents: int
    sae: str
    text: str
    """What passages and activity were read on."""
    silent_on: tuple[str, ...] = ()
    """Parts of the text on which it never fires in the base model."""
    neuronpedia: str | None = None
    """Address of the latent's page, where the SAE's metadata names one."""

    def _repr_html_(self) -> str:
        """The card as self-contained HTML without scripts; all text is escaped."""
        from persona_probe.report.cards_page import card_html

        return card_html(self)

    def __str__(self) -> str:
        from persona_probe.displays import card_text

        return card_text(self)
