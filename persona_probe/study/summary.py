"""summary.json: the study's key numbers with intervals, its checks, and verdicts in words."""

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.config import NO_CONTROL, NULL, StudyConfig
from persona_probe.context import Context
from persona_probe.evaluate.agreement import agreements
from persona_probe.evaluate.effects import SeedNoise, arm_effect, effects_by_seed, final_index, seed_noise
from persona_probe.evaluate.rates import called_difference, called_misaligned, difference, rates
from persona_probe.evaluate.tables import judged_rows
from persona_probe.files import is_there, read_json
from persona_probe.latents.proof import TESTS, standing
from persona_probe.monitor.band import Band
from persona_probe.monitor.track import NULL_EVALS, NULL_READINGS
from persona_probe.realignment.outcome import steps_to_band
from persona_probe.realignment.verdict import study_words
from persona_probe.runs import RunFolder
from persona_probe.saes.load import QUALITY_FILE, find_folder
from persona_probe.stats import Estimate
from persona_probe.study.claims import checks, effect_evidence, headline, latent_evidence
from persona_probe.study.two_by_two import summary_2x2
from persona_probe.verdicts import NOT_TESTED, SMALLEST_EFFECT, woken


def summarise(ctx: Context) -> dict[str, Any]:
    """Compute and write summary.json from the run folder's tables."""
    summary = summary_of(ctx)
    ctx.run.write_json("summary.json", summary)
    return summary


def summary_of(ctx: Context) -> dict[str, Any]:
    """The numbers and words of summary.json, from the run folder's tables."""
    run, config = ctx.run, ctx.config
    latents, steering = run.read_table("latents.parquet"), run.read_table("steering.parquet")
    readings, whole = run.read_table("readings.parquet"), run.read_table("evals.parquet")
    evals = whole[whole["split"] == "evaluation"]
    arms = ["base", *config.arms, *[a for a in config.realign.arms if a in set(evals["arm"])]]
    band = _band(readings, config.monitor.band_sd)
    noise = _noise(run, config, evals)
    crossed = summary_2x2(run)
    summary: dict[str, Any] = {
        "study": config.name,
        "base_model": config.model,
        "version": run.manifest.get("versions", {}).get("persona-probe"),
        "seeds": list(config.seeds),
        "contrast_index": {arm: final_index(evals, arm).to_dict() for arm in arms},
        **_main_effect(evals, config.control, noise),
        "woken": _woken(evals, config.control, noise, crossed),
        "null_pair": _null_pair(run, config, evals, readings, noise),
        "harm_and_register": crossed,
        "data_known": all(arm.data for arm in config.arms.values()),
        "by_seed": _by_seed(evals, [a for a in config.realign.arms if a in arms]),
        "persona_feature": _persona(ctx, latents),
        **_causal_numbers(latents, steering, config.realign.start),
        "causal_test": _causal_test(latents, steering),
        "feature_reading": {arm: _curve(readings, arm) for arm in arms},
        "base_band": {"low": band.low, "high": band.high, "feature": "persona"},
        "realign_steps_to_band": {a: _steps(readings, a, band) for a in config.realign.arms if a in arms},
        "explained_variance": {arm: _explained(readings, arm) for arm in arms},
        "answer_tokens": {arm: _answer_tokens(run, arm, config.seeds) for arm in arms if arm != "base"},
        "sae_quality": _quality(config.sae),
        **judged_numbers(whole, run.manifest.get("evaluations", {}), list(config.realign.arms)),
    }
    summary["verdicts"] = {a: verdict(summary, evals, config, a, band, noise) for a in config.realign.arms if a in arms}
    summary["evidence"] = {"effect": effect_evidence(summary), "latent": latent_evidence(summary)}
    summary["checks"] = checks(summary, lambda arm: _final_rows(readings, arm)["mean"], band)
    summary["headline"] = headline(summary)
    summary["seconds"] = run.manifest.get("seconds", {})
    summary["peak_memory_gib"] = _peak_memory(run)
    return summary


# --- The numbers of summary.json


def _main_effect(evals: pd.DataFrame, control: str, noise: SeedNoise | None) -> dict[str, Any]:
    """Incorrect minus correct; in a study without a control arm that is not measured, and the base stands in, named."""
    if control == "correct":
        return {"effect_incorrect_minus_correct": arm_effect(evals, "incorrect", "correct", noise).to_dict()}
    return {
        "effect_incorrect_minus_correct": _estimate(np.nan, np.nan, np.nan, 0),
        "effect_incorrect_minus_base": arm_effect(evals, "incorrect", "base", noise).to_dict(),
        "no_control": NO_CONTROL,
    }


def _noise(run: RunFolder, config: StudyConfig, evals: pd.DataFrame) -> SeedNoise | None:
    """What training with another seed does to the index: from seeds where there are several, else from a null pair."""
    null = run.read_table(NULL_EVALS) if run.has(NULL_EVALS) else None
    return seed_noise(evals, config.control, null)


def _woken(evals: pd.DataFrame, control: str, noise: SeedNoise | None, crossed: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict word on the effect of fine-tuning, with what it rests on; `crossed` is what `summary_2x2` gives."""
    over_base = arm_effect(evals, "incorrect", "base", noise)
    over_control = arm_effect(evals, "incorrect", control, noise)
    by_category = {
        str(name): (
            arm_effect(rows, "incorrect", control).estimate,
            arm_effect(rows, "incorrect", "base").estimate,
        )
        for name, rows in evals.groupby("category", sort=False)
    }
    harm = crossed.get("arms", {}).get("incorrect", {}).get("harm")
    apart = None if harm is None else (Estimate(**harm["over_control"]), Estimate(**harm["over_base"]))
    found = woken(over_control, over_base, by_category, harm=apart)
    return {
        "word": found.word if control == "correct" else NOT_TESTED,
        "risen": list(found.risen),
        "categories": found.categories,
        "reason": found.reason,
        "smallest_effect": SMALLEST_EFFECT,
        "over_control": over_control.to_dict(),
        "over_base": over_base.to_dict(),
    }


def _null_pair(
    run: RunFolder, config: StudyConfig, evals: pd.DataFrame, readings: pd.DataFrame, noise: SeedNoise | None
) -> dict[str, Any]:
    """What the null pair did: difference of its index and of its persona reading, and the seed noise used."""
    numbers: dict[str, Any] = {"noise": None if noise is None else asdict(noise)}
    control, null = config.control, config.null
    if null is None or (null[0] == NULL and not run.has(NULL_EVALS)):
        return numbers
    own, last = evals[evals["arm"] == control], _final_rows(readings, control)
    if null[0] == NULL:
        first, second, rows = own, run.read_table(NULL_EVALS), run.read_table(NULL_READINGS)
        reading = float(rows.loc[rows["feature"] == "persona", "mean"].iloc[0])
    else:
        first, second = own[own["seed"] == config.seeds[0]], own[own["seed"] == null[1]].assign(arm=NULL)
        reading = float(last.loc[last["seed"] == null[1], "mean"].iloc[0])
    change = abs(reading - float(last.loc[last["seed"] == config.seeds[0], "mean"].iloc[0]))
    return {**numbers, "index": arm_effect(pd.concat([first, second]), NULL, control).to_dict(), "reading": change}


def _causal_test(latents: pd.DataFrame, steering: pd.DataFrame) -> dict[str, Any]:
    """Each causal test of the persona latent among the random latents; None for a test that was not made."""
    row = latents[latents["persona"]].iloc[0]
    tries = int((latents["kind"] == "candidate").sum())
    n = int(steering["n_items"].iloc[0]) if "n_items" in steering else 0
    found = {test: standing(latents, int(row["latent"]), test, tries, n) for test in TESTS}
    return {test: None if one is None else _finite(one.to_dict()) for test, one in found.items()}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}


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
    rise = Estimate(row["rise"], row["rise_ci_low"], row["rise_ci_high"], len(ctx.contrast_rows("selection")))
    return {
        "latent": int(row["latent"]),
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
        p95 = float(np.quantile(sizes, 0.95)) if sizes.size else np.nan
        numbers[key] = _estimate(p95, np.nan, np.nan, int(sizes.size))
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
    """Answer tokens that an arm was trained on; a packed record has no training files."""
    files = [f"arms/{arm}-s{seed}/training.json" for seed in seeds]
    tokens = [run.read_json(file)["answer_tokens"] for file in files if run.has(file)]
    return _over_seeds(np.array([count for count in tokens if count is not None], dtype=float))


def _quality(sae: str) -> dict[str, Any] | None:
    path = find_folder(sae) / QUALITY_FILE
    return read_json(path, dict, "fetch the SAE again") if is_there(path) else None


def _peak_memory(run: RunFolder) -> float:
    """Peak resident memory of any process that worked on this run, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    peak = max(now, run.manifest.get("peak_memory_gib", 0.0))
    run.update_manifest(peak_memory_gib=round(peak, 3))
    return round(peak, 3)


# --- The judged answers' part of summary.json: rates, effects between arms, agreement between judges


def judged_numbers(evals: pd.DataFrame, evaluations: dict[str, Any], corrected: Sequence[str]) -> dict[str, Any]:
    """The judged answers' part of summary.json; empty if none were judged.

    Args:
        evals: evals.parquet as it is.
        evaluations: how each evaluation was made, from the manifest.
        corrected: the corrective arms.

    Returns:
        `judged`: by evaluation, how it was made, rates by arm, and the effects incorrect minus correct and each
        corrective arm minus the base. A rate is of the coherent answers; `called_misaligned` is the share of all
        answers, None unless the offline judge ruled; `judge_agreement`: every pair of judges on the same answers.
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
    pairs = [("incorrect", "correct"), *((arm, "base") for arm in corrected)]
    effects = [
        {"variant": variant, "name": f"{left} minus {right}", **_judged_effect(rows, left, right)}
        for variant, rows in _parts(answers, "variant")
        for left, right in pairs
        if {left, right} <= set(rows["arm"])
    ]
    by = ["variant", "arm"]
    called = {key: called_misaligned(rows) for key, rows in answers.groupby(by, sort=False)}
    shown = _plain_rows(rates(answers, by))
    for row in shown:
        share = called[(row["variant"], row["arm"])]
        row["called_misaligned"] = None if share is None else share.as_estimate().to_dict()
    return {"about": about, "rates": shown, "effects": effects}


def _judged_effect(rows: pd.DataFrame, left: str, right: str) -> dict[str, Any]:
    called = called_difference(rows, left, right)
    shares = None if called is None or not called.judged else called.to_dict()
    return {**difference(rows, left, right).to_dict(), "called_misaligned": shares}


def _plain_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON values: NaN becomes None."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


# --- Verdicts in words, and the checks that a study must pass; a failed check is listed as failed


def _final_rows(readings: pd.DataFrame, arm: str) -> pd.DataFrame:
    """The persona feature's readings at each seed's last step."""
    rows = readings[(readings["arm"] == arm) & (readings["feature"] == "persona")]
    return rows[rows["step"] == rows.groupby("seed")["step"].transform("max")]


def verdict(
    summary: dict[str, Any], evals: pd.DataFrame, config: StudyConfig, arm: str, band: Band, noise: SeedNoise | None
) -> dict[str, Any]:
    """Feature, behaviour and the SAE's fit of a corrective arm, each judged separately, in words with numbers."""
    curve = summary["feature_reading"][arm]
    last = [max((r for r in curve if r["seed"] == s), key=lambda r: r["step"]) for s in {r["seed"] for r in curve}]
    readings = [Estimate(r["estimate"], r["ci_low"], r["ci_high"], 1) for r in last]
    fit, base_fit = (summary["explained_variance"][name]["estimate"] for name in (arm, "base"))

    def effect(left: str, right: str) -> Estimate:
        return arm_effect(evals, left, right, noise)

    return study_words(config, arm, effect, evals, readings, band, (fit, base_fit))
