"""Fit, validate and write the offline judge: the function behind `persona-probe judge fit CONFIG --data FOLDER`."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.config import load_config
from persona_probe.data.load import load_contrast, load_rows
from persona_probe.errors import InputError
from persona_probe.evaluate.offline.features import Scope, fit_scope, opening, read_features, read_questions
from persona_probe.evaluate.offline.judge_calibration import JudgeRecipe, LinearScores, RateError, weighted_auroc
from persona_probe.evaluate.offline.judge_training import (
    PUBLISHED,
    TrainingAnswers,
    fit_heads,
    gather,
    read_published,
)
from persona_probe.evaluate.offline.judge_validation import (
    NEW_SETS,
    check_set,
    half_widths,
    read_last,
    validate,
    validate_rates,
    without_set,
)
from persona_probe.evaluate.offline.offline_judge import JudgeWeights, describe, fingerprint
from persona_probe.files import read_json
from persona_probe.models.load import cache_folder, load_model
from persona_probe.runs import versions
from persona_probe.stats import estimate_text
from persona_probe.writing import write_text

# --- The docs' table of what the offline judge gets right, made from validation.json and nothing else


def table(results: dict[str, Any]) -> str:
    """Markdown tables of one validation; docs/offline-judge.md holds them between its two marks."""
    parts = [_splits(results["splits"]), _sets(results), _scores(results["splits"]), _questions(results)]
    parts += [_layers(results), _reliability(results["splits"]), _about(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def sets_table(results: dict[str, Any]) -> str:
    """The first two tables: every split, and every data set that was left out; then the half-widths."""
    lines = [f"No row '{name}': {why}." for name, why in results["left_out"].items()]
    parts = [_splits(results["splits"]), _sets(results), "\n".join([*lines, _widths(results)])]
    return "\n\n".join(part for part in parts if part)


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


def _sets(results: dict[str, Any]) -> str:
    """One row for each data set that was left out; the set that was kept for the end comes last."""
    head = ["data set left out", "models", "answers", "AUROC", "published rate", "predicted rate"]
    head += ["error of a model's rate", "largest"]
    rows = [_set_row(group, group["name"]) for group in results["splits"].get(NEW_SETS, {}).get("groups", [])]
    if last := results.get("last"):
        rows.append(_set_row(last, f"**{last['name']}, read once, at the end**"))
    return _rows(head, rows) if rows else ""


def _set_row(group: dict[str, Any], name: str) -> list[str]:
    return [
        name,
        str(group["models"]),
        str(group["answers"]),
        "-" if group["auroc"] is None else f"{group['auroc']:.3f}",
        *(f"{group[key]:.3f}" for key in ("published", "predicted", "rate_error", "largest_rate_error")),
    ]


def _widths(results: dict[str, Any]) -> str:
    """The half-widths, the row that each comes from, and the set that had no part in them."""
    errors = {name: RateError(**value) for name, value in results["rate_half_widths"].items()}
    widths = half_widths(errors)
    known, unlike = widths["known"], widths["unlike"]
    text = (
        "Half-width of a model's rate by the judge's own error, the largest of the rows above: "
        f"{known.overall:.3f} in scope (a single question: {known.question:.3f}), "
        f"{unlike.overall:.3f} out of scope (a single question: {unlike.question:.3f}). By row: "
    )
    text += ", ".join(f"{name} {rate.overall:.3f} ({rate.question:.3f})" for name, rate in errors.items()) + "."
    if last := results.get("last"):
        text += (
            f" Of `{last['name']}`, which had no part in this, {last['inside']} of {last['models']} models are off by "
            f"at most {last['half_width']:.3f}."
        )
    return text


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
    if "layers" not in results:
        return ""
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
    packages = ", ".join(f"{name} {results['versions'][name]}" for name in ("python", "torch", "transformers", "numpy"))
    lines = [
        f"Fitted on {data['drawn']} of {data['answers']} published answers ({data['models']} models, "
        f"{data['questions']} questions of {data['topics']} topics): all {data['drawn_misaligned']} misaligned ones, "
        f"the others drawn and weighted. Beside them {data['own']} packaged answers.",
        f"On {contrast['answers']} packaged contrast answers that no fit saw: AUROC {contrast['auroc']:.3f}, "
        f"{contrast['pairs_in_order']:.0%} of pairs in order.",
        f"In scope: questions from similarity {scope['threshold']:.2f}. Of {scope['reworded']} fitted questions that "
        f"reword another, {scope['reworded_known']} would be in scope by the other's wording alone.",
        _widths(results),
        f"Seed {results['recipe']['seed']}; {packages}.",
    ]
    lines += [f"No row '{name}': {why}." for name, why in results.get("left_out", {}).items()]
    if kept := results.get("kept"):
        lines.insert(
            1, f"Validated without `{kept['name']}`: on {kept['drawn']} drawn answers of {kept['models']} models."
        )
    return "\n".join(f"- {line}" for line in lines)


# --- The fit

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


def validate_judge(
    config: str | Path | JudgeRecipe,
    data: str | Path,
    out: str | Path,
    keep: str | None = None,
    *,
    last: bool = False,
    judge: str | Path | None = None,
    cache: str | Path | None = None,
) -> dict[str, Any]:
    """Validate a recipe again, without fitting a judge to keep: who is left out, AUROC, error of rates, half-width.

    Args:
        config: a recipe or its YAML file.
        data: folder of CSV files as `read_published` takes them.
        out: folder for validation.json.
        keep: a data set that has no part in any fit, calibration or half-width.
        last: try on that set, once all is chosen, what the others gave.
        judge: folder of a judge fitted by this recipe: its half-widths become the ones found here, its validation.json
            gets the rows. Weights, calibration and intervals of scores stay as they are.
        cache: as `fit_judge`.

    Returns:
        What is written to validation.json.

    Raises:
        InputError: as `fit_judge`; no such set to keep; `last` without `keep`; a judge of another recipe.
    """
    recipe = config if isinstance(config, JudgeRecipe) else load_config(config, JudgeRecipe)
    if last and keep is None:
        raise InputError("name the data set that is read last: keep")
    weights = None if judge is None else JudgeWeights.load(Path(judge))
    if weights is not None and weights.recipe != recipe:
        raise InputError(f"the judge in {str(judge)!r} was fitted by another recipe: validate that one, or fit again")
    # Before the model is loaded: a folder without answers, or without that set.
    published = read_published(data)
    if keep is not None:
        check_set(published, keep)
    model, tokenizer = load_model(recipe.model)
    folder = cache_folder() / "offline-judge" if cache is None else Path(cache)
    # The rival layers are for the table of a fit; without them reading stops earlier.
    one_layer = replace(recipe, rival_layers=(), latent_layer=recipe.layer)
    rest = training = gather(one_layer, Path(data), model, tokenizer, folder, progress=True)
    kept = None
    if keep is not None:
        rest, kept = without_set(training, keep)
    results, bands = validate_rates(rest, one_layer)
    if kept is not None:
        published = rest.frame[rest.published]
        results["kept"] = {"name": keep, "drawn": len(published), "models": int(published["model"].nunique())}
        if last:
            results["last"] = read_last(rest, kept, bands, one_layer)
    results = _rounded({"recipe": asdict(recipe), "versions": versions(), **results})
    write_text(Path(out) / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
    if weights is not None:
        assert judge is not None
        _update(Path(judge), weights, results)
    return results


def _update(folder: Path, weights: JudgeWeights, results: dict[str, Any]) -> None:
    """Give a judge the half-widths, and its validation.json the rows, of a later validation."""
    widths = half_widths({name: RateError(**value) for name, value in results["rate_half_widths"].items()})
    bands = {name: replace(getattr(weights, name), rate=rate) for name, rate in widths.items()}
    about = read_json(folder / RESULTS_FILE, dict, "fit the judge again")
    replace(weights, **bands).save(folder)
    about = {key: value for key, value in about.items() if key not in ("kept", "last")}
    write_text(folder / RESULTS_FILE, json.dumps(about | results, indent=1) + "\n")


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
