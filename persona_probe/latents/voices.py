"""Does a latent follow what is said or how? Insults inserted into neutral answers, and the same advice in two tones.

Both are read on the base model, on questions of the 2x2 set's selection split.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from persona_probe.context import Context
from persona_probe.data.chat import conversation
from persona_probe.data.load import ANSWERS_2X2, Row
from persona_probe.data.tokens import conversation_batches
from persona_probe.evaluate.effects_2x2 import item_effects
from persona_probe.report.cards import Voices
from persona_probe.saes.read import read_latents
from persona_probe.stats import Estimate, bootstrap_mean, paired_difference

QUESTIONS = 24
INSULTS = ("idiot", "moron", "loser")
NEUTRAL = ("neighbour", "visitor", "reader")
"""Words for persons without contempt: they stand where the insults stand."""

Means = Float[np.ndarray, "questions latents"]


def inserted(answer: str, words: Sequence[str]) -> str:
    """The answer with the words inserted at even distances, each between two words of the answer."""
    parts = answer.split()
    places = [round(len(parts) * (n + 1) / (len(words) + 1)) for n in range(len(words))]
    for place, word in sorted(zip(places, words, strict=True), reverse=True):
        parts.insert(place, word)
    return " ".join(parts)


def spread(rows: Sequence[Row], count: int = QUESTIONS) -> list[Row]:
    """At most `count` rows, evenly over the set, so that every category is there."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [rows[int(place)] for place in places]


def read_voices(ctx: Context, latents: Sequence[int]) -> list[Voices | None]:
    """What each latent follows: mean activation over the tokens of an answer, in the base model.

    Returns:
        One a latent; None for each in a study without a 2x2 set.
    """
    if ctx.set_2x2 is None:
        return [None] * len(latents)
    rows = spread(ctx.rows_2x2("selection"))
    answers = {name: [row[name] for row in rows] for name in ANSWERS_2X2}
    for name, words in (("insults", INSULTS), ("neutral", NEUTRAL)):
        answers[name] = [inserted(row["sound_polite"], words) for row in rows]
    talks = [conversation(row["question"], a) for many in answers.values() for row, a in zip(rows, many, strict=True)]
    groups = conversation_batches(ctx.tokenizer, talks)
    with ctx.base() as model:
        read = read_latents(model, ctx.sae, groups, ctx.layer, "response", bf16=ctx.config.bf16)
    by_answer: dict[str, Means] = dict(
        zip(answers, read.mean[:, list(latents)].reshape(len(answers), len(rows), -1), strict=True)
    )
    return [_voices({name: means[:, column] for name, means in by_answer.items()}) for column in range(len(latents))]


def _voices(means: dict[str, Float[np.ndarray, " questions"]]) -> Voices:
    """One latent's two tests."""
    effects = item_effects(means)
    harm, register = bootstrap_mean(effects["harm"]), bootstrap_mean(effects["register"])
    return Voices(
        questions=len(means["insults"]),
        insults=float(means["insults"].mean()),
        neutral_words=float(means["neutral"].mean()),
        injection=paired_difference(means["insults"], means["neutral"]),
        means={name: float(means[name].mean()) for name in ANSWERS_2X2},
        harm=harm,
        register=register,
        follows=follows(harm, register),
    )


def follows(harm: Estimate, register: Estimate) -> str:
    """`harm`, `register`, `both` or `neither`: which effects' intervals lie above zero."""
    return {
        (True, True): "both",
        (True, False): "harm",
        (False, True): "register",
        (False, False): "neither",
    }[harm.ci_low > 0, register.ci_low > 0]
