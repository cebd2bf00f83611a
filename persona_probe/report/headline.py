"""The top of the report: the verdict in four answers, the checks behind it, and the key numbers."""

from collections.abc import Mapping
from typing import Any

from persona_probe.report import select
from persona_probe.report.records import Records, as_estimate
from persona_probe.report.theme import interval_text, number
from persona_probe.stats import Estimate

Row = dict[str, Any]
UNKNOWN = {"says": "not measured", "state": "open"}


def headline(records: Records) -> Row:
    """The result in words and the checks behind it, failed ones first."""
    checks = [
        {"name": str(c.get("name", "")), "passed": c.get("passed") is True, "statement": str(c.get("statement", ""))}
        for c in mappings(records.summary.get("checks"))
    ]
    failed = sum(not c["passed"] for c in checks)
    words = str(records.summary.get("headline") or "")
    return {"words": words, "checks": sorted(checks, key=lambda c: c["passed"]), "failed": failed}


def tiles(records: Records) -> list[Row]:
    """Four questions of the loop, each with its answer, `yes`, `no` or `open`, and the number behind it."""
    summary = records.summary
    passed = {str(c.get("name")): c.get("passed") is True for c in mappings(summary.get("checks"))}
    latent = select.persona_latent(records)
    named = "no latent named" if latent is None else f"latent {latent}"
    effect, push = (as_estimate(summary.get(k)) for k in ("effect_incorrect_minus_correct", "steer_base_up"))
    return [
        {
            "asks": "Did it wake?",
            "shows": f"incorrect minus correct {interval_text(effect)} nats/token",
            **_answer(passed, ("behaviour",), "Woken", "No effect beyond the control"),
        },
        {
            "asks": "Which latent carries it?",
            "shows": f"{named}; causal effect {interval_text(push)}",
            **_answer(passed, ("induce", "repair"), "Shown to cause it", "Not shown to cause it"),
        },
        {
            "asks": "When did it rise?",
            "shows": _rise(records),
            **_answer(passed, ("rise", "control"), "Rose in the incorrect arm only", "Not in the incorrect arm alone"),
        },
        _undone(summary),
    ]


def _answer(passed: Mapping[str, bool], names: tuple[str, ...], yes: str, no: str) -> Row:
    if any(name not in passed for name in names):
        return UNKNOWN
    return {"says": yes, "state": "yes"} if all(passed[name] for name in names) else {"says": no, "state": "no"}


def _rise(records: Records) -> str:
    """The first step at which the persona feature of the incorrect arm is above the base band."""
    band = select.base_band(records)
    curve = mappings(select.mapping(records.summary.get("feature_reading")).get("incorrect"))
    if band is None or not curve:
        return "feature not read"
    above = [int(one["step"]) for one in curve if float(one["estimate"]) > band[1]]
    return f"above its base band from step {min(above)}" if above else "never above its base band"


def _undone(summary: Mapping[str, Any]) -> Row:
    verdicts = [select.mapping(v) for v in select.mapping(summary.get("verdicts")).values()]
    asks = {"asks": "Did correction undo it?"}
    if not verdicts:
        return {**asks, **UNKNOWN, "shows": "no corrective arm"}
    back = sum(v.get("feature") == "subsided" and v.get("behaviour") == "restored" for v in verdicts)
    words = "Undone" if back == len(verdicts) else "Partly undone" if back else "Not undone"
    shows = f"feature and behaviour back in {back} of {len(verdicts)} corrective arms"
    return {**asks, "says": words, "state": "yes" if back == len(verdicts) else "no", "shows": shows}


def key_numbers(records: Records) -> list[Row]:
    """Name, value with interval, unit and n of the study's key numbers; those not measured are left out."""
    summary, arms = records.summary, records.arms
    index = select.mapping(summary.get("contrast_index"))
    rows = [_estimate_row(f"contrast index, {arms.label(a)}", index.get(a), "nats/token") for a in arms.names]
    for key, label in EFFECTS.items():
        rows.append(_estimate_row(label, summary.get(key), "nats/token"))
    rows += _seed_rows(summary)
    for key, label, unit in PER_ARM:
        values = select.mapping(summary.get(key))
        rows += [_estimate_row(f"{label}, {arms.label(arm)}", value, unit) for arm, value in values.items()]
    return [row for row in rows if row is not None] + _costs(summary)


EFFECTS = {
    "effect_incorrect_minus_correct": "effect: incorrect minus correct",
    "steer_base_up": "persona latent steered up in the base model",
    "steer_organism_down": "persona latent steered down in the organism",
    "ablate_organism": "persona latent projected out of the organism",
    "random_latent_p95": "random latents, 95th percentile of effect",
    "random_latent_p95_organism": "random latents on the organism, 95th percentile",
    "random_latent_p95_ablation": "random latents projected out, 95th percentile",
}
"""Effects of the summary, in nats per token, and what the report calls them."""
PER_ARM = (
    ("explained_variance", "explained variance of the SAE", "share"),
    ("answer_tokens", "length of training answers", "tokens"),
)


def _estimate_row(name: str, raw: object, unit: str) -> Row | None:
    value = as_estimate(raw)
    if value is None:
        return None
    return {"name": name, "value": estimate_text(value, unit), "unit": unit, "n": value.n or ""}


def estimate_text(value: Estimate | None, unit: str) -> str:
    """A number with its interval; shares and lengths have their range over seeds, and one seed has none."""
    if value is not None and unit != "nats/token" and value.n == 1:
        return number(value.estimate)
    return interval_text(value, signed=unit == "nats/token")


def _seed_rows(summary: Mapping[str, Any]) -> list[Row | None]:
    """The effects seed by seed, where there are several."""
    effects = {name: mappings(rows) for name, rows in select.mapping(summary.get("by_seed")).items()}
    return [
        _estimate_row(f"{name}, seed {row.get('seed')}", row, "nats/token")
        for name, rows in effects.items()
        for row in (rows if len(rows) > 1 else ())
    ]


def _costs(summary: Mapping[str, Any]) -> list[Row]:
    seconds = select.mapping(summary.get("seconds"))
    rows = [{"name": f"time, {stage}", "value": f"{s:,.0f}", "unit": "s", "n": ""} for stage, s in seconds.items()]
    if (memory := summary.get("peak_memory_gib")) is not None:
        rows.append({"name": "peak memory", "value": f"{memory:.3g}", "unit": "GiB", "n": ""})
    return rows


def mappings(value: object) -> list[Mapping[str, Any]]:
    """The dictionaries of a list; nothing where it is no list."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
