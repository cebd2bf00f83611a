"""How good labels of latents are: by rule and from the unembedding, on the demo's cards and on latents drawn at random.

    python -m benchmarks.labels --latents 40

One pass of the base model over the packaged text. Prints the scores by author, and the labels that pass.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import persona_probe as pp
from persona_probe.cli.options import echo
from persona_probe.files import read_json
from persona_probe.latents.cards import TOP_TOKENS, end_tokens, logit_effect
from persona_probe.latents.labels import label_by_rule, label_by_tokens
from persona_probe.latents.passages import gather, survey_model
from persona_probe.report.cards import LEAST_SCORE, NO_LABEL, Explanation
from persona_probe.report.tables import Table
from persona_probe.saes.hooks import PlacedSae
from persona_probe.stats import Estimate, bootstrap_mean

MODEL, SAE = "smollm2-135m-instruct", "saes/smollm2-135m-instruct/layer20-topk32-4608"
CARDS = Path("records/demo/cards.json")
HEADS = ("label", "latents", "scored", "passes", "detection, mean", "from to", "fuzzing, mean", "from to ")


def measured(latents: int, seed: int = 0) -> tuple[list[int], dict[str, list[Explanation]]]:
    """Labels of the demo's carded latents and of some drawn at random, by author."""
    model, tokenizer = pp.load_model(MODEL)
    sae = pp.load_sae(SAE)
    carded = [int(card["latent"]) for card in read_json(CARDS, list)]
    drawn = np.random.default_rng(seed).permutation(sae.cfg.d_sae).tolist()
    chosen = [*carded, *[one for one in drawn if one not in carded][:latents]]
    reading = survey_model(model, sae, PlacedSae.of(sae).reads, chosen, gather(tokenizer), bf16=True)
    found: dict[str, list[Explanation]] = {"rule": [], "unembedding": []}
    for column, latent in enumerate(chosen):
        windows = reading.windows.of(column)
        top = end_tokens(tokenizer, logit_effect(model, sae.W_dec[latent]), TOP_TOKENS, largest=True)
        found["rule"].append(label_by_rule(windows, tokenizer))
        found["unembedding"].append(label_by_tokens(windows, tokenizer, [token.id for token in top]))
    return chosen, found


def summary(found: dict[str, list[Explanation]]) -> Table:
    """One row an author: how many pass, and both scores over latents."""
    rows = []
    for author, labels in found.items():
        scored = [one for one in labels if one.detection is not None]
        passed = sum(one.label != NO_LABEL for one in scored)
        scores = [_cells([getattr(one, name) for one in scored]) for name in ("detection", "fuzzing")]
        rows.append([author, str(len(labels)), str(len(scored)), str(passed), *scores[0], *scores[1]])
    return Table(HEADS, rows)


def _cells(scores: Sequence[Estimate]) -> tuple[str, str]:
    values = [score.estimate for score in scores]
    mean = bootstrap_mean(values)
    return (
        f"{mean.estimate:.2f} [{mean.ci_low:.2f}, {mean.ci_high:.2f}]",
        f"{min(values):.2f} to {max(values):.2f}",
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=40, help="drawn at random, besides the demo's carded ones")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chosen, found = measured(given.latents, given.seed)
    lines = [summary(found).markdown(), "", f"labels with both scores of at least {LEAST_SCORE:g}:"]
    for latent, one in zip(chosen, found["rule"], strict=True):
        if one.label != NO_LABEL:
            lines.append(f"- latent {latent}: {one.label} ({one.scores_words})")
    echo("\n".join(lines))


if __name__ == "__main__":
    main()
