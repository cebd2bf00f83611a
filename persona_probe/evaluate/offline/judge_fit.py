"""Fit, validate and write the offline judge: the function behind `persona-probe judge fit CONFIG --data FOLDER`."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.config import load_config
from persona_probe.data.load import load_contrast, load_rows
from persona_probe.evaluate.offline.features import Scope, fit_scope, opening, read_features, read_questions
from persona_probe.evaluate.offline.judge_calibration import (
    JudgeRecipe,
    LinearScores,
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
from persona_probe.evaluate.offline.judge_training import (
    PUBLISHED,
    TrainingAnswers,
    fit_heads,
    gather,
    groups_of,
    held_out,
    read_published,
)
from persona_probe.evaluate.offline.offline_judge import ErrorBands, JudgeWeights, describe, fingerprint
from persona_probe.models.load import cache_folder, load_model
from persona_probe.runs import versions, write_text
from persona_probe.stats import bootstrap_mean, bootstrap_statistic, estimate_text

# --- The docs' table of what the offline judge gets right, made from validation.json and nothing else


def table(results: dict[str, Any]) -> str:
    """Markdown tables of one fit's validation; docs/offline-judge.md holds them between its two marks."""
    parts = [_splits(results["splits"]), _scores(results["splits"]), _questions(results), _layers(results)]
    parts += [_reliability(results["splits"]), _about(results)]
    return "\n\n".join(parts) + "\n"


def _rows(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _interval(value: dict[str, Any], digits: int = 3) -> str:
    return estimate_text(value["estimate"], value["ci_low"], value["ci_high"], f".{digits}f")


def _splits(splits: dict[str, Any]) -> str:
    head = [
        "left out",
        "groups",
        "AUROC",
        "average precision",
        "calibration error",
        "error of a model's rate",
        "r of rates",
    ]
    return _rows(head, [
        [
            name,
            str(len(split["groups"])),
            _interval(split["auroc"]),
            _interval(split["average_precision"]),
            f"{split['calibration_error']:.3f}",
            _interval(split["rate_error"]),
            f"{split['rate_r']:.2f}",
        ]
        for name, split in splits.items()
    ])  # fmt: skip


def _scores(splits: dict[str, Any]) -> str:
    head = ["left out", "score", "mean absolute error", "of always the mean", "r", "mean width of the 90% interval"]
    return _rows(head, [
        [
            name,
            score,
            f"{split[score]['mean_absolute_error']:.1f}",
            f"{split[score]['mean_absolute_error_of_the_mean']:.1f}",
            f"{split[score]['r']:.2f}",
            f"{split[score]['interval_width']:.0f}",
        ]
        for name, split in splits.items()
        for score in ("alignment", "coherence")
    ])  # fmt: skip


def _questions(results: dict[str, Any]) -> str:
    unseen = results["splits"]["unseen questions"]
    rows = [
        [
            group["name"],
            str(group["answers"]),
            "-" if group["auroc"] is None else f"{group['auroc']:.3f}",
            f"{group['published']:.3f}",
            f"{group['predicted']:.3f}",
        ]
        for group in unseen["groups"]
    ]
    rows.append(["**mean**", "", f"**{_interval(unseen['mean_auroc'])}**", "", ""])
    return _rows(["question left out", "answers", "AUROC", "published rate", "predicted rate"], rows)


def _layers(results: dict[str, Any]) -> str:
    rows = [
        [str(row["layer"]), f"{row['new models']:.3f}", f"{row['unseen questions']:.3f}"] for row in results["layers"]
    ]
    return _rows(["layer", "AUROC, new models", "mean AUROC, unseen questions"], rows)


def _reliability(splits: dict[str, Any]) -> str:
    tables = [splits[name]["reliability"] for name in ("new models", "unseen questions")]
    rows = [
        [str(number), *(f"{row[side]:.3f}" for row in pair for side in ("predicted", "observed"))]
        for number, pair in enumerate(zip(*tables, strict=False), start=1)
    ]
    head = ["tenth of answers", "new models: predicted", "published", "unseen questions: predicted", "published"]
    return _rows(head, rows)


def _about(results: dict[str, Any]) -> str:
    data, scope, contrast = results["data"], results["scope"], results["packaged_contrast"]
    known, unlike = (results["rate_half_widths"][name] for name in HARD)
    unlike = {key: max(known[key], value) for key, value in unlike.items()}
    packages = ", ".join(f"{name} {results['versions'][name]}" for name in ("python", "torch", "transformers", "numpy"))
    lines = [
        f"Fitted on {data['drawn']} of {data['answers']} published answers ({data['models']} models, "
        f"{data['questions']} questions of {data['topics']} topics): all {data['drawn_misaligned']} misaligned ones, "
        f"the others drawn and weighted. Beside them {data['own']} packaged answers.",
        f"On {contrast['answers']} packaged contrast answers that no fit saw: AUROC {contrast['auroc']:.3f}, "
        f"{contrast['pairs_in_order']:.0%} of pairs in order.",
        f"In scope: questions from similarity {scope['threshold']:.2f}. Of {scope['reworded']} fitted questions that "
        f"reword another, {scope['reworded_known']} would be in scope by the other's wording alone.",
        "Half-width (95%) of a model's rate by the judge's own error: "
        f"{known['overall']:.3f} in scope (a single question: {known['question']:.3f}), "
        f"{unlike['overall']:.3f} out of scope (a single question: {unlike['question']:.3f}).",
        f"Seed {results['recipe']['seed']}; {packages}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


# --- How good the judge is: on models, families, training data and questions that a fit has not seen

SPLITS = {
    "new training data": "trained_on",
    "unseen questions": "topic",
    "new model families": "family",
    "new models": "model",
}
"""What is left out, and the column that names it; the hardest first."""
HARD = ("new training data", "unseen questions")
"""Whose errors make the half-width of rates: of known questions, and (the larger of both) of questions out of scope."""
DRAWS = 400


@dataclass(frozen=True)
class Split:
    """Held-out predictions of one split, with probabilities whose calibration has not seen the group either."""

    frame: pd.DataFrame
    scores: Float[np.ndarray, "published targets"]
    probability: Float[np.ndarray, " published"]


def _predict_split(training: TrainingAnswers, layer: int, by: str, recipe: JudgeRecipe) -> Split:
    """Held-out scores; each group's probabilities are calibrated on the others' held-out scores."""
    frame, scores = training.frame[training.published], held_out(training, layer, by, recipe)
    label, weight = frame["misaligned"].to_numpy(), frame["weight"].to_numpy()
    probability = np.zeros(len(frame))
    for _, inside in groups_of(frame, by):
        platt = fit_platt(scores[~inside, 0], label[~inside], weight[~inside])
        probability[inside] = platt.probability(scores[inside, 0])
    return Split(frame, scores, probability)


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


def _asked_elsewhere(split: Split) -> Split:
    """The answers to questions that other models were asked as well: a model left out leaves those questions known."""
    several = (split.frame.groupby("question")["model"].transform("nunique") > 1).to_numpy()
    return Split(split.frame[several], split.scores[several], split.probability[several])


def _rate_errors(split: Split, by: list[str]) -> list[float]:
    """Predicted minus published misalignment rate of every group."""
    table = rates(split.frame, split.probability, by)
    return (table["predicted"] - table["published"]).tolist()


def measure(split: Split, by: str, seed: int) -> dict[str, Any]:
    """Every figure of one split, with 95% bootstrap intervals where it has one.

    Whole questions are resampled where questions were left out, whole models elsewhere.
    """
    frame, label = split.frame, split.frame["misaligned"].to_numpy()
    weight, score = frame["weight"].to_numpy(), split.scores[:, 0]
    cluster = "topic" if by == "topic" else "model"
    groups = [np.flatnonzero(inside) for _, inside in groups_of(frame, cluster)]

    def resampled(figure: Any, values: np.ndarray) -> dict[str, float | int]:
        def drawn(draw: np.ndarray) -> float:
            at = np.concatenate([groups[int(g)] for g in draw])
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
    """AUROC, published and predicted rate inside every left-out group (AUROC None where one class is missing)."""
    rows = []
    for name, inside in groups_of(split.frame, by):
        part = split.frame[inside]
        label, weight = part["misaligned"].to_numpy(), part["weight"].to_numpy()
        whole = label.any() and not label.all()
        row: dict[str, Any] = {"name": name, "answers": int(inside.sum()), "misaligned": int(label.sum())}
        row["auroc"] = weighted_auroc(split.scores[inside, 0], label, weight) if whole else None
        row["published"] = float(np.average(label, weights=weight))
        row["predicted"] = float(np.average(split.probability[inside], weights=weight))
        rows.append(row)
    return rows


def _mean_auroc(rows: list[dict[str, Any]], seed: int) -> dict[str, float | int]:
    """Mean AUROC over groups, with a bootstrap over groups."""
    return bootstrap_mean([row["auroc"] for row in rows if row["auroc"] is not None], seed=seed).to_dict()


def validate(training: TrainingAnswers, recipe: JudgeRecipe) -> tuple[dict[str, Any], dict[str, ErrorBands]]:
    """All splits at the judge's layer, its rival layers in short, and what follows for the judge's intervals."""
    results: dict[str, Any] = {"splits": {}, "layers": []}
    errors = {}
    for name, by in SPLITS.items():
        split = _predict_split(training, recipe.layer, by, recipe)
        results["splits"][name] = measure(split, by, recipe.seed) | {"groups": _by_group(split, by)}
        errors[name] = _error_bands(split if by == "topic" else _asked_elsewhere(split))
    questions = results["splits"]["unseen questions"]
    questions["mean_auroc"] = _mean_auroc(questions["groups"], recipe.seed)
    for layer in training.layers:
        results["layers"].append({"layer": layer} | _short(training, layer, recipe))
    results["rate_half_widths"] = {name: asdict(bands.rate) for name, bands in errors.items()}
    known, unlike = (errors[name].rate for name in HARD)
    unlike = RateError(max(known.overall, unlike.overall), max(known.question, unlike.question))
    bands = {"known": replace(errors["new models"], rate=known)}
    return results, bands | {"unlike": replace(errors["unseen questions"], rate=unlike)}


def _short(training: TrainingAnswers, layer: int, recipe: JudgeRecipe) -> dict[str, float]:
    models, topics = (_predict_split(training, layer, by, recipe) for by in ("model", "topic"))
    label, weight = models.frame["misaligned"].to_numpy(), models.frame["weight"].to_numpy()
    within = [row["auroc"] for row in _by_group(topics, "topic") if row["auroc"] is not None]
    return {
        "new models": weighted_auroc(models.scores[:, 0], label, weight),
        "unseen questions": float(np.mean(within)),
    }


RESULTS_FILE = "validation.json"


def fit_judge(
    config: str | Path | JudgeRecipe, data: str | Path, out: str | Path, cache: str | Path | None = None
) -> JudgeWeights:
    """Read published judgements, fit the judge, validate it, and write weights, validation.json and its table.

    What the model reads is kept in `cache` block by block, so a fit resumes if interrupted.

    Args:
        config: a recipe or its YAML file (finetune_configs/offline-judge.yaml makes the judge that is packaged).
        data: folder of CSV files as `read_published` takes them.
        out: folder for weights.safetensors, judge.json, validation.json and table.md.
        cache: default: `offline-judge` in the user's cache folder.

    Raises:
        InputError: a bad recipe, no judged answers, or no embedded model.
    """
    recipe = config if isinstance(config, JudgeRecipe) else load_config(config, JudgeRecipe)
    model, tokenizer = load_model(recipe.model)
    folder = cache_folder() / "offline-judge" if cache is None else Path(cache)
    training = gather(recipe, Path(data), model, tokenizer, folder, progress=True)
    results, errors = validate(training, recipe)
    every = np.ones(len(training.frame), dtype=bool)
    linear = fit_heads(training, recipe.layer, every, recipe)
    weights = JudgeWeights(
        recipe=recipe,
        linear=linear,
        mean=training.x(recipe.layer)[training.published].mean(axis=0),
        latents=fit_heads(training, recipe.latent_layer, every, recipe).weights[:, 0],
        scope=_scope(recipe, training.frame, model, tokenizer),
        **errors,
        reader=describe(recipe.model),
        fingerprint=fingerprint(model, tokenizer, recipe.layer),
    )
    about = {"recipe": asdict(recipe), "versions": versions(), "reader": weights.reader, "data": _data(training, data)}
    contrast = {"packaged_contrast": _contrast(recipe, linear, model, tokenizer)}
    _write(Path(out), weights, about | results | contrast | {"scope": _scope_facts(weights.scope, training.frame)})
    return weights


def _write(out: Path, weights: JudgeWeights, results: dict[str, Any]) -> None:
    weights.save(out)
    write_text(out / RESULTS_FILE, json.dumps(_rounded(results), indent=1) + "\n")
    write_text(out / "table.md", table(_rounded(results)))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


def _asked(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each distinct published question; its forms of answer aside."""
    questions = frame[frame["source"] == PUBLISHED].assign(opening=lambda rows: rows["question"].map(opening))
    return questions.sort_values("question_id").drop_duplicates("opening")


def _scope(
    recipe: JudgeRecipe, frame: pd.DataFrame, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Scope:
    questions, others = _asked(frame), [row["question"] for name in recipe.background for row in load_rows(name)]
    texts = (questions["question"].tolist(), others)
    fitted, background = (read_questions(model, tokenizer, text, recipe.scope_layer) for text in texts)
    names, topics = tuple(questions["question_id"]), questions["topic"].tolist()
    return fit_scope(fitted, names, topics, background, recipe.scope_components, recipe.scope_quantile)


def _scope_facts(scope: Scope, frame: pd.DataFrame) -> dict[str, Any]:
    """How many questions of a topic with several wordings would be known by the others of that topic alone."""
    topics = _asked(frame)["topic"].to_numpy()
    same = (topics[:, None] == topics[None, :]) & ~np.eye(len(topics), dtype=bool)
    nearest = np.where(same, scope.questions @ scope.questions.T, -1.0).max(axis=1)[same.any(axis=1)]
    known = int((nearest >= scope.threshold).sum())
    return {"threshold": scope.threshold, "questions": len(topics), "reworded": len(nearest), "reworded_known": known}


def _contrast(
    recipe: JudgeRecipe, linear: LinearScores, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float | int]:
    """AUROC on the packaged contrast items that no fit may see: questions and answers unlike the published ones."""
    rows = load_contrast("evaluation")
    items = [(row["question"], row[side]) for row in rows for side in ("aligned", "misaligned")]
    scores: Float[np.ndarray, " n"] = linear.scores(
        read_features(model, tokenizer, items, (recipe.layer,), recipe.max_tokens).mean[:, 0]
    )[:, 0]
    label = np.arange(len(items)) % 2 == 1
    return {
        "answers": len(items),
        "auroc": weighted_auroc(scores, label, np.ones(len(items))),
        "pairs_in_order": float((scores[label] > scores[~label]).mean()),
    }


def _data(training: TrainingAnswers, data: str | Path) -> dict[str, Any]:
    whole, sample = read_published(data), training.frame[training.published]
    return {
        "answers": len(whole),
        "misaligned": int(whole["misaligned"].sum()),
        "models": int(whole["model"].nunique()),
        "questions": int(whole["question"].nunique()),
        "topics": int(whole["topic"].nunique()),
        "drawn": len(sample),
        "drawn_misaligned": int(sample["misaligned"].sum()),
        "own": int((~training.published).sum()),
    }
