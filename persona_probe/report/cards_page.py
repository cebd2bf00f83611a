"""The page of feature cards, with search and sorting, and the single card that a notebook shows."""

import json
from collections.abc import Sequence, Set
from typing import Any

from markupsafe import Markup

from persona_probe.locate.feature_card import Example, FeatureCard
from persona_probe.report.card_plots import histogram, steering
from persona_probe.report.page import asset, render, script_hash, visible
from persona_probe.report.theme import interval_text
from persona_probe.stats import Estimate

EFFECTS = {
    "base": "steered up in the base model",
    "organism": "steered in the organism",
    "selection": "on the selection split, which chose it",
}
"""Causal effects of the latents table, in words; others keep their column's name."""
NAN = float("nan")


def cards_page(cards: Sequence[FeatureCard], study: str, base_model: str) -> str:
    """One self-contained HTML page; nothing in it is fetched, and no script but its own may run.

    Args:
        cards: in the order in which they are listed at first.
        study, base_model: named in the heading.
    """
    script, listed = asset("cards.js"), {card.latent for card in cards}
    return render(
        "cards.html.j2",
        {
            "study": study,
            "base_model": base_model,
            "cards": [_view(card, place, listed) for place, card in enumerate(cards)],
            "orders": _orders(cards),
            "text": cards[0].text if cards else "",
            "cards_policy": content_policy(asset("theme.js"), script),
            "cards_script": Markup(script),
        },
    )


def card_html(card: FeatureCard) -> str:
    """One card as a fragment for a notebook: its own style, inline SVG, no script."""
    style = Markup("<style>{}</style>\n").format(Markup(asset("cards.css")))
    return style + Markup(render("card.html.j2", {"c": _view(card, 0, set())}))


def content_policy(*scripts: str) -> str:
    """Nothing may be fetched, and only scripts of these very texts may run."""
    return (
        f"default-src 'none'; script-src {' '.join(map(script_hash, scripts))}; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )


def _view(card: FeatureCard, place: int, listed: Set[int]) -> dict[str, Any]:
    """What the card's template shows; plain values, which it escapes."""
    return {
        "card": card,
        "scores": [
            {"ranker": s.ranker, "value": _interval(s.value, s.ci_low, s.ci_high), "rank": s.rank}
            for s in card.findings.scores
        ],
        "effects": [
            {"name": EFFECTS.get(e.name, e.name), "value": _interval(e.estimate, e.ci_low, e.ci_high)}
            for e in card.findings.effects
            if e.estimate is not None
        ],
        "steering": steering(card.findings.steering),
        "histogram": histogram(card.activity),
        "examples": [_example(e) for e in card.examples],
        "listed": listed,
        "search": _search_text(card),
        "order": json.dumps(_order(card, place)),
    }


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return interval_text(None)
    return interval_text(Estimate(value, NAN if low is None else low, NAN if high is None else high, 0))


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
    words = [f"latent {card.latent}", card.name, card.label, *tokens, *peaks]
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
