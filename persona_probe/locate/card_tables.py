"""What the study's tables and the SAE say of one latent: scores, effects, steering curve, neighbours, links, names."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.locate.feature_card import Effect, Example, Findings, Neighbour, Push, Score, TokenLogit

NEURONPEDIA = "https://neuronpedia.org"
NAME_WORDS = 4
Row = Mapping[Any, Any]


def optional(value: Any) -> float | None:
    """A number as float; None for what is missing or not finite."""
    return None if value is None or not math.isfinite(value) else float(value)


def rankers(columns: Sequence[str]) -> dict[str, str]:
    """Every ranker of a latents table with the column of its rank: all pairs `x`, `x_rank`.

    `rank` alone is that of `rise`.
    """
    found = {name.removesuffix("_rank"): name for name in columns if name.endswith("_rank")}
    if "rank" in columns:
        found = {"rise": "rank", **found}
    return {name: rank for name, rank in found.items() if name in columns}


def findings(row: Row, steering: pd.DataFrame, arms: Sequence[str], unit: str) -> Findings:
    """What a row of the latents table and the steering table say of that latent."""
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
    found = []
    for name, rank in rankers([str(key) for key in row]).items():
        place = optional(row[rank])
        ends = [optional(row.get(f"{name}_ci_{end}", row.get(f"{name}_{end}"))) for end in ("low", "high")]
        found.append(Score(name, optional(row[name]), None if place is None else int(place), *ends))
    return tuple(found)


def effects(row: Row) -> tuple[Effect, ...]:
    """Every causal effect of one row of the latents table: columns `effect_x`, with `_low` and `_high` if there."""
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
    """The latents whose decoder rows have the highest cosine with this one's; itself is left out."""
    sizes = decoder.norm(dim=1).float()
    cosine = (decoder @ decoder[latent]).float() / (sizes * sizes[latent]).clamp_min(1e-12)
    cosine[latent] = -math.inf
    values, index = cosine.topk(min(count, len(cosine) - 1))
    return tuple(Neighbour(i, round(v, 4)) for i, v in zip(index.tolist(), values.tolist(), strict=True))


def neuronpedia_link(sae: Any, latent: int) -> str | None:
    """The latent's page on Neuronpedia, where the SAE's metadata names one (`model/source`)."""
    name = sae.cfg.metadata.neuronpedia_id
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)+", name, re.ASCII):
        return None
    return f"{NEURONPEDIA}/{name}/{latent}"


def suggest_name(top_tokens: Sequence[TokenLogit], examples: Sequence[Example]) -> str:
    """A name made of what can be seen, which says so: it is a reading aid, not a finding."""
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
