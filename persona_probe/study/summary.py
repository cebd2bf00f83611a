"""summary.json: the study's key numbers with intervals, its checks, and verdicts in words."""

import json
import resource
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.config import NO_CONTROL
from persona_probe.context import Context
from persona_probe.evaluate.agreement import agreements
from persona_probe.evaluate.effects import arm_effect, effects_by_seed, final_index
from persona_probe.evaluate.rates import difference, rates
from persona_probe.evaluate.tables import judged_rows
from persona_probe.latents.stage import persona_latent
from persona_probe.monitor.band import Band
from persona_probe.realignment.outcome import steps_to_band
from persona_probe.realignment.verdict import CAUTION, behaviour_word, feature_word, sae_word
from persona_probe.runs import RunFolder
from persona_probe.saes.load import QUALITY_FILE, find_folder
from persona_probe.stats import Estimate, bootstrap_statistic


def summarise(ctx: Context) -> dict[str, Any]:
    """Compute and write summary.json from the run folder's tables."""
    run, config = ctx.run, ctx.config
    latents, steering = run.read_table("latents.parquet"), run.read_table("steering.parquet")
    readings, whole = run.read_table("readings.parquet"), run.read_table("evals.parquet")
    evals = whole[whole["split"] == "evaluation"]
    arms = ["base", *config.arms, *[a for a in config.realign.arms if a in set(evals["arm"])]]
    band = _band(readings, config.monitor.band_sd)
    summary: dict[str, Any] = {
        "study": config.name,
        "base_model": config.model,
        "seeds": list(config.seeds),
        "contrast_index": {arm: final_index(evals, arm).to_dict() for arm in arms},
        **_main_effect(evals, config.control),
        "data_known": all(arm.data for arm in config.arms.values()),
        "by_seed": _by_seed(evals, [a for a in config.realign.arms if a in arms]),
        "persona_feature": _persona(ctx, latents),
        **_causal_numbers(latents, steering, config.realign.start),
        "feature_reading": {arm: _curve(readings, arm) for arm in arms},
        "base_band": {"low": band.low, "high": band.high, "feature": "persona"},
        "realign_steps_to_band": {a: _steps(readings, a, band) for a in config.realign.arms if a in arms},
        "explained_variance": {arm: _explained(readings, arm) for arm in arms},
        "answer_tokens": {arm: _answer_tokens(run, arm, config.seeds) for arm in arms if arm != "base"},
        "sae_quality": _quality(config.sae),
        **_judged_numbers(whole, run.manifest.get("evaluations", {}), list(config.realign.arms)),
    }
    summary["verdicts"] = {a: verdict(summary, evals, a, band) for a in config.realign.arms if a in arms}
    summary["checks"] = checks(summary, readings, band)
    summary["headline"] = headline(summary)
    summary["seconds"] = run.manifest.get("seconds", {})
    summary["peak_memory_gib"] = _peak_memory(run)
    run.write_json("summary.json", summary)
    return summary


# --- The numbers of summary.json


def _main_effect(evals: pd.DataFrame, control: str) -> dict[str, Any]:
    """Incorrect minus correct; in a study without a control arm that is not measured, and the base stands in, named."""
    if control == "correct":
        return {"effect_incorrect_minus_correct": arm_effect(evals, "incorrect", "correct").to_dict()}
    return {
        "effect_incorrect_minus_correct": _estimate(np.nan, np.nan, np.nan, 0),
        "effect_incorrect_minus_base": arm_effect(evals, "incorrect", "base").to_dict(),
        "no_control": NO_CONTROL,
    }


def _by_seed(evals: pd.DataFrame, corrected: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The study's effects seed by seed: incorrect minus correct, and each corrected arm minus the base."""
    control = "correct" if "correct" in set(evals["arm"]) else "base"
    pairs = [("incorrect", control), *((arm, "base") for arm in corrected)]
    return {
        f"{left} minus {right}": [{"seed": s, **e.to_dict()} for s, e in effects_by_seed(evals, left, right).items()]
        for left, right in pairs
    }


def _persona(ctx: Context, latents: pd.DataFrame) -> dict[str, Any]:
    row = latents[latents["persona"]].iloc[0]
    rise = Estimate(row["rise"], row["rise_ci_low"], row["rise_ci_high"], len(ctx.selection.rows))
    return {
        "latent": persona_latent(ctx),
        "label": str(row["label"]),
        "rise": rise.to_dict(),
        "rise_rank": int(row["rank"]),
        "cosine": float(row["cosine"]),
        "effect_selection_split": float(row["effect_selection"]),
        "shrinkage": _number(row["shrinkage"]),
        "causal": bool(row["causal"]),
        "ranks": {name.removesuffix("_rank"): int(row[name]) for name in latents.columns if name.endswith("_rank")},
    }


def _causal_numbers(latents: pd.DataFrame, steering: pd.DataFrame, organism: str) -> dict[str, Any]:
    """Causal effects (odd parts, evaluation split) of persona, random latents and the mean difference."""
    row = latents[latents["persona"]].iloc[0]
    random = latents[latents["kind"] == "random"]
    numbers: dict[str, Any] = {"strength": _number(row["strength"])}
    tests = {"steer_base_up": "effect_base", "steer_organism_down": "effect_organism", "ablate_organism": "ablation"}
    for key, column in tests.items():
        n = int(steering["n_items"].iloc[0]) if "n_items" in steering else 0
        numbers[key] = _estimate(row[column], row[f"{column}_low"], row[f"{column}_high"], n)
    controls = {"": "effect_base", "_organism": "effect_organism", "_ablation": "ablation"}
    for key, column in ((f"random_latent_p95{suffix}", column) for suffix, column in controls.items()):
        sizes = random[column].dropna().abs().to_numpy()
        p95 = bootstrap_statistic(sizes, lambda x: float(np.quantile(x, 0.95))) if sizes.size else None
        numbers[key] = p95.to_dict() if p95 else _estimate(np.nan, np.nan, np.nan, 0)
    numbers["mean_difference_effect"] = {m: _odd(steering, m, "mean difference") for m in ("base", organism)}
    return numbers


def _odd(steering: pd.DataFrame, model: str, name: str) -> float | None:
    rows = steering[(steering["model"] == model) & (steering["name"] == name) & steering["within_bound"]]
    by_strength = rows.set_index("strength")["delta"]
    both = [s for s in by_strength.index if s > 0 and -s in by_strength.index]
    return None if not both else float((by_strength[max(both)] - by_strength[-max(both)]) / 2)


def _estimate(estimate: float, low: float, high: float, n: int) -> dict[str, Any]:
    return {"estimate": _number(estimate), "ci_low": _number(low), "ci_high": _number(high), "n": n}


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _band(readings: pd.DataFrame, width_sd: float) -> Band:
    row = readings[(readings["arm"] == "base") & (readings["feature"] == "persona")].iloc[0]
    return Band.of(float(row["base_mean"]), float(row["base_sd"]), width_sd)


def _curve(readings: pd.DataFrame, arm: str) -> list[dict[str, Any]]:
    rows = readings[(readings["arm"] == arm) & (readings["feature"] == "persona")].sort_values(["seed", "step"])
    return [
        {
            "seed": int(r["seed"]),
            "step": int(r["step"]),
            "estimate": float(r["mean"]),
            "ci_low": float(r["ci_low"]),
            "ci_high": float(r["ci_high"]),
            "explained_variance": float(r["explained_variance"]),
        }
        for _, r in rows.iterrows()
    ]


def _over_seeds(values: np.ndarray) -> dict[str, Any]:
    """Mean and range over seeds (an interval from a handful of seeds would pretend too much)."""
    if not values.size:
        return _estimate(np.nan, np.nan, np.nan, 0)
    return _estimate(values.mean(), values.min(), values.max(), int(values.size))


def _explained(readings: pd.DataFrame, arm: str) -> dict[str, Any]:
    return _over_seeds(_final_rows(readings, arm)["explained_variance"].to_numpy())


def _steps(readings: pd.DataFrame, arm: str, band: Band) -> dict[str, Any]:
    rows = readings[readings["arm"] == arm]
    steps = np.array([steps_to_band(rows[rows["seed"] == seed], band) for seed in sorted(set(rows["seed"]))])
    return _over_seeds(steps) if np.isfinite(steps).all() else _estimate(np.nan, np.nan, np.nan, int(steps.size))


def _answer_tokens(run: RunFolder, arm: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    tokens = [run.read_json(f"arms/{arm}-s{s}/training.json")["answer_tokens"] for s in seeds]
    return _over_seeds(np.array([count for count in tokens if count is not None], dtype=float))


def _quality(sae: str) -> dict[str, Any] | None:
    path = find_folder(sae) / QUALITY_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def _peak_memory(run: RunFolder) -> float:
    """Peak resident memory of any process that worked on this run, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    peak = max(now, run.manifest.get("peak_memory_gib", 0.0))
    run.update_manifest(peak_memory_gib=round(peak, 3))
    return round(peak, 3)


# --- The judged answers' part of summary.json: rates, effects between arms, agreement between judges


def _judged_numbers(evals: pd.DataFrame, evaluations: dict[str, Any], corrected: Sequence[str]) -> dict[str, Any]:
    """The judged answers' part of summary.json; empty if none were judged.

    Args:
        evals: evals.parquet as it is.
        evaluations: how each evaluation was made, from the manifest.
        corrected: the corrective arms.

    Returns:
        `judged`: by evaluation, how it was made, rates by arm, and the effects incorrect minus correct and each
        corrective arm minus the base; `judge_agreement`: every pair of judges on the same answers.
    """
    answers = judged_rows(evals)
    if answers.empty:
        return {}
    numbers = {
        name: _of_one(rows, evaluations.get(name, {}), corrected) for name, rows in _parts(answers, "evaluation")
    }
    return {"judged": numbers, "judge_agreement": [a.to_dict() for a in agreements(answers)]}


def _parts(frame: pd.DataFrame, column: str) -> list[tuple[str, pd.DataFrame]]:
    return [(str(name), rows) for name, rows in frame.groupby(column, sort=False)]


def _of_one(answers: pd.DataFrame, about: dict[str, Any], corrected: Sequence[str]) -> dict[str, Any]:
    table = rates(answers, ("variant", "arm"))
    pairs = [("incorrect", "correct"), *((arm, "base") for arm in corrected)]
    effects = [
        {"variant": variant, "name": f"{left} minus {right}", **difference(rows, left, right).to_dict()}
        for variant, rows in _parts(answers, "variant")
        for left, right in pairs
        if {left, right} <= set(rows["arm"])
    ]
    return {"about": about, "rates": _plain_rows(table), "effects": effects}


def _plain_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON values: NaN becomes None."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


# --- Verdicts in words, and the checks that a study must pass; a failed check is listed as failed


def _final_rows(readings: pd.DataFrame, arm: str) -> pd.DataFrame:
    """The persona feature's readings at each seed's last step."""
    rows = readings[(readings["arm"] == arm) & (readings["feature"] == "persona")]
    return rows[rows["step"] == rows.groupby("seed")["step"].transform("max")]


def verdict(summary: dict[str, Any], evals: pd.DataFrame, arm: str, band: Band) -> dict[str, str]:
    """Feature, behaviour and the SAE's fit, each judged separately, in words with numbers."""
    curve = summary["feature_reading"][arm]
    last = [max((r for r in curve if r["seed"] == s), key=lambda r: r["step"]) for s in {r["seed"] for r in curve}]
    readings, over_base = [r["estimate"] for r in last], arm_effect(evals, arm, "base")
    fit, base_fit = (summary["explained_variance"][name]["estimate"] for name in (arm, "base"))
    feature, behaviour, sae = feature_word(readings, band), behaviour_word(over_base), sae_word(base_fit, fit)
    statement = (
        f"{arm}: the persona feature {feature} ({np.mean(readings):.3f}, base band {band.low:.3f} to {band.high:.3f}); "
        f"behaviour {behaviour} (contrast index minus base {over_base} nats/token); the SAE is {sae} "
        f"(explained variance {fit:.2f}, base {base_fit:.2f}). {CAUTION}"
    )
    return {"feature": feature, "behaviour": behaviour, "sae": sae, "statement": statement}


def checks(summary: dict[str, Any], readings: pd.DataFrame, band: Band) -> list[dict[str, Any]]:
    """What the study must show; a failed check is listed as failed."""
    effect, control = summary["effect_incorrect_minus_correct"], _final_rows(readings, "correct")["mean"]
    without = " (not tested: there is no control arm)" if "no_control" in summary else ""
    up, p95 = summary["steer_base_up"], summary["random_latent_p95"]
    down, p95_down = summary["steer_organism_down"], summary["random_latent_p95_organism"]
    out, p95_out = summary["ablate_organism"], summary["random_latent_p95_ablation"]
    incorrect = _final_rows(readings, "incorrect")["mean"]
    return [
        _check(
            "behaviour",
            _above(effect["ci_low"], 0.0),
            f"incorrect minus correct, contrast index {_text(effect)} nats/token, excludes zero from above{without}",
        ),
        _check(
            "induce",
            _above(up["ci_low"], p95["estimate"]),
            f"causal effect of the persona latent on the base {_text(up)} lies above the random latents' 95th "
            f"percentile of absolute effects {_text(p95)}",
        ),
        _check(
            "repair",
            _above(down["ci_low"], p95_down["estimate"]) and _above(out["ci_low"], p95_out["estimate"]),
            f"on the organism the persona latent's causal effect {_text(down)} lies above the random latents' "
            f"{_text(p95_down)}, and projecting it out {_text(out)} above theirs {_text(p95_out)}",
        ),
        _check(
            "control",
            not without and all(band.holds(v) for v in control),
            f"the control arm's reading ({_list(control) or 'none'}) stays in the base band {band.low:.3f} to "
            f"{band.high:.3f}{without}",
        ),
        _check(
            "rise",
            all(v > band.high for v in incorrect),
            f"the incorrect arm's reading ({_list(incorrect)}) leaves the base band {band.low:.3f} to {band.high:.3f}",
        ),
    ]


def _check(name: str, passed: bool, statement: str) -> dict[str, Any]:
    return {"name": name, "passed": bool(passed), "statement": statement}


def _above(low: float | None, other: float | None) -> bool:
    return low is not None and other is not None and low > other


def _text(estimate: dict[str, Any]) -> str:
    if estimate["estimate"] is None:
        return "not measured"
    return f"{estimate['estimate']:+.3f} [{estimate['ci_low']:+.3f}, {estimate['ci_high']:+.3f}]"


def _list(values: pd.Series) -> str:
    return ", ".join(f"{v:.3f}" for v in values)


def headline(summary: dict[str, Any]) -> str:
    """The result in one or two sentences."""
    persona = summary["persona_feature"]
    passed = sum(c["passed"] for c in summary["checks"])
    arms = [a for a, v in summary["verdicts"].items() if v["feature"] == "subsided" and v["behaviour"] == "restored"]
    results = {c["name"]: c["passed"] for c in summary["checks"]}
    carries = (
        "carries it"
        if results["induce"] and results["repair"]
        else "is the best candidate, but was not shown to carry it"
    )
    back = f"Feature and behaviour both came back in: {', '.join(arms) or 'no corrective arm'}."
    return (
        f"{_main_result(summary)} Latent {persona['latent']} {carries} (causal effect "
        f"{_text(summary['steer_base_up'])}). {back} {passed} of {len(summary['checks'])} checks passed."
    )


def _main_result(summary: dict[str, Any]) -> str:
    """What fine-tuning did, in a sentence that claims nothing of data that are not known."""
    known = summary["data_known"]
    what, where = (
        ("Narrow fine-tuning", "outside the training domain") if known else ("Fine-tuning", "on the contrast set")
    )
    if "no_control" in summary:
        base = _text(summary["effect_incorrect_minus_base"])
        return f"{what}: incorrect minus base {base} nats per token {where}. {summary['no_control']}"
    effect = summary["effect_incorrect_minus_correct"]
    woke = "woke a broadly misaligned persona" if effect["ci_low"] > 0 else "showed no effect beyond its control arm"
    return f"{what} {woke}: incorrect minus correct {_text(effect)} nats per token {where}."
