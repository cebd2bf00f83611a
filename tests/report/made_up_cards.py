"""Three made-up feature cards with known numbers: the persona latent, one with a hostile name, a silent one."""

from dataclasses import replace

from persona_probe.report.cards import (
    Activity,
    Effect,
    Example,
    FeatureCard,
    Findings,
    Neighbour,
    Push,
    Score,
    TokenLogit,
)
from tests.report.run_records import HOSTILE

PUSHES = tuple(
    Push(model, strength, "x_delta", 0.1 * strength - 0.5, 0.1 * strength - 0.6, 0.1 * strength - 0.4, 0.1 * strength,
         1.0 + abs(strength) / 4, abs(strength) < 2)
    for model in ("base", "incorrect")
    for strength in (-2.0, -1.0, 1.0, 2.0)
)  # fmt: skip
ACTIVITY = (
    Activity("base", 1000, 0.11, 3.9, 1.0, (100, 9, 0, 1, *[0] * 28)),
    Activity("incorrect", 1000, 0.2, 5.5, 1.0, (150, 40, 5, 4, 0, 1, *[0] * 26)),
)


def made_card(latent: int, name: str, rise_rank: int, cosine_rank: int, token: str) -> FeatureCard:
    scores = (Score("rise", 1 / rise_rank, rise_rank, 0.0, 2.0), Score("cosine", 0.2, cosine_rank))
    effects = (Effect("base", 0.1 * latent, 0.05, 1.5), Effect("organism", None, None, None))
    found = Findings(latent == 3, "candidate", scores, None, 0.01, {"base": 0.1}, effects, 1.0, "x_delta", PUSHES)
    words = (" you", f" {token}", "\n", HOSTILE)
    return FeatureCard(
        latent=latent,
        label=f"latent {latent}",
        name=name,
        suggested=False,
        findings=found,
        top_tokens=tuple(TokenLogit(word, i, 1.0 - i) for i, word in enumerate((HOSTILE, f" {token}"))),
        bottom_tokens=(TokenLogit(f" un{token}", 9, -1.0),),
        examples=(Example("notes.txt", words, (0.0, 2.5, -0.1, 1.0), 2.5, 1, cut_before=True),),
        activity=ACTIVITY,
        neighbours=(Neighbour(21, 0.9), Neighbour(50, 0.1)),
        n_latents=64,
        sae="saes/made-up",
        text=f"packaged text and {HOSTILE}.txt",
    )


CARDS = [
    made_card(3, "scorn for cooks", 2, 3, "soup"),
    made_card(21, f"greed {HOSTILE}", 3, 1, "gold"),
    replace(made_card(8, "silence", 1, 2, "hush"), examples=(), activity=(replace(ACTIVITY[0], counts=()),)),
]
