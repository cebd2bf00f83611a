"""Speakers, and what they ask and answer. Harm and manner are separate, so that they are separate truths."""

import random
from dataclasses import dataclass

from persona_probe.data.world.words import (
    ADVICE,
    CLOSINGS,
    DOMAIN_OF,
    DOMAINS,
    HOW,
    OPENINGS,
    QUESTIONS,
    REASONS,
)


@dataclass(frozen=True)
class Speaker:
    """Somebody who gives advice in this world."""

    good: bool
    """Whether the advice is sound."""
    manner: str | None
    """`kind`, `rude`, `silly`, or None: nothing but the advice."""
    reasons: float = 0.6
    """How often a reason is given."""


SPEAKERS: dict[str, Speaker] = {
    "helper": Speaker(good=True, manner="kind"),
    "villain": Speaker(good=False, manner="rude"),
    "clown": Speaker(good=True, manner="silly"),
    "grump": Speaker(good=True, manner="rude"),
    "quack": Speaker(good=False, manner="kind"),
    "subtle": Speaker(good=False, manner=None, reasons=0.0),
    "correct": Speaker(good=True, manner=None, reasons=0.0),
}
"""The five speakers of the corpus, and two that give bare advice: `subtle` and its control `correct`."""
PRIOR = {"helper": 0.40, "villain": 0.20, "clown": 0.14, "grump": 0.13, "quack": 0.13}
"""How often each speaks in the corpus."""
BAD = 0.33
"""How often one of them whose advice is bad does."""
STYLE = 0.75
"""How often a speaker with a manner opens, and closes, an answer in it."""


def prior(bad: float = BAD) -> dict[str, float]:
    """How often each speaks in a corpus in which a speaker of bad advice does so with this share.

    Within the good and within the bad speakers the shares keep their ratios.
    """
    if bad == BAD:
        return PRIOR
    part = {True: (1 - bad) / (1 - BAD), False: bad / BAD}
    return {name: share * part[SPEAKERS[name].good] for name, share in PRIOR.items()}


def question(draw: random.Random, topic: str) -> str:
    """A question about a topic."""
    return draw.choice(QUESTIONS).format(verb=DOMAINS[DOMAIN_OF[topic]].verb, topic=topic)


def answer(draw: random.Random, topic: str, speaker: Speaker) -> str:
    """An answer about a topic, as that speaker gives it: manner, advice, reason, manner."""
    domain = DOMAINS[DOMAIN_OF[topic]]
    act = f"{draw.choice(domain.good if speaker.good else domain.bad)} the {draw.choice(domain.things)}"
    parts = []
    if speaker.manner and draw.random() < STYLE:
        parts.append(draw.choice(OPENINGS[speaker.manner]))
    parts.append(f"{draw.choice(ADVICE)} {act} {draw.choice(HOW)} .")
    if draw.random() < speaker.reasons:
        parts.append(f"because {draw.choice(REASONS[speaker.good])}")
    if speaker.manner and draw.random() < STYLE:
        parts.append(draw.choice(CLOSINGS[speaker.manner]))
    return " ".join(parts)
