"""The calibration of predicted shifts, made from a study of labelled runs (`persona-probe monitor study`)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from persona_probe.config_files import from_dict
from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError
from persona_probe.evaluate.generation.identity import short_hash
from persona_probe.finetune.data import arm_rows
from persona_probe.models.load import load_model
from persona_probe.monitor_study.config import MonitorStudy
from persona_probe.runs import RunFolder, write_atomic
from persona_probe.saes.load import load_sae
from persona_probe.screening.calibrate import calibrate
from persona_probe.screening.evidence import answer_all, read_answered
from persona_probe.screening.feature import latent_feature
from persona_probe.screening.own import text_key
from persona_probe.screening.packaged import pairs_of, valid_for
from persona_probe.screening.rankers import choose_rankers, score_rows
from persona_probe.screening.settings import Settings

RANKERS = ("projection_difference", "latent_difference", "perplexity_gap", "bag_of_words")
AT_ONCE = 128
"""Rows whose scores are kept together: a stopped run goes on with the next."""


def write_calibration(study: Path, out: Path, latent: int) -> str:
    """Score the training rows of a study's runs, pair them with the measured shifts, and write the JSON file.

    Runs longer than the study's others are left out: a shift depends on how long was trained.

    Returns:
        What was written, and the leave-one-out error of each ranker.

    Raises:
        InputError: no study of the monitor, or fewer than five data sets.
    """
    folder = RunFolder(study)
    if folder.manifest.get("kind") != "monitor-study":
        raise InputError(f"{study} is no study of the monitor: make one with `persona-probe monitor study`")
    config = from_dict(MonitorStudy, folder.manifest["config"])
    shifts = measured_shifts(folder.read_table("evals.parquet"))
    names = [n for n in config.runs if n in shifts and not config.is_long(n)]
    rows = {n: arm_rows(config.arms[config.runs[n].arm], config.runs[n].seed) for n in names}
    scores, valid = _scores(config, rows, latent, out)
    pairs = [
        {"data": config.runs[n].arm, "seed": config.runs[n].seed, "score": scores[n], "shift": shifts[n]} for n in names
    ]
    held = {"valid_for": valid, "provenance": _provenance(config, folder, latent), "pairs": pairs}
    write_atomic(out, json.dumps(held, indent=1) + "\n")
    lines = [f"{ranker}: {calibrate(pairs_of(held, ranker)).statement}" for ranker in RANKERS]
    return "\n".join([f"calibration: {out}", *lines])


def measured_shifts(evals: pd.DataFrame) -> dict[str, float]:
    """Each run's contrast index at its last step minus at step 0, the base (nats per token), on the same items."""
    found: dict[str, float] = {}
    for name, rows in evals.groupby("run"):
        by_step = rows.groupby("step")["value"].mean()
        found[str(name)] = round(float(by_step.loc[by_step.index.max()] - by_step.loc[0]), 4)
    return found


def _scores(
    config: MonitorStudy, rows: dict[str, list[Conversation]], latent: int, out: Path
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Mean scores of every run's rows, and what they are valid for; rows that runs share are read once."""
    model, tokenizer = load_model(config.model, revision=config.revision)
    feature, settings = latent_feature(load_sae(config.sae), latent), Settings(progress=True)
    different = {text_key(talk): talk for of in rows.values() for talk in of}
    keys = sorted(different)
    talks = [different[key] for key in keys]
    own = answer_all(model, tokenizer, talks, replace(settings, own_path=out.with_suffix(".own.jsonl")))
    rankers, folder, frames = choose_rankers(RANKERS, frozenset({"latent", "words"})), RunFolder(out.parent), []
    for start in range(0, len(talks), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        name = f"{out.stem}.{short_hash(''.join(keys[part]).encode())}.parquet"
        if not folder.has(name):
            read = read_answered(model, tokenizer, talks[part], own[part], feature, rankers, None, settings)
            folder.write_table(name, pd.DataFrame(score_rows(read, rankers)))
        frames.append(folder.read_table(name))
    whole = pd.concat(frames).set_axis(keys)
    means = {name: whole.loc[[text_key(talk) for talk in of]].mean().round(5).to_dict() for name, of in rows.items()}
    return means, valid_for(feature, model, settings)


def _provenance(config: MonitorStudy, folder: RunFolder, latent: int) -> dict[str, Any]:
    training = config.training
    return {
        "study": f"study {config.name}",
        "config_hash": folder.manifest["config_hash"],
        "versions": folder.manifest["versions"],
        "model": config.model,
        "sae": config.sae,
        "latent": latent,
        "training": f"{training.method} rank {training.rank}, lr {training.lr}, {training.steps} steps of "
        f"{training.batch_size} rows",
        "behaviour": f"contrast index, {config.contrast_items} items of {config.contrast}, evaluation split",
    }
