"""`make null`: how often each verdict word and check speaks where there is nothing to say.

Organisms are trained on the same good rows with other seeds. Any two of them are a null pair: one plays the incorrect
arm, one the control, a third the control's second seed. Every rule of the package is applied to every pair, and what it
says is an error. Runs are kept in the folder, so a stopped command goes on where it was.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from persona_probe.cli.options import DEMO, echo, find_config
from persona_probe.cli.process import loads_models
from persona_probe.config import StudyConfig, Training, load_config
from persona_probe.context import Context
from persona_probe.data.chat import conversation
from persona_probe.data.load import load_contrast, load_data
from persona_probe.data.tokens import conversation_batches
from persona_probe.evaluate.contrast import contrast_index
from persona_probe.evaluate.effects import arm_effect, seed_noise
from persona_probe.finetune.sft import fine_tune, stripping, with_adapter
from persona_probe.latents.causal import BestOf
from persona_probe.latents.directions import mean_difference_direction
from persona_probe.latents.proof import TESTS
from persona_probe.latents.rankers import Evidence, score_table
from persona_probe.latents.unexplained import Reference, carriers, random_reference
from persona_probe.monitor.band import Band, base_band
from persona_probe.monitor.reading import FeatureReader
from persona_probe.report.tables import Marks, check_page, fill_page
from persona_probe.runs import write_json
from persona_probe.saes.load import load_sae
from persona_probe.saes.read import FitMoments, LatentMeans, read_latents
from persona_probe.stats import exact_share
from persona_probe.study.study import Study
from persona_probe.verdicts import MARGIN, NO_EFFECT, NOT_RESTORED, RESTORED, restored, woken

RUNS, FIRST_SEED = 80, 510
TRAINING = Training(steps=20, batch_size=4, checkpoints=(20,))
DATA = "kitchen:correct"
MARKS: Marks = ("<!-- null: begin (make null) -->", "<!-- null: end -->")
RECORD = Path(__file__).parents[1] / "records"

# --- The runs: one short organism for each seed, measured once


def make_runs(folder: Path, count: int) -> None:
    """Train and measure every run that is not in the folder yet, and the base."""
    config = load_config(find_config(DEMO), StudyConfig)
    with tempfile.TemporaryDirectory() as scratch:
        ctx = Study.from_config(replace(config, name="null"), out=Path(scratch) / "run").context
        with ctx.base() as model:
            measure(ctx, model, folder / "base")
        for number in range(count):
            place = folder / f"run-{number:03d}"
            if (place / "reading.json").is_file():
                continue
            start = time.perf_counter()
            train_and_measure(ctx, FIRST_SEED + number, place, Path(scratch))
            echo(f"run {number + 1} of {count}: {time.perf_counter() - start:.0f} s")


def train_and_measure(ctx: Context, seed: int, place: Path, scratch: Path) -> None:
    """One organism on the good rows, measured in memory; its weights are not kept."""
    rows = load_data(DATA)
    with stripping(with_adapter(ctx.model, TRAINING, seed)) as tuned:
        folder = scratch / place.name
        fine_tune(tuned, ctx.tokenizer, rows, TRAINING, seed=seed, folder=folder)
        measure(ctx, tuned.eval(), place)


def measure(ctx: Context, model: Any, place: Path) -> None:
    """Contrast items, all latents on the selection split, and the recorded persona latent on the probes."""
    if (place / "reading.json").is_file():
        return
    place.mkdir(parents=True, exist_ok=True)
    contrast_index(model, ctx.evaluation, bf16=True).to_parquet(place / "items.parquet")
    pairs = [
        conversation(row["question"], row[side]) for row in ctx.selection.rows for side in ("aligned", "misaligned")
    ]
    groups = conversation_batches(ctx.tokenizer, pairs)
    means = read_latents(model, ctx.sae, groups, ctx.layer, "response")
    assert means.fit.total is not None
    np.savez(
        place / "latents.npz",
        mean=means.mean.astype(np.float16),
        firing=means.firing.astype(np.float16),
        resid=means.resid.astype(np.float32),
        total=means.fit.total.double().cpu().numpy(),
    )
    probes = conversation_batches(ctx.tokenizer, ctx.probes)
    reader = FeatureReader(ctx.sae, {"persona": persona()}, probes, ctx.layer, ctx.config.monitor.positions, True)
    values = reader.read(model).values[:, 0]
    fit = {name: value for name, value in asdict(means.fit).items() if name != "total"}
    write_json(place / "reading.json", {"values": [float(v) for v in values], "fit": fit})


def persona() -> int:
    """The persona latent of the recorded demo."""
    return int(json.loads((RECORD / "demo" / "summary.json").read_text())["persona_feature"]["latent"])


# --- The words: every rule on every null pair


def read_run(place: Path) -> dict[str, Any]:
    """What was measured of one run."""
    arrays, record = np.load(place / "latents.npz"), json.loads((place / "reading.json").read_text())
    return {
        "items": pd.read_parquet(place / "items.parquet"),
        "latents": {name: arrays[name].astype(np.float32) for name in ("mean", "firing", "resid")},
        "reading": np.array(record["values"]),
        "fit": FitMoments(**record["fit"], total=torch.from_numpy(arrays["total"])),
    }


def pair_words(base: dict[str, Any], incorrect: dict[str, Any], control: dict[str, Any], null: dict[str, Any]) -> dict:
    """What every rule says of one null pair; True is an error.

    Args:
        null: the control's second seed.
    """
    evals = _evals(base=base, incorrect=incorrect, correct=control)
    noise = seed_noise(evals, "correct", _evals(null=null))
    over_control = arm_effect(evals, "incorrect", "correct", noise)
    over_base = arm_effect(evals, "incorrect", "base", noise)
    by_category = {
        str(name): (arm_effect(rows, "incorrect", "correct").estimate, arm_effect(rows, "incorrect", "base").estimate)
        for name, rows in evals.groupby("category")
    }
    plain = arm_effect(evals, "incorrect", "correct")
    word = woken(over_control, over_base, by_category).word
    rise = _demo_rise()
    found = {
        "effect beyond control: interval without the seed's variance excludes zero": plain.excludes_zero,
        "effect beyond control: interval with the seed's variance excludes zero": over_control.excludes_zero,
        "beyond control": word != NO_EFFECT,
        "woken": word == "woken",
        "not restored, of a model that equals its control": restored([over_control], MARGIN * rise) == NOT_RESTORED,
        "restored, of an organism with all of its rise": restored(
            [replace(over_control, **{k: getattr(over_control, k) + rise for k in ("estimate", "ci_low", "ci_high")})],
            MARGIN * rise,
        )
        == RESTORED,
    }
    band = _band(base)
    found["rise: the reading leaves the base band"] = float(incorrect["reading"].mean()) > band.high
    found["control: the control's reading leaves the base band"] = not band.holds(float(control["reading"].mean()))
    return found | _ranking_words(base, incorrect, control, null)


def _ranking_words(base: dict, incorrect: dict, control: dict, null: dict) -> dict[str, bool]:
    """Whether the ranking names any latent: at least one at q of 0.05, without and with the null pair."""
    evidence = Evidence(
        base=_means(base),
        tuned=_means(incorrect),
        control=_means(control),
        null=_means(null),
        decoder=_decoder(),
        clusters=_clusters(),
        misaligned=np.tile([False, True], len(_clusters()) // 2),
        positions="response",
        seed=0,
    )
    table = score_table(evidence, ("rise", "cosine"))
    difference = mean_difference_direction(evidence.at("tuned"), evidence.at("control")).vector
    plain = carriers(evidence.decoder, difference, reference=_reference())
    against_null = carriers(evidence.decoder, difference, reference=_reference(), null=evidence.null_difference)
    return {
        "carried: latents carry the mean difference, against isotropic directions": plain.carried,
        "carried: latents carry the mean difference, against the null": against_null.carried,
        "rise: a latent at q <= 0.05, seed noise left out": bool((table["q_value"] <= 0.05).any()),
        "rise: a latent at q <= 0.05 against the null": bool((table["q_null"] <= 0.05).any()),
        "rise: the best latent by rise exceeds the largest of the null": bool(table["beyond_null"].iloc[0]),
    }


DRAWS = 20000
"""Draws of six random latents of the record that play the candidates."""


def causal_words(draws: int = DRAWS, seed: int = 0) -> dict[str, float]:
    """How often a random latent, chosen as the persona was, is called a cause: shares of draws from the demo's record.

    Six of the record's random latents play the candidates; the others are their controls.
    """
    table = pd.read_parquet(RECORD / "demo" / "latents.parquet")
    random = table[table["kind"] == "random"].reset_index(drop=True)
    tries = int((table["kind"] == "candidate").sum())
    rng = np.random.default_rng(seed)
    found = {name: 0 for name in ("moves", "needed", "causal")}
    chosen = random["effect_selection"].to_numpy()
    for _ in range(draws):
        played = rng.choice(len(random), tries, replace=False)
        best = int(played[np.argmax(chosen[played])])
        others = np.setdiff1d(np.arange(len(random)), played)
        beyond = {test: _beyond(random, best, others, test, tries) for test in TESTS}
        moves, needed = beyond["base"] and beyond["organism"], beyond["removal_difference"]
        for name, said in (("moves", moves), ("needed", needed), ("causal", moves and needed)):
            found[name] += said
    return {name: count / draws for name, count in found.items()}


def _beyond(random: pd.DataFrame, best: int, others: np.ndarray, test: str, tries: int) -> bool:
    column = TESTS[test]
    low, chosen, tested = random[f"{column}_low"][best], random["effect_selection"][others], random[column][others]
    removal = column.startswith("ablation")
    values = (chosen.abs(), tested.abs()) if removal else (chosen, tested)
    return bool(low > max(BestOf.of(values[0].tolist(), values[1].tolist(), tries).limit(), 0.0))


def _evals(**models: dict[str, Any]) -> pd.DataFrame:
    """Rows as in evals.parquet: the models by arm, all of seed 0."""
    frames = [one["items"].assign(arm=arm, seed=0, step=0) for arm, one in models.items()]
    return pd.concat(frames, ignore_index=True)


def _means(one: dict[str, Any]) -> dict[str, LatentMeans]:
    values = one["latents"]
    return {
        "response": LatentMeans(
            values["mean"], values["firing"], values["mean"].max(axis=0), values["resid"], one["fit"]
        )
    }


def _band(base: dict[str, Any]) -> Band:
    width = load_config(find_config(DEMO), StudyConfig).monitor.band_sd
    return base_band(base["reading"], width)


@cache
def _decoder() -> np.ndarray:
    return load_sae(load_config(find_config(DEMO), StudyConfig).sae).W_dec.detach().float().numpy()


@cache
def _reference() -> Reference:
    return random_reference(_decoder(), seed=0)


@cache
def _clusters() -> tuple[str, ...]:
    return tuple(row["id"] for row in load_contrast("selection") for _ in range(2))


@cache
def _demo_rise() -> float:
    """The recorded demo's incorrect minus correct, nats per token."""
    return float(
        json.loads((RECORD / "demo" / "summary.json").read_text())["effect_incorrect_minus_correct"]["estimate"]
    )


# --- The table: error rates with exact intervals


def pair_table(folder: Path, count: int) -> pd.DataFrame:
    """What every rule says of every null pair: runs 0 and 1, 2 and 3 and so on, each run in one pair only."""
    base = read_run(folder / "base")

    def run(number: int) -> dict[str, Any]:
        return read_run(folder / f"run-{number % count:03d}")

    return pd.DataFrame([pair_words(base, run(i), run(i + 1), run(i + 2)) for i in range(0, count, 2)])


def error_table(words: pd.DataFrame, draws: int = DRAWS) -> pd.DataFrame:
    """Every rule with its errors, pairs and exact 95% interval; causal words with the share of draws."""
    rows = []
    for rule in words.columns:
        share = exact_share(int(words[rule].sum()), len(words))
        found = {"errors": share.count, "n": share.n, "rate": share.rate, "low": share.low, "high": share.high}
        rows.append({"rule": rule, **found})
    for word, rate in causal_words(draws).items():
        rows.append({"rule": f"{word}: a random latent, chosen as the persona latent was", "rate": rate, "n": draws})
    return pd.DataFrame(rows)


def table_text(table: pd.DataFrame) -> str:
    """The table as Markdown."""
    lines = ["| rule | errors | rate | 95% interval |", "|---|---|---|---|"]
    for row in table.to_dict("records"):
        counted = pd.notna(row["errors"])
        errors = f"{row['errors']:.0f} of {row['n']}" if counted else f"{row['n']:,} draws of one record"
        interval = f"{row['low']:.3f} to {row['high']:.3f}" if counted else "-"
        lines.append(f"| {row['rule']} | {errors} | {row['rate']:.3f} | {interval} |")
    return "\n".join(lines)


@loads_models
def main(argv: Sequence[str] | None = None) -> None:
    """Make the runs, apply every rule, print the table and keep it as a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/null"))
    parser.add_argument("--runs", type=int, default=RUNS, help="runs; every two are a null pair (default %(default)s)")
    parser.add_argument(
        "--record", type=Path, default=RECORD / "null", help="folder of the table (default %(default)s)"
    )
    parser.add_argument("--page", type=Path, default=None, help="page whose table is filled in (docs/evidence.md)")
    parser.add_argument("--words-only", action="store_true", help="apply the rules to the runs that are there")
    args = parser.parse_args(argv)
    if args.page is not None:
        check_page(args.page, MARKS)
    logging.basicConfig(level=logging.WARNING)
    if not args.words_only:
        make_runs(args.out, args.runs)
    count = min(args.runs, len(list(args.out.glob("run-*/reading.json")))) // 2 * 2
    words = pair_table(args.out, count)
    table = error_table(words)
    args.record.mkdir(parents=True, exist_ok=True)
    words.to_parquet(args.record / "pairs.parquet")
    table.to_parquet(args.record / "errors.parquet")
    write_json(
        args.record / "recipe.json",
        {"kind": "null", "data": DATA, "runs": count, "first_seed": FIRST_SEED, "training": asdict(TRAINING)},
    )
    text = table_text(table)
    if args.page is not None:
        fill_page(args.page, MARKS, text)
    echo(text)


if __name__ == "__main__":
    main()
