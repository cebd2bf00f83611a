"""Feature cards: what a latent scores, causes, writes and fires on; one pass over the text for all of them."""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.context import Context
from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError
from persona_probe.latents.labels import label_by_rule
from persona_probe.latents.passages import Survey, example, gather, read_text, survey, survey_model
from persona_probe.latents.voices import read_voices
from persona_probe.models.layers import hidden_size, output_head
from persona_probe.models.load import tokenizer_of
from persona_probe.models.logits import final_norm
from persona_probe.report.cards import Effect, Example, FeatureCard, Findings, Neighbour, Push, Score, TokenLogit
from persona_probe.saes.hooks import PlacedSae
from persona_probe.saes.load import check_placed
from persona_probe.saes.read import check_latents
from persona_probe.units import Unit, make_units, writes_run

NEURONPEDIA = "https://neuronpedia.org"
NAME_WORDS = 4
Row = Mapping[Any, Any]


def optional(value: Any) -> float | None:
    """A number as float; None if it is missing or not finite."""
    return None if value is None or not math.isfinite(value) else float(value)


def rankers(columns: Sequence[str]) -> dict[str, str]:
    """Every ranker of a latents table with the column of its rank: all pairs `x`, `x_rank`.

    The column `rank` is the rank of `rise`.
    """
    ranks = {name.removesuffix("_rank"): name for name in columns if name.endswith("_rank")}
    if "rank" in columns:
        ranks = {"rise": "rank", **ranks}
    return {name: rank for name, rank in ranks.items() if name in columns}


def findings(row: Row, steering: pd.DataFrame, arms: Sequence[str], unit: str) -> Findings:
    """A latent's findings, from its row of the latents table and from the steering table."""
    rates = {arm: optional(row.get(f"firing_{arm}")) for arm in arms}
    return Findings(
        persona=bool(row["persona"]),
        kind=str(row["kind"]),
        scores=scores(row),
        suppressed=bool(row["suppressed"]) if "suppressed" in row else None,
        q_value=optional(row.get("q_value")),
        firing={arm: rate for arm, rate in rates.items() if rate is not None},
        effects=effects(row),
        strength=optional(row["strength"]),
        unit=unit,
        steering=pushes(steering, int(row["latent"])),
    )


def scores(row: Row) -> tuple[Score, ...]:
    """Every ranker's score and rank of one row of the latents table."""
    table = []
    for name, rank in rankers([str(key) for key in row]).items():
        place = optional(row[rank])
        ends = [optional(row.get(f"{name}_ci_{end}", row.get(f"{name}_{end}"))) for end in ("low", "high")]
        table.append(Score(name, optional(row[name]), None if place is None else int(place), *ends))
    return tuple(table)


def effects(row: Row) -> tuple[Effect, ...]:
    """Every causal effect of one row of the latents table: columns `effect_x`, with `_low` and `_high` if present."""
    ranks = set(rankers([str(key) for key in row]))
    names = [str(k) for k in row if str(k).startswith("effect_") and not str(k).endswith(("_low", "_high", "_rank"))]
    return tuple(
        Effect(name.removeprefix("effect_"), *(optional(row.get(name + end)) for end in ("", "_low", "_high")))
        for name in names
        if name not in ranks
    )


def pushes(steering: pd.DataFrame, latent: int) -> tuple[Push, ...]:
    """The steering curve of one latent: rows of the steering table by model and strength."""
    rows = steering.loc[steering["latent"] == latent].sort_values(["model", "strength"])
    return tuple(
        Push(
            model=str(row["model"]),
            strength=float(row["strength"]),
            unit=str(row["unit"]),
            estimate=float(row["estimate"]),
            ci_low=optional(row["ci_low"]),
            ci_high=optional(row["ci_high"]),
            delta=float(row["delta"]),
            perplexity_ratio=optional(row["perplexity_ratio"]),
            within_bound=bool(row["within_bound"]),
        )
        for row in rows.to_dict("records")
    )


@torch.no_grad()
def neighbours(decoder: Float[Tensor, "d_sae d_model"], latent: int, count: int = 5) -> tuple[Neighbour, ...]:
    """The other latents whose decoder rows have the highest cosine with this one's."""
    sizes = decoder.norm(dim=1).float()
    cosine = (decoder @ decoder[latent]).float() / (sizes * sizes[latent]).clamp_min(1e-12)
    cosine[latent] = -math.inf
    values, index = cosine.topk(min(count, len(cosine) - 1))
    return tuple(Neighbour(i, round(v, 4)) for i, v in zip(index.tolist(), values.tolist(), strict=True))


def neuronpedia_link(sae: Any, latent: int) -> str | None:
    """The latent's page on Neuronpedia, if the SAE's metadata names one (`model/source`)."""
    name = sae.cfg.metadata.neuronpedia_id
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)+", name, re.ASCII):
        return None
    return f"{NEURONPEDIA}/{name}/{latent}"


def suggest_name(top_tokens: Sequence[TokenLogit], examples: Sequence[Example]) -> str:
    """A name made of top tokens and passages, and marked as such: it is a reading aid, not a finding."""
    promoted = _words(t.token for t in top_tokens)
    fired = _words(e.tokens[e.peak] for e in examples)
    where = [f"where it fires most: {', '.join(fired)}"] if fired else []
    made_of = [f"its top tokens: {', '.join(promoted)}"] if promoted else []
    if not made_of + where:
        return "no name: neither its top tokens nor its passages hold words"
    return "suggested from " + "; and from ".join(made_of + where)


def _words(tokens: Iterable[str]) -> list[str]:
    words = (token.strip() for token in tokens)
    return list(dict.fromkeys(w for w in words if any(c.isalpha() for c in w)))[:NAME_WORDS]


# --- The direct effect of a direction on the logits, and the tokens that it promotes and suppresses

log = logging.getLogger(__name__)


@torch.no_grad()
def logit_effect(model: nn.Module, direction: Float[Tensor, " d_model"]) -> Float[Tensor, " vocab"]:
    """Direct effect of a direction on the logits: through the final norm's scale and the unembedding.

    It leaves out the norm's division by the residual's size, which is the same for all tokens, and a cap on the logits,
    which keeps their order. So the values compare tokens; they are not the logits of a forward pass.
    """
    weight = output_head(model).get_parameter("weight").float()
    vector = direction.detach().to(weight.device).float()
    norm = _known_norm(model)
    if isinstance(norm, nn.LayerNorm):
        vector = vector - vector.mean()
    return weight @ (vector if norm is None else vector * norm_scale(norm, vector))


def _known_norm(model: nn.Module) -> nn.Module | None:
    try:
        return final_norm(model)
    except InputError as error:
        log.warning("logit effects leave out what follows the last layer: %s", error)
        return None


def norm_scale(norm: nn.Module, like: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """The factor of each coordinate in a norm. The norm itself computes it, because Gemma's stores weight - 1."""
    if isinstance(norm, nn.LayerNorm):
        return torch.ones_like(like) if norm.weight is None else norm.weight.float()
    return norm(torch.ones_like(like)).float()


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, logits: Float[Tensor, " vocab"], count: int, largest: bool
) -> tuple[TokenLogit, ...]:
    """The `count` tokens that a direction promotes most (or suppresses most), the strongest first."""
    values, ids = logits.topk(min(count, len(logits)), largest=largest)
    return tuple(
        TokenLogit(str(tokenizer.decode([i])), i, round(v, 4))
        for v, i in zip(values.tolist(), ids.tolist(), strict=True)
    )


# --- The cards of a study

TOP_TOKENS = 8


@writes_run
def make_cards(ctx: Context) -> None:
    """Write cards.json: the persona latent and the strongest other candidates, on the packaged text and the base."""
    make_units(ctx, cards_units)


def cards_units(ctx: Context) -> list[Unit]:
    """One unit: all cards."""
    return [Unit("cards.json", partial(_write_cards, ctx), "cards")]


def _write_cards(ctx: Context) -> None:
    cards = build_cards(ctx, tested_latents(ctx)[: ctx.config.locate.cards], organism=False)
    ctx.run.write_json("cards.json", [asdict(card) for card in cards])


def card(ctx: Context, latent: int, name: str | None = None, text: str | Path | None = None) -> FeatureCard:
    """The card of one latent, base model against organism.

    Args:
        latent: its index in the study's SAE.
        name: what you call it; None suggests a name.
        text: a file of conversations or plain text, read in addition to the packaged text.

    Raises:
        InputError: no such latent, a text that cannot be read, or locate has not run.
    """
    return build_cards(ctx, [latent], {} if name is None else {latent: name}, text)[0]


def write_cards_page(
    ctx: Context, count: int, text: str | Path | None = None, names: Mapping[int, str] | None = None
) -> Path:
    """Write cards.html into the run folder: one page with search over the first `count` latents.

    Latents that were tested for cause come first, by their effect on the selection split; then the best by rank.

    Returns:
        The page's path. The page is self-contained: it loads nothing and sends nothing.

    Raises:
        InputError: `count` below 1, a text that cannot be read, or locate has not run.
    """
    from persona_probe.report.cards import cards_page
    from persona_probe.writing import write_text

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
    """Cards of several latents, with one pass over the text for each model.

    Args:
        organism: also read the organism that realign starts from, for its histogram.

    Raises:
        InputError: no such latent, a text that cannot be read, or locate has not run.
    """
    table = ctx.run.read_table("latents.parquet").set_index("latent", drop=False)
    steering = ctx.run.read_table("steering.parquet")
    numbers = check_latents(ctx.sae, list(latents))
    card_text = gather(ctx.tokenizer, text)
    reading, voices = survey(ctx, numbers, card_text, organism), read_voices(ctx, numbers)
    cards, source = [], SaeText(ctx.sae, ctx.config.sae, card_text.name)
    for column, latent in enumerate(numbers):
        row = table.loc[latent].to_dict()
        known = findings(row, steering, ("base", *ctx.config.arms), ctx.config.locate.unit)
        name = (names or {}).get(latent)
        made = _card(ctx.model, ctx.tokenizer, source, latent, str(row["label"]), name, known, reading, column)
        cards.append(replace(made, voices=voices[column]))
    return cards


def latent_card(
    model: nn.Module,
    sae: Any,
    latent: int,
    *,
    texts: Sequence[str | Conversation] | str | Path | None = None,
    name: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    layer: int | None = None,
    bf16: bool = False,
) -> FeatureCard:
    """The card of any latent of any SAE, without a study: what it writes and what it fires on; a notebook shows it.

    ```python
    pp.latent_card(model, sae, 2144)
    ```

    Args:
        model: a transformers or PEFT model.
        sae: a `sae_lens.SAE` of any place in a layer, or a transcoder.
        latent: its index.
        texts: questions or conversations, or a file of them or of plain text; None reads the packaged text (some
            hundred conversations, the bad ones too).
        name: what you call it; None suggests a name.
        tokenizer: None takes the one that `load_model` gave with the model.
        layer: of an SAE whose metadata does not say it.
        bf16: bf16 autocast.

    Raises:
        InputError: no such latent, a text that cannot be read, or an SAE that does not fit the model.
    """
    tokenizer = tokenizer_of(model, tokenizer)
    placed = PlacedSae.of(sae, layer)
    check_placed(placed, model)
    check_latents(sae, [latent])
    if sae.W_dec.shape[1] != hidden_size(model):
        raise InputError(f"this SAE writes {placed.writes}, not the residual stream: it has no tokens to show")
    given = read_text(texts) if isinstance(texts, (str, Path)) else texts
    text = gather(tokenizer, conversations=given)
    reading = survey_model(model, sae, placed.reads, [latent], text, bf16)
    known = Findings(False, "other", (), None, None, {}, (), None, "raw", ())
    source = SaeText(sae, sae.cfg.metadata.get("sae_id") or placed.name, text.name)
    return _card(model, tokenizer, source, latent, f"latent {latent}", name, known, reading, 0)


@dataclass(frozen=True)
class SaeText:
    """An SAE with its name, and the text that its latents are read on, in words."""

    sae: Any
    name: str
    text: str


def _card(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    source: SaeText,
    latent: int,
    label: str,
    name: str | None,
    known: Findings,
    reading: Survey,
    column: int,
) -> FeatureCard:
    sae = source.sae
    logits = logit_effect(model, sae.W_dec[latent])
    top = end_tokens(tokenizer, logits, TOP_TOKENS, largest=True)
    examples = tuple(example(tokenizer, passage) for passage in reading.passages.best(column))
    return FeatureCard(
        latent=latent,
        label=label,
        name=name or suggest_name(top, examples),
        suggested=not name,
        findings=known,
        top_tokens=top,
        bottom_tokens=end_tokens(tokenizer, logits, TOP_TOKENS, largest=False),
        examples=examples,
        activity=reading.activity(column),
        neighbours=neighbours(sae.W_dec, latent),
        n_latents=sae.cfg.d_sae,
        sae=source.name,
        text=source.text,
        silent_on=tuple(reading.passages.silent_origins(column)),
        neuronpedia=neuronpedia_link(sae, latent),
        explanations=(label_by_rule(reading.windows.of(column), tokenizer),),
    )
