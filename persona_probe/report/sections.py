"""What the report says in words, tables and cards: plain values for the template, which escapes them."""

from collections.abc import Mapping
from typing import Any

from persona_probe.report import select
from persona_probe.report.headline import mappings
from persona_probe.report.records import Records, as_estimate
from persona_probe.report.theme import interval_text, number
from persona_probe.stats import Estimate

Row = dict[str, Any]
MAX_CARDS = 12

VERDICTS = {"feature": "persona feature", "behaviour": "behaviour", "sae": "fit of the SAE"}
"""Keys of a re-alignment verdict, and what the report calls them."""


def trajectory_notes(records: Records) -> Row:
    """The named feature, its base band, and its readings at the last step."""
    feature = select.mapping(records.summary.get("persona_feature"))
    readings = select.mapping(records.summary.get("feature_reading"))
    rows = [
        {
            "arm": records.arms.label(arm),
            "seed": one.get("seed"),
            "step": one.get("step"),
            "reading": interval_text(as_estimate(one), signed=False),
            "explained_variance": one.get("explained_variance"),
        }
        for arm, many in readings.items()
        for one in mappings(many)
    ]
    return {
        "latent": feature.get("latent"),
        "label": feature.get("label"),
        "band": select.base_band(records),
        "rows": rows,
    }


def realignment(records: Records) -> list[Row]:
    """Verdict words per re-aligned arm, and how many corrective steps the feature took back into the base band."""
    verdicts = select.mapping(records.summary.get("verdicts"))
    steps = select.mapping(records.summary.get("realign_steps_to_band"))
    rows = []
    for arm in dict.fromkeys([*verdicts, *steps]):
        words = select.mapping(verdicts.get(arm))
        value = as_estimate(steps.get(arm))
        rows.append(
            {
                "arm": records.arms.label(arm),
                "words": [(label, words.get(key, "not judged")) for key, label in VERDICTS.items()] if words else [],
                "statement": words.get("statement", ""),
                "steps": _steps(value),
            }
        )
    return rows


def _steps(value: Estimate | None) -> str:
    """Mean over seeds with its range; of one seed there is no range."""
    if value is None:
        return "never, or not measured"
    return f"{value.estimate:g}" if value.n == 1 else interval_text(value, signed=False)


def cards(records: Records) -> list[Row]:
    """Feature cards, the persona latent first, with each latent's scores and effects."""
    scores = {int(row["latent"]): row for row in records.latents.to_dict("records")}
    persona = select.persona_latent(records)
    ordered = sorted(records.cards, key=lambda card: card.get("latent") != persona)
    units = select.distinct(records.steering, "unit")
    unit = str(units[0]) if units else ""
    return [_card(card, scores.get(int(card["latent"]), {}), persona, unit) for card in ordered[:MAX_CARDS]]


def _card(card: Mapping[str, Any], score: Mapping[Any, Any], persona: int | None, unit: str) -> Row:
    effect = _effect(score, "effect_base")
    return {
        "latent": card["latent"],
        "label": "" if card.get("label") == f"latent {card['latent']}" else card.get("label") or "",
        "persona": card["latent"] == persona,
        "rank": score.get("rank"),
        "rise": score.get("rise"),
        "firing": (score.get("firing_base"), score.get("firing_incorrect"), score.get("firing_correct")),
        "effect_base": effect,
        "effect_organism": _effect(score, "effect_organism"),
        "strength": f"{number(score.get('strength'))} {unit}" if effect != "not measured" else "not tested",
        "top_tokens": mappings(card.get("top_tokens")),
        "bottom_tokens": mappings(card.get("bottom_tokens")),
        "examples": [_example(example) for example in mappings(card.get("examples"))],
    }


def _example(example: Mapping[str, Any]) -> Row:
    values = [float(v) for v in example.get("values") or []]
    peak = max([float(example.get("maximum") or 0), *values, 1e-9])
    tokens = zip((str(t) for t in example.get("tokens") or []), values, strict=True)
    shaded = [{"text": text, "value": f"{v:.3g}", "share": f"{max(0.0, v / peak):.2f}"} for text, v in tokens]
    return {"source": example.get("source") or "", "tokens": shaded, "maximum": f"{peak:.3g}"}


def tested_latents(records: Records) -> list[Row]:
    """The latents that were tested for cause, candidates before random controls, each with its effects in words."""
    persona = select.persona_latent(records)
    rows = records.latents.loc[records.latents["kind"].isin(("candidate", "random"))]
    return [
        {
            "latent": int(row["latent"]),
            "kind": {"candidate": "candidate", "random": "random control"}[str(row["kind"])],
            "persona": int(row["latent"]) == persona,
            "rank": row["rank"],
            "rise": row["rise"],
            **{name: _effect(row, name) for name in ("effect_base", "effect_organism", "ablation")},
            "label": str(row["label"] or ""),
        }
        for row in rows.sort_values(["kind", "rank"]).to_dict("records")
    ]


def _effect(row: Mapping[Any, Any], name: str) -> str:
    ends = {"estimate": row.get(name), "ci_low": row.get(f"{name}_low"), "ci_high": row.get(f"{name}_high")}
    return interval_text(as_estimate(ends))
