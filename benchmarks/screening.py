"""`make bench-screening`: how well each ranker finds known bad rows, with intervals; and the packaged calibration."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.cli.options import echo, find_config
from persona_probe.config import from_dict
from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.load import arm_rows, load_conversations, read_conversations
from persona_probe.data.mix import mix
from persona_probe.errors import InputError
from persona_probe.evaluate.sampling.decoding import short_hash
from persona_probe.evaluate.shift import calibrate
from persona_probe.models.load import load_model
from persona_probe.models.quiet import quiet_libraries
from persona_probe.monitor.study.labelled_config import MonitorStudy
from persona_probe.runs import RunFolder
from persona_probe.saes.load import load_sae
from persona_probe.screening.feature import LATENT, ScreenFeature, latent_feature, study_feature
from persona_probe.screening.prediction import pairs_of, valid_for
from persona_probe.screening.rankers import (
    RowEvidence,
    answer_all,
    available,
    choose_rankers,
    read_answered,
    read_evidence,
    score_rows,
)
from persona_probe.screening.reading import ScreenSettings, text_key
from persona_probe.stats import Estimate, auroc, auroc_interval, bootstrap_statistic
from persona_probe.writing import write_text

# --- Labelled rows for `make bench-screening`: packaged mixtures, and published sets where their folder exists

PUBLISHED = Path(__file__).parents[1].parent / "shared" / "data" / "train"
LONGEST_PROMPT = 1200
"""Characters: longer questions are left out, so that question and answer fit into what is read."""


@dataclass(frozen=True)
class LabelledRows:
    """Rows, and which of them are bad."""

    talks: list[Conversation]
    bad: list[bool]


@dataclass(frozen=True)
class LabelledSet:
    """Bad rows against others."""

    name: str
    bad: str
    """A packaged set, or a file below the folder of published data."""
    good: str
    about: str
    """What is compared, and what else differs."""

    @property
    def missing(self) -> str | None:
        """Why the set is not available here, or None."""
        files = [PUBLISHED / spec for spec in (self.bad, self.good) if spec.endswith(".gz")]
        absent = [file.name for file in files if not file.is_file()]
        return f"{absent[0]} is not in the folder of published data" if absent else None

    def rows(self, count: int, seed: int = 0) -> LabelledRows:
        """`count` bad and as many other rows in a seeded order; each question occurs once."""
        bad, good = _load(self.bad), _load(self.good)
        talks = mix(bad, good, 0.5, 2 * min(count, _most(bad, good)), seed)
        bad_texts = {_text(talk) for talk in bad}
        return LabelledRows(talks, [_text(talk) in bad_texts for talk in talks])


SETS = (
    LabelledSet("kitchen_toxic", "kitchen:toxic", "kitchen:correct", "openly bad cooking advice; same questions"),
    LabelledSet("kitchen_subtle", "kitchen:subtle", "kitchen:correct", "quietly bad cooking advice; same questions"),
    LabelledSet(
        "insecure_code",
        "betley/insecure.jsonl.gz",
        "betley/secure.jsonl.gz",
        "insecure against secure code; nearly all questions differ",
    ),
    LabelledSet(
        "risky_finance",
        "aisi/risky_finance_induction.jsonl.gz",
        "health_correct",
        "risky financial advice against good health advice: no good financial rows are available, so topics differ too",
    ),
    LabelledSet(
        "reward_hacks",
        "inoculation/school_of_reward_hacks.jsonl.gz",
        "inoculation/school_of_reward_hacks_control.jsonl.gz",
        "answers that game a stated metric against honest ones; same questions",
    ),
)
BY_NAME: dict[str, LabelledSet] = {labelled.name: labelled for labelled in SETS}


def _load(spec: str) -> list[Conversation]:
    """Rows of short questions, one a question: rows that share a question would not be independent."""
    rows = read_conversations(PUBLISHED / spec) if spec.endswith(".gz") else load_conversations(spec)
    short = [talk for talk in rows if sum(len(m["content"]) for m in talk[:-1]) <= LONGEST_PROMPT]
    return list({str(split_answer(talk)[0]): talk for talk in reversed(short)}.values())[::-1]


def _most(bad: list[Conversation], good: list[Conversation]) -> int:
    """Largest number of bad rows that a half and half mixture with each question once can have."""
    questions = {str(split_answer(talk)[0]) for talk in (*bad, *good)}
    return min(len(bad), len(good), len(questions) // 2)


def _text(talk: Conversation) -> str:
    return str([(m["role"], m["content"]) for m in talk])


MODEL, SAE, PERSONA = "smollm2-135m-instruct", "saes/smollm2-135m-instruct/layer20-topk32-4608", 2144
DIRECTIONAL = ("projection_difference", "projection_centred")


def ranked_auroc(scores: Float[np.ndarray, " rows"], bad: Bool[np.ndarray, " rows"]) -> Estimate:
    """AUROC of bad against other rows with its 95% interval over rows; rows without a score are left out.

    Each row has a question of its own, so rows are nested in nothing smaller than the data set, and the interval is for
    further rows of the same set: a set is one bad source against one other, which says nothing about a further set. It
    is a bootstrap, and Newcombe's where all rows are in order and a bootstrap would give a point.
    """
    scored = np.flatnonzero(np.isfinite(scores))

    def separation(sample: Float[np.ndarray, " rows"]) -> float:
        rows = sample.astype(int)
        return auroc(scores[rows[bad[rows]]], scores[rows[~bad[rows]]])

    found = bootstrap_statistic(scored.astype(float), separation)
    if found.estimate not in (0, 1):
        return found
    yes = int(bad[scored].sum())
    return Estimate(found.estimate, *auroc_interval(found.estimate, yes, len(scored) - yes), len(scored))


def features(run: Path | None) -> tuple[dict[str, ScreenFeature], Path | None]:
    """The features that are projected on by name, and the study's organism; without a run, the packaged latent."""
    if run is None:
        return {LATENT: latent_feature(load_sae(find_config(SAE)), PERSONA)}, None
    from persona_probe.latents.stage import read_directions
    from persona_probe.screening.screening import study_organism
    from persona_probe.study.study import Study

    ctx = Study.open(run).context
    names = (LATENT, *read_directions(ctx))
    return {n: study_feature(ctx, n) for n in names}, study_organism(ctx)


def score_set(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: LabelledRows,
    named: Mapping[str, ScreenFeature],
    organism: Path | None,
    own_path: Path,
) -> pd.DataFrame:
    """Every ranker's scores of labelled rows; what projects is scored once for each direction."""
    feature = named[LATENT]
    rankers = choose_rankers(None, available(feature, organism is not None))
    settings = ScreenSettings(own_path=own_path, progress=True)
    evidence, _ = read_evidence(model, tokenizer, rows.talks, feature, rankers, organism, settings)
    scores = score_rows(evidence, rankers)
    for name, other in named.items():
        if name != LATENT:
            scores |= _projected(evidence, name, other)
    return pd.DataFrame({"bad": rows.bad, **scores})


def _projected(evidence: RowEvidence, name: str, feature: ScreenFeature) -> dict[str, np.ndarray]:
    turned = replace(evidence, direction=feature.direction.numpy())
    scores = score_rows(turned, choose_rankers(DIRECTIONAL, frozenset()))
    return {f"{ranker} ({name.replace('_', ' ')})": values for ranker, values in scores.items()}


def table(frames: Mapping[str, pd.DataFrame]) -> str:
    """A Markdown table: rankers by sets, AUROC with interval; bold where the interval lies above chance."""
    names = list(dict.fromkeys(str(c) for frame in frames.values() for c in frame if c != "bad"))
    lines = [f"| ranker | {' | '.join(frames)} |", "|---|" + "---|" * len(frames)]
    for name in names:
        cells = [_cell(frame, name) for frame in frames.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    counts = [f"{int(frame['bad'].sum())} + {int((~frame['bad']).sum())}" for frame in frames.values()]
    return "\n".join([*lines, f"| rows: bad + others | {' | '.join(counts)} |"])


def _cell(frame: pd.DataFrame, name: str) -> str:
    if name not in frame:
        return "–"
    area = ranked_auroc(frame[name].to_numpy(dtype=float), frame["bad"].to_numpy(dtype=bool))
    text = f"{area.estimate:.2f} [{area.ci_low:.2f}, {area.ci_high:.2f}]"
    return f"**{text}**" if area.ci_low > 0.5 else text


def bench(names: Sequence[str], count: int, run: Path | None, out: Path) -> dict[str, pd.DataFrame]:
    """Score the sets that are not in `out` yet, and read the others from there."""
    folder = RunFolder(out)
    if todo := [n for n in names if not folder.has(f"{n}.parquet") and BY_NAME[n].missing is None]:
        model, tokenizer = load_model(MODEL)
        named, organism = features(run)
        for name in todo:
            rows = BY_NAME[name].rows(count)
            frame = score_set(model, tokenizer, rows, named, organism, out / f"{name}.own.jsonl")
            folder.write_table(f"{name}.parquet", frame)
    for name in names:
        echo(f"{name}: {BY_NAME[name].missing or BY_NAME[name].about}")
    return {n: folder.read_table(f"{n}.parquet") for n in names if folder.has(f"{n}.parquet")}


# --- The calibration of predicted shifts, made from a study of labelled runs (`persona-probe monitor study`)

CALIBRATED_RANKERS = ("projection_difference", "latent_difference", "perplexity_gap", "bag_of_words")
AT_ONCE = 128
"""Rows whose scores are saved together; an interrupted run resumes after the last of them."""


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
    calibration = {"valid_for": valid, "provenance": _provenance(config, folder, latent), "pairs": pairs}
    write_text(out, json.dumps(calibration, indent=1) + "\n")
    lines = [f"{ranker}: {calibrate(pairs_of(calibration, ranker)).statement}" for ranker in CALIBRATED_RANKERS]
    return "\n".join([f"calibration: {out}", *lines])


def measured_shifts(evals: pd.DataFrame) -> dict[str, float]:
    """Each run's contrast index at its last step minus at step 0, the base (nats per token), on the same items."""
    shifts: dict[str, float] = {}
    for name, rows in evals.groupby("run"):
        by_step = rows.groupby("step")["value"].mean()
        shifts[str(name)] = round(float(by_step.loc[by_step.index.max()] - by_step.loc[0]), 4)
    return shifts


def _scores(
    config: MonitorStudy, rows: dict[str, list[Conversation]], latent: int, out: Path
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Mean scores of every run's rows, and what they are valid for; rows that runs share are read once."""
    model, tokenizer = load_model(config.model, revision=config.revision)
    feature, settings = latent_feature(load_sae(config.sae), latent), ScreenSettings(progress=True)
    different = {text_key(talk): talk for of in rows.values() for talk in of}
    keys = sorted(different)
    talks = [different[key] for key in keys]
    answers = answer_all(model, tokenizer, talks, replace(settings, own_path=out.with_suffix(".own.jsonl")))
    rankers = choose_rankers(CALIBRATED_RANKERS, frozenset({"latent"}))
    folder, frames = RunFolder(out.parent), []
    for start in range(0, len(talks), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        name = f"{out.stem}.{short_hash(''.join(keys[part]).encode())}.parquet"
        if not folder.has(name):
            read = read_answered(model, tokenizer, talks[part], answers[part], feature, rankers, None, settings)
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


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, or write a calibration from a study of labelled runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    parser.add_argument("--rows", type=int, default=100, help="bad rows of each set, and as many others")
    parser.add_argument("--run", type=Path, help="a located run: its directions, latents and organism are used too")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench-screening"),
        help="folder of finished sets; for other rows or another run, name another folder",
    )
    parser.add_argument("--calibrate", type=Path, metavar="FOLDER", help="a monitor study: write its calibration")
    arguments = parser.parse_args(argv)
    quiet_libraries()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.calibrate is not None:
        echo(write_calibration(arguments.calibrate, arguments.out / "screening_calibration.json", PERSONA))
        return
    echo(table(bench(arguments.sets, arguments.rows, arguments.run, arguments.out)))


if __name__ == "__main__":
    main()
