"""Feature cards: what a latent scores, causes, writes and fires on; one pass over the text for all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from persona_probe.context import Context
from persona_probe.errors import InputError
from persona_probe.locate import card_tables
from persona_probe.locate.card_text import gather
from persona_probe.locate.feature_card import FeatureCard, Findings
from persona_probe.locate.logits import end_tokens, logit_effect
from persona_probe.locate.passages import example
from persona_probe.locate.survey import Survey, survey
from persona_probe.saes.encode import check_latents

TOP_TOKENS = 8


def make_cards(ctx: Context) -> None:
    """Write cards.json: the persona latent and the strongest other candidates, on the packaged text and the base."""
    if ctx.run.has("cards.json"):
        return
    with ctx.timed("cards"):
        cards = build_cards(ctx, tested_latents(ctx)[: ctx.config.locate.cards], organism=False)
    ctx.run.write_json("cards.json", [asdict(card) for card in cards])


def card(ctx: Context, latent: int, name: str | None = None, text: str | Path | None = None) -> FeatureCard:
    """The card of one latent, base model against organism.

    Args:
        latent: its index in the study's SAE.
        name: what you call it; None suggests a name.
        text: a file of conversations or plain text, read beside the packaged text.

    Raises:
        InputError: no such latent, a text that cannot be read, or locate has not run.
    """
    return build_cards(ctx, [latent], {} if name is None else {latent: name}, text)[0]


def write_cards_page(
    ctx: Context, count: int, text: str | Path | None = None, names: Mapping[int, str] | None = None
) -> Path:
    """Write cards.html into the run folder: one page with search over the first `count` latents.

    Those tested for cause come first, the strongest effect on the selection split leading; then the best by rank.

    Returns:
        The page's path. It is self-contained: it loads nothing and sends nothing.

    Raises:
        InputError: `count` below 1, a text that cannot be read, or locate has not run.
    """
    from persona_probe.report.cards_page import cards_page
    from persona_probe.report.page import write_text

    if count < 1:
        raise InputError(f"cannot write {count} cards: ask for at least 1")
    ranked = [int(i) for i in ctx.run.read_table("latents.parquet").sort_values("rank")["latent"]]
    latents = list(dict.fromkeys([*tested_latents(ctx), *ranked]))[:count]
    cards = build_cards(ctx, latents, names or {}, text)
    return write_text(ctx.run.path / "cards.html", cards_page(cards, ctx.config.name, ctx.config.model))


def tested_latents(ctx: Context) -> list[int]:
    """The candidates of the selection split, the largest causal effect first."""
    effects = ctx.run.read_table("parts/selection.parquet").sort_values("effect", ascending=False)
    return [int(i) for i in effects["latent"]]


def build_cards(
    ctx: Context,
    latents: Sequence[int],
    names: Mapping[int, str] | None = None,
    text: str | Path | None = None,
    organism: bool = True,
) -> list[FeatureCard]:
    """Cards of several latents in one pass over the text for each model.

    Args:
        organism: also read the organism that realign starts from, for its histogram.

    Raises:
        InputError: no such latent, a text that cannot be read, or locate has not run.
    """
    table = ctx.run.read_table("latents.parquet").set_index("latent", drop=False)
    steering = ctx.run.read_table("steering.parquet")
    chosen = check_latents(ctx.sae, list(latents))
    read = gather(ctx.tokenizer, text)
    seen = survey(ctx, chosen, read, organism)
    cards = []
    for column, latent in enumerate(chosen):
        row = table.loc[latent].to_dict()
        found = card_tables.findings(row, steering, ("base", *ctx.config.arms), ctx.config.locate.unit)
        cards.append(_card(ctx, latent, str(row["label"]), (names or {}).get(latent), found, seen, column, read.name))
    return cards


def _card(
    ctx: Context, latent: int, label: str, name: str | None, found: Findings, seen: Survey, column: int, text: str
) -> FeatureCard:
    logits = logit_effect(ctx.model, ctx.sae.W_dec[latent])
    top = end_tokens(ctx.tokenizer, logits, TOP_TOKENS, largest=True)
    examples = tuple(example(ctx.tokenizer, passage) for passage in seen.passages.best(column))
    return FeatureCard(
        latent=latent,
        label=label,
        name=name or card_tables.suggest_name(top, examples),
        suggested=not name,
        findings=found,
        top_tokens=top,
        bottom_tokens=end_tokens(ctx.tokenizer, logits, TOP_TOKENS, largest=False),
        examples=examples,
        activity=seen.activity(column),
        neighbours=card_tables.neighbours(ctx.sae.W_dec, latent),
        n_latents=ctx.sae.cfg.d_sae,
        sae=ctx.config.sae,
        text=text,
        silent_on=tuple(seen.passages.silent_origins(column)),
        neuronpedia=card_tables.neuronpedia_link(ctx.sae, latent),
    )
