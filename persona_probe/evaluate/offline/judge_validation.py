"""How good the offline judge is: on models, data sets, training data and questions that a fit has not seen."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.offline.judge_calibration import (
    JudgeRecipe,
    Platt,
    RateError,
    average_precision,
    calibration_error,
    conformal_quantile,
    fit_bands,
    fit_platt,
    rates,
    reliability,
    weighted_auroc,
)
from persona_probe.evaluate.offline.judge_training import TrainingAnswers, fit_heads, groups_of, held_out
from persona_probe.evaluate.offline.offline_judge import ErrorBands
from persona_probe.stats import bootstrap_mean, bootstrap_statistic

NEW_DATA, NEW_SETS, NEW_QUESTIONS = "new training data", "new data sets", "unseen questions"
SPLITS = {
    NEW_DATA: "trained_on",
    NEW_SETS: "data_set",
    NEW_QUESTIONS: "topic",
    "new model families": "family",
    "new models": "model",
}
"""What is left out, and the column that names it; the hardest first."""
NEEDED_SPLITS = (NEW_QUESTIONS, "new models")
"""Splits that a judge cannot do without: its calibration and its intervals of scores come from them."""
DRAWS = 400
FOLDS = 4
"""Parts in which the other groups are left out to calibrate without one group."""


# --- Held-out predictions


@dataclass(frozen=True)
class Split:
    """Held-out predictions of one split; neither fit nor calibration has seen a group that it predicts."""

    frame: pd.DataFrame
    scores: Float[np.ndarray, "published targets"]
    probability: Float[np.ndarray, " published"]


def _predict_split(training: TrainingAnswers, layer: int, by: str, recipe: JudgeRecipe) -> Split:
    """Held-out scores and probabilities: what a judge fitted and calibrated without the group says of it.

    Calibration is the packaged judge's: on scores of answers whose model (where questions are left out, whose question)
    the fit had not seen. So it is made again for every group, from the other groups alone.
    """
    frame, scores = training.frame[training.published], held_out(training, layer, by, recipe)
    probability = np.zeros(len(frame))
    for _, inside in groups_of(frame, by):
        outside = np.ones(len(training.frame), dtype=bool)
        outside[training.published] = ~inside
        platt = _calibration(training.where(outside), layer, "topic" if by == "topic" else "model", recipe)
        probability[inside] = platt.probability(scores[inside, 0])
    return Split(frame, scores, probability)


def _calibration(training: TrainingAnswers, layer: int, by: str, recipe: JudgeRecipe) -> Platt:
    """Platt's calibration on held-out scores; by the other kind of group where too few of this kind are misaligned."""
    frame = training.frame[training.published]
    if frame.loc[frame["misaligned"], by].nunique() < 2:
        by = "model" if by == "topic" else "topic"
    scores = held_out(training, layer, by, recipe, folds=FOLDS)
    return fit_platt(scores[:, 0], frame["misaligned"].to_numpy(), frame["weight"].to_numpy())


# --- How far the judge may be off: intervals of scores, and the half-width of rates


def _error_bands(split: Split) -> ErrorBands:
    """What scores and rates may be off by, from a split's held-out predictions."""
    frame, weight = split.frame, split.frame["weight"].to_numpy()
    bands = [
        fit_bands(np.clip(split.scores[:, place], 0, 100), frame[name].to_numpy(), weight)
        for place, name in ((1, "alignment"), (2, "coherence"))
    ]
    overall, question = (conformal_quantile(_rate_errors(split, by)) for by in (["model"], ["model", "topic"]))
    platt = fit_platt(split.scores[:, 0], frame["misaligned"].to_numpy(), weight)
    return ErrorBands(platt, bands[0], bands[1], RateError(overall, question))


def _rate_errors(split: Split, by: list[str]) -> list[float]:
    """Predicted minus published misalignment rate of every group."""
    table = rates(split.frame, split.probability, by)
    return (table["predicted"] - table["published"]).tolist()


def half_widths(errors: Mapping[str, RateError]) -> dict[str, RateError]:
    """The judge's own error in a rate, for questions in scope (`known`) and out of it (`unlike`).

    The hardest row decides: nobody knows how a model that they bring was trained. Out of scope, left-out questions
    count as well.

    Args:
        errors: of every split of `SPLITS` that was made.
    """
    known = _largest(rate for name, rate in errors.items() if name != NEW_QUESTIONS)
    return {"known": known, "unlike": _largest(errors.values())}


def _largest(errors: Iterable[RateError]) -> RateError:
    rows = list(errors)
    return RateError(max(rate.overall for rate in rows), max(rate.question for rate in rows))


# --- Figures of one split


def measure(split: Split, by: str, seed: int) -> dict[str, Any]:
    """Every figure of one split, with 95% intervals where it has one.

    Whole questions are resampled where questions were left out, whole data sets where those were, whole models
    elsewhere. The error of rates is over models.
    """
    frame, label = split.frame, split.frame["misaligned"].to_numpy()
    weight, score = frame["weight"].to_numpy(), split.scores[:, 0]
    cluster = by if by in ("topic", "data_set") else "model"
    groups = [np.flatnonzero(inside) for _, inside in groups_of(frame, cluster)]

    def resampled(figure: Any, values: np.ndarray) -> dict[str, float | int]:
        def drawn(draw: np.ndarray) -> float:
            at = np.concatenate([groups[int(g)] for g in draw])
            # A draw of groups without a misaligned answer (or with nothing else) says nothing of ranking.
            if label[at].all() or not label[at].any():
                return figure(values, label, weight)
            return figure(values[at], label[at], weight[at])

        return bootstrap_statistic(np.arange(len(groups)), drawn, DRAWS, seed).to_dict()

    table, by_model = reliability(split.probability, label, weight), rates(frame, split.probability, ["model"])
    return {
        "auroc": resampled(weighted_auroc, score),
        "average_precision": resampled(average_precision, score),
        "calibration_error": calibration_error(table),
        "reliability": table,
        "rate_error": bootstrap_mean(np.abs(by_model["predicted"] - by_model["published"]), seed=seed).to_dict(),
        "rate_r": float(np.corrcoef(by_model["predicted"], by_model["published"])[0, 1]),
        "alignment": _regression(split, "alignment", 1),
        "coherence": _regression(split, "coherence", 2),
    }


def _regression(split: Split, name: str, place: int) -> dict[str, float]:
    published, weight = split.frame[name].to_numpy(), split.frame["weight"].to_numpy()
    predicted = np.clip(split.scores[:, place], 0, 100)
    bands = fit_bands(predicted, published, weight)
    low, high = bands.interval(predicted)
    covariance = np.cov(predicted, published, aweights=weight)
    return {
        "mean_absolute_error": float(np.average(np.abs(predicted - published), weights=weight)),
        "r": float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])),
        "mean_absolute_error_of_the_mean": float(
            np.average(np.abs(np.average(published, weights=weight) - published), weights=weight)
        ),
        "interval_width": float(np.average(high - low, weights=weight)),
    }


def _by_group(split: Split, by: str) -> list[dict[str, Any]]:
    """Figures inside every left-out group (AUROC None where one class is missing); rate errors are over its models."""
    rows = []
    for name, inside in groups_of(split.frame, by):
        part = split.frame[inside]
        label, weight = part["misaligned"].to_numpy(), part["weight"].to_numpy()
        by_model = rates(part, split.probability[inside], ["model"])
        errors = np.abs(by_model["predicted"] - by_model["published"])
        whole = label.any() and not label.all()
        rows.append({
            "name": name,
            "models": len(by_model),
            "answers": int(inside.sum()),
            "misaligned": int(label.sum()),
            "auroc": weighted_auroc(split.scores[inside, 0], label, weight) if whole else None,
            "published": float(np.average(label, weights=weight)),
            "predicted": float(np.average(split.probability[inside], weights=weight)),
            "rate_error": float(errors.mean()),
            "largest_rate_error": float(errors.max()),
        })  # fmt: skip
    return rows


def _mean_auroc(rows: list[dict[str, Any]], seed: int) -> dict[str, float | int]:
    """Mean AUROC over groups, with an interval over groups."""
    return bootstrap_mean([row["auroc"] for row in rows if row["auroc"] is not None], seed=seed).to_dict()


# --- The whole validation


def validate_rates(training: TrainingAnswers, recipe: JudgeRecipe) -> tuple[dict[str, Any], dict[str, ErrorBands]]:
    """All splits at the judge's layer, and what follows for the intervals of scores and rates.

    A split that cannot be made (all answers are of one data set, say) is left out; `left_out` in the results says why.

    Raises:
        InputError: answers of one model or one question only, or a model or question without which all answers are
            of one kind.
    """
    results: dict[str, Any] = {"splits": {}, "left_out": {}}
    errors = {}
    for name, by in SPLITS.items():
        if name not in NEEDED_SPLITS and (why := _impossible(training, by)):
            results["left_out"][name] = why
            continue
        split = _predict_split(training, recipe.layer, by, recipe)
        results["splits"][name] = measure(split, by, recipe.seed) | {"groups": _by_group(split, by)}
        errors[name] = _error_bands(split)
    questions = results["splits"][NEW_QUESTIONS]
    questions["mean_auroc"] = _mean_auroc(questions["groups"], recipe.seed)
    results["rate_half_widths"] = {name: asdict(bands.rate) for name, bands in errors.items()}
    widths = half_widths({name: bands.rate for name, bands in errors.items()})
    bands = {"known": replace(errors["new models"], rate=widths["known"])}
    return results, bands | {"unlike": replace(errors[NEW_QUESTIONS], rate=widths["unlike"])}


def _impossible(training: TrainingAnswers, by: str) -> str:
    """Why the answers cannot be split so; empty if they can."""
    frame = training.frame[training.published]
    if frame[by].nunique() < 2:
        return f"all published answers have {by} {frame[by].iloc[0]!r}"
    for value, inside in groups_of(frame, by):
        if frame.loc[~inside, "misaligned"].nunique() < 2:
            return f"without {by} {value!r} all published answers are of one kind"
    return ""


def validate(training: TrainingAnswers, recipe: JudgeRecipe) -> tuple[dict[str, Any], dict[str, ErrorBands]]:
    """`validate_rates`, and the judge's rival layers in short."""
    results, bands = validate_rates(training, recipe)
    results["layers"] = [{"layer": layer} | _short(training, layer, recipe) for layer in training.layers]
    return results, bands


def _short(training: TrainingAnswers, layer: int, recipe: JudgeRecipe) -> dict[str, float]:
    """Ranking on new models, and within unseen questions: no calibration is needed for it."""
    frame = training.frame[training.published]
    label, weight = frame["misaligned"].to_numpy(), frame["weight"].to_numpy()
    models, topics = (held_out(training, layer, by, recipe)[:, 0] for by in ("model", "topic"))
    within = [
        weighted_auroc(topics[inside], label[inside], weight[inside])
        for _, inside in groups_of(frame, "topic")
        if label[inside].any() and not label[inside].all()
    ]
    return {"new models": weighted_auroc(models, label, weight), "unseen questions": float(np.mean(within))}


def check_set(published: pd.DataFrame, name: str) -> None:
    """Refuse to leave out a published data set that is not there, or is the only one.

    Raises:
        InputError: no such set, or no other.
    """
    names = sorted(published["data_set"].unique())
    if name not in names:
        raise unknown("data set", name, names)
    if len(names) < 2:
        raise InputError(f"all published answers are of {name!r}: nothing is left to validate without it")


def without_set(training: TrainingAnswers, name: str) -> tuple[TrainingAnswers, TrainingAnswers]:
    """The answers without one published data set, and that set's.

    Raises:
        InputError: as `check_set`.
    """
    check_set(training.frame[training.published], name)
    inside = (training.frame["data_set"] == name).to_numpy()
    return training.where(~inside), training.where(inside)


def read_last(
    rest: TrainingAnswers, last: TrainingAnswers, bands: Mapping[str, ErrorBands], recipe: JudgeRecipe
) -> dict[str, Any]:
    """A fit on `rest`, with its calibration and half-width, tried on a set that had no part in either.

    Args:
        rest: what is fitted on.
        last: the set that was kept until now.
        bands: what `validate_rates` found on `rest`.
    """
    heads = fit_heads(rest, recipe.layer, np.ones(len(rest.frame), dtype=bool), recipe)
    scores = heads.scores(last.x(recipe.layer))
    known = bands["known"]
    split = Split(last.frame, scores, known.platt.probability(scores[:, 0]))
    row = _by_group(split, "data_set")[0]
    models = _by_group(split, "model")
    inside = sum(model["largest_rate_error"] <= known.rate.overall for model in models)
    return row | {"half_width": known.rate.overall, "inside": inside, "by_model": models}
