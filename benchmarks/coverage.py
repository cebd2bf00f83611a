"""`make coverage`: how often the package's intervals hold the truth and its tests reject a true null, on made-up data.

Every case draws data whose truth is known, calls the function that prints the number, and counts. The data is kind:
normal or beta distributed, independent between questions and runs where the text says nothing else. Real data is not
made so, which is why each row says what its interval does not cover.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

from persona_probe.cli.options import echo
from persona_probe.evaluate.effects import arm_effect, seed_noise
from persona_probe.evaluate.rates import Cells, share
from persona_probe.monitor.study.auroc_by_set import auroc_by_set
from persona_probe.report.tables import Table, check_page, fill_page
from persona_probe.stats import (
    benjamini_hochberg,
    bootstrap_mean,
    clustered_p_values,
    exact_share,
    per_100,
)
from persona_probe.verdicts import monte_carlo_p

MARKS = ("<!-- coverage: begin -->", "<!-- coverage: end -->")
TRIALS = 1000
QUESTIONS = 60
Trial = Callable[[np.random.Generator], bool]
"""One draw: whether the interval holds the truth; of a test, whether it rejects."""


@dataclass(frozen=True)
class Case:
    """An interval or a test, on one kind of made-up data."""

    name: str
    estimand: str
    unit: str
    """What is resampled, or counted as independent."""
    leaves_out: str
    """What the interval does not cover."""
    data: str
    """The made-up data."""
    trial: Trial
    nominal: float = 0.95
    """Share that should hold the truth; of a test, the largest share that may reject."""
    trials: int = TRIALS


# --- One draw of each kind


def _mean(n: int, skewed: bool = False) -> Trial:
    def trial(rng: np.random.Generator) -> bool:
        values = rng.exponential(size=n) - 1 if skewed else rng.normal(size=n)
        found = bootstrap_mean(values, seed=int(rng.integers(2**31)))
        return found.ci_low <= 0 <= found.ci_high

    return trial


def _difference(run_sd: float, noise: bool, seeds: int = 1) -> Trial:
    """Two arms of one truth: question effects of 0.45 nats per token in their difference, 0.15 of noise an item."""

    def trial(rng: np.random.Generator) -> bool:
        def run(own: np.ndarray) -> np.ndarray:
            return own + rng.normal(0, run_sd) + rng.normal(0, 0.15, QUESTIONS)

        effect, none = rng.normal(0, 0.45, QUESTIONS), np.zeros(QUESTIONS)
        drawn = [(arm, seed, run(own)) for arm, own in (("left", effect), ("right", none)) for seed in range(seeds)]
        evals = pd.concat([_items(arm, seed, values) for arm, seed, values in drawn], ignore_index=True)
        found = arm_effect(
            evals, "left", "right", seed_noise(evals, "right", _items("null", 9, run(none))) if noise else None
        )
        return found.ci_low <= 0 <= found.ci_high

    return trial


def _items(arm: str, seed: int, values: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"arm": arm, "seed": seed, "step": 1, "item": np.arange(len(values)), "value": values})


def _rate(questions: int, samples: int, truth: float, together: float) -> Trial:
    """Questions' own rates are beta distributed; `together` is the correlation of two answers to one question."""
    size = 1 / together - 1

    def trial(rng: np.random.Generator) -> bool:
        own = rng.beta(truth * size, (1 - truth) * size, questions)
        values = (rng.random((questions, samples)) < own[:, None]).astype(float).ravel()
        names = np.repeat(np.arange(questions), samples).tolist()
        found = share(Cells.of(values.tolist(), names, [0] * len(names)), seed=int(rng.integers(2**31)))
        return found is not None and found.ci_low <= truth <= found.ci_high

    return trial


def _auroc(bad: Sequence[int], good: Sequence[int], together: float, truth: float = 0.76) -> Trial:
    """Runs by data set: a run's value is its data set's plus its own; `together` is the former's share of the variance.

    `bad` and `good` are the runs of each data set. The truth is the AUROC of one run of each kind on new data sets.
    """
    names = [
        [f"{kind} {n}" for n, size in enumerate(sizes) for _ in range(size)] for kind, sizes in enumerate((bad, good))
    ]
    apart = 2**0.5 * float(norm.ppf(truth))

    def trial(rng: np.random.Generator) -> bool:
        sides = []
        for sizes, shift in ((bad, apart), (good, 0.0)):
            sets = np.repeat(rng.normal(0, together**0.5, len(sizes)), sizes)
            sides.append(shift + sets + rng.normal(0, (1 - together) ** 0.5, sum(sizes)))
        found = auroc_by_set(*sides, *names)
        return found.low <= truth <= found.high

    return trial


def _exact(n: int, truth: float) -> Trial:
    def trial(rng: np.random.Generator) -> bool:
        found = exact_share(int(rng.binomial(n, truth)), n)
        return found.low <= truth <= found.high

    return trial


def _alarms(readings: int, truth: float) -> Trial:
    def trial(rng: np.random.Generator) -> bool:
        found = per_100(int(rng.poisson(truth * readings / 100)), readings)
        return found.low <= truth <= found.high

    return trial


def _monte_carlo(rng: np.random.Generator) -> bool:
    values = rng.standard_t(3, 65)
    return monte_carlo_p(float(values[0]), values[1:].tolist()) <= 0.05


def _discovery(clusters: int) -> Trial:
    """200 latents without any change: sparse, skewed, three items a question. Any discovery is a false one."""

    def trial(rng: np.random.Generator) -> bool:
        fires = rng.random((2, clusters, 1, 200)) < 0.4
        values = fires * rng.exponential(size=fires.shape) + 0.1 * rng.random((2, clusters, 3, 200))
        arms = values.reshape(2, clusters * 3, 200)
        names = np.repeat(np.arange(clusters), 3).tolist()
        return bool((benjamini_hochberg(clustered_p_values(arms[0] - arms[1], names)) <= 0.05).any())

    return trial


# --- All cases

_INDEX = ("contrast index, or difference of two arms", "mean over questions like these", "question")
_SEEDED = (
    "difference of two arms, with the noise between seeds",
    "mean over questions and over runs",
    "question and run",
)
_RATE = ("misalignment rate", "share of answers, over questions like these", "question; seed where there are several")
_AUC = (
    "AUROC over runs, 3 data sets or more on a side",
    "chance that a bad run is above a benign one, on new data sets",
    "data set",
    "data sets unlike these; other models",
)
_RUN, _SET = "another seed of the training", "other question sets; the judge's errors"

CASES = (
    Case(*_INDEX, _RUN, "60 questions, normal", _mean(60)),
    Case(*_INDEX, _RUN, "60 questions, skewed", _mean(60, True)),
    Case(*_INDEX, _RUN, "runs differ by 0.1 (sd)", _difference(0.1, False), trials=400),
    *(
        Case(
            *_SEEDED,
            "other data sets and models",
            f"null pair, runs differ by {sd:g} (sd)",
            _difference(sd, True),
            trials=400,
        )
        for sd in (0.0, 0.03, 0.1)
    ),
    Case(*_SEEDED, "other data sets and models", "3 seeds an arm, 0.1 (sd)", _difference(0.1, True, 3), trials=400),
    Case("mean over few items", "mean over items like these", "item", _RUN, "8 items, normal", _mean(8)),
    Case("mean over few items", "mean over items like these", "item", _RUN, "10 items, normal", _mean(10)),
    Case("mean over few items", "mean over items like these", "item", _RUN, "10 items, skewed", _mean(10, True)),
    *(
        Case(*_RATE, _SET, f"{q} questions, {n} answers each, {truth:.0%}, intraclass {own}", _rate(q, n, truth, own))
        for q, n, own, truths in (
            (8, 50, 0.2, (0.02, 0.05, 0.1, 0.4)),
            (8, 50, 0.5, (0.02, 0.1, 0.2)),
            (20, 10, 0.2, (0.05,)),
            (108, 2, 0.2, (0.02, 0.1, 0.4)),
        )
        for truth in truths
    ),
    Case(*_AUC, "4 against 9 data sets of one run, AUROC 0.76", _auroc([1] * 4, [1] * 9, 0.0)),
    *(
        Case(*_AUC, f"3 against 4 of 3 runs, {shared:g} shared, AUROC {area:g}", _auroc([3] * 3, [3] * 4, shared, area))
        for shared, area in ((0.0, 0.76), (0.5, 0.76), (0.8, 0.76), (0.8, 0.95))
    ),
    Case(*_AUC, "3 of 5, 1 and 1 runs against 4 of 3, 0.8 shared, AUROC 0.76", _auroc([5, 1, 1], [3] * 4, 0.8)),
    Case(
        "share of runs", "chance of one more run", "run", "runs that are not like these", "3 runs, 30%", _exact(3, 0.3)
    ),
    Case(
        "share of runs",
        "chance of one more run",
        "run",
        "runs that are not like these",
        "40 runs, 5%",
        _exact(40, 0.05),
    ),
    Case(
        "alarms per 100 readings",
        "rate over readings",
        "alarm",
        "alarms that come in clusters",
        "120 readings, 2",
        _alarms(120, 2.0),
    ),
    Case(
        "Monte Carlo p, at most 0.05",
        "exchangeable with 64 controls",
        "latent",
        "controls unlike the latent",
        "heavy tails",
        _monte_carlo,
        0.05,
        4000,
    ),
    *(
        Case(
            "clustered t and Benjamini-Hochberg, q at most 0.05",
            "no latent changed",
            "question",
            _RUN,
            f"{n} questions, 200 latents",
            _discovery(n),
            0.05,
            400,
        )
        for n in (20, 60)
    ),
)


def measure(cases: Sequence[Case] = CASES, seed: int = 0, share_of_trials: float = 1.0) -> pd.DataFrame:
    """One row a case: its words, nominal, measured with the exact interval of the count, trials, seconds."""
    rows = []
    for number, case in enumerate(cases):
        rng, start = np.random.default_rng([seed, number]), time.perf_counter()
        trials = max(1, round(case.trials * share_of_trials))
        found = exact_share(sum(case.trial(rng) for _ in range(trials)), trials)
        words = {name: getattr(case, name) for name in ("name", "estimand", "unit", "leaves_out", "data", "nominal")}
        numbers = {"measured": found.rate, "ci_low": found.low, "ci_high": found.high, "trials": trials}
        rows.append({**words, **numbers, "seconds": round(time.perf_counter() - start, 2)})
    return pd.DataFrame(rows)


def table_of(frame: pd.DataFrame) -> Table:
    """The frame as words."""
    head = ("interval or test", "estimand", "unit", "not covered", "made-up data", "nominal", "measured")
    rows = [
        (
            *(str(row[name]) for name in ("name", "estimand", "unit", "leaves_out", "data")),
            f"{row['nominal']:.0%}",
            f"{row['measured']:.1%} ({row['ci_low']:.1%} to {row['ci_high']:.1%})",
        )
        for row in frame.to_dict("records")
    ]
    return Table(head, rows)


def main() -> None:
    """Measure, print, write the record, and fill the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("records/coverage"))
    parser.add_argument("--page", type=Path, help="Markdown page whose table is filled in")
    options = parser.parse_args()
    if options.page:
        check_page(options.page, MARKS)
    frame = measure(seed=options.seed)
    table = table_of(frame)
    echo(table.markdown())
    options.out.mkdir(parents=True, exist_ok=True)
    frame.drop(columns="seconds").to_parquet(options.out / "coverage.parquet")
    echo(f"{frame['seconds'].sum():.0f} seconds, {len(frame)} cases")
    if options.page:
        fill_page(options.page, MARKS, table.markdown())


if __name__ == "__main__":
    main()
