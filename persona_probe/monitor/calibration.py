"""Thresholds from benign runs: how far a feature goes there, and what false-alarm rate a threshold then promises."""

import logging
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.lib.stride_tricks import sliding_window_view

from persona_probe.context import Context, pick_device
from persona_probe.errors import InputError, unknown
from persona_probe.finetune.organisms import induce_one
from persona_probe.monitor.history import History
from persona_probe.monitor.reading import FeatureReader
from persona_probe.monitor.sinks.files import read_events
from persona_probe.monitor.track import make_reader, reading_rows, study_features
from persona_probe.runs import RunFolder
from persona_probe.stats import Estimate, ExactRate, bootstrap_statistic, clopper_pearson, exact_share, per_100

log = logging.getLogger(__name__)

# --- The rule that is calibrated: a reading that stays beyond a level for some readings in a row

SIDES = ("above", "below", "both")
Series = Mapping[str, Float[np.ndarray, " readings"]]
"""Run to its readings in the order of their steps."""


@dataclass(frozen=True)
class HeldRule:
    """Alarm once a value has been beyond a threshold for `held` readings in a row.

    Values that are not finite are left out, as if that reading had not been taken.
    """

    held: int = 2
    side: str = "above"
    """`above`, `below`, or `both` (the absolute value)."""

    def __post_init__(self) -> None:
        if self.held < 1:
            raise InputError(f"held must be at least 1 reading, not {self.held}")
        if self.side not in SIDES:
            raise unknown("side", self.side, SIDES)

    def levels(self, values: Float[np.ndarray, " readings"]) -> Float[np.ndarray, " windows"]:
        """For each reading from the `held`-th on: the highest threshold at which the rule would be firing there."""
        oriented = {"above": values, "below": -values, "both": np.abs(values)}[self.side]
        finite = oriented[np.isfinite(oriented)]
        return sliding_window_view(finite, self.held).min(axis=1) if len(finite) >= self.held else np.empty(0)

    def statistic(self, values: Float[np.ndarray, " readings"]) -> float:
        """The run's number: at every threshold below it the rule fires somewhere; -inf if the run is too short."""
        return float(self.levels(values).max(initial=-np.inf))

    def can_fire(self, values: Float[np.ndarray, " readings"]) -> bool:
        """Whether there are enough finite readings for the rule."""
        return int(np.isfinite(values).sum()) >= self.held

    def alarms(self, values: Float[np.ndarray, " readings"], threshold: float) -> Int[np.ndarray, " alarms"]:
        """Positions in `values` at which an alarm goes off: once for each excursion beyond the threshold."""
        firing = self.levels(values) > threshold
        started = firing & ~np.concatenate([[False], firing[:-1]]) if len(firing) else firing
        return np.flatnonzero(np.isfinite(values))[self.held - 1 :][started]


def series_of(
    readings: pd.DataFrame, name: str, kind: str = "feature", column: str = "shift"
) -> dict[str, Float[np.ndarray, " readings"]]:
    """One feature (or signal) of a frame with columns run, step, `kind` and `column`: by run, in the order of steps.

    The first reading, of the base model itself, is included: a monitor's rule sees it too.

    Raises:
        InputError: a name that the frame does not hold.
    """
    known = readings[kind].unique().tolist()
    if name not in known:
        raise unknown(kind, name, known)
    rows = readings[readings[kind] == name].sort_values("step")
    return {str(run): part[column].to_numpy(float) for run, part in rows.groupby("run", sort=True)}


def measured_series(paths: Sequence[str | Path], name: str) -> dict[str, Float[np.ndarray, " readings"]]:
    """One measurement of monitored runs: file to its values, in the order of their steps.

    Of a run that was resumed, each step counts once.

    Args:
        paths: event files (`FeatureMonitor(path=...)`), one for each run.
        name: of the measurement's events.

    Raises:
        InputError: no such file, a damaged one, the same file twice, or a run without the measurement.
    """
    series = dict[str, Float[np.ndarray, " readings"]]()
    for path in paths:
        measured = History(sys.maxsize).add(read_events(path)).behaviours
        if name not in measured:
            raise unknown(f"measurement of {path}", name, measured)
        if str(path) in series:
            raise InputError(f"{path} is given twice: each run counts once")
        series[str(path)] = np.array([event.value for event in measured[name]], dtype=np.float64)
    return series


# --- A calibrated rule: its threshold, the interval of that, and what it promises


@dataclass(frozen=True)
class CalibratedRule:
    """A rule with its threshold, and what benign runs say about its false alarms."""

    rule: HeldRule
    wanted: float
    """False alarms per `unit`."""
    unit: str
    """`run` or `100 readings`."""
    statistics: dict[str, float]
    """Run to the highest level that the rule's value held in it."""
    threshold: float
    """The calibrated threshold; where there is too little to promise the wanted rate, the highest statistic."""
    supported: bool
    """Whether the runs are enough for the wanted rate."""
    smallest_rate: float
    """The smallest rate that this many runs can promise."""
    needed: int
    """Runs (or readings) that the wanted rate needs."""
    interval: Estimate | None
    """The threshold with its 95% bootstrap interval over runs. None where the interval would be a point, or would end
    at the highest value of all runs, beyond which no bootstrap can go; `rate_bound` is what is known there."""
    runs_alarmed: ExactRate
    """Runs that alarm at the threshold, with the exact interval of the true rate.

    A threshold per run is one of these runs' own statistics, and the interval holds all the same: the chance of
    exceeding the k-th smallest of n is Beta(n + 1 - k, k) distributed (Wilks 1941), which this interval covers.
    """
    alarms: ExactRate
    """Alarms per 100 readings at the threshold, with the exact Poisson interval."""
    sets_alarmed: ExactRate | None = None
    """Data sets of which a run alarms, out of all; None where it is not known which run is of which."""
    at_start: bool = False
    """Whether the threshold is the value of the first reading, before any step: no benign run alarms beyond it."""

    @property
    def n_runs(self) -> int:
        """Benign runs."""
        return len(self.statistics)

    @property
    def rate_bound(self) -> float:
        """The share of further runs that alarm is at most this: exact, 95% confidence, runs taken as independent."""
        return _upper(self.runs_alarmed)

    @property
    def finding(self) -> str:
        """The threshold and its false alarms, in one sentence."""
        alarms = self.alarms
        rate = (
            f"at most {self.rate_bound:.0%} of further runs will (exact, 95% confidence{self._nested})"
            if self.unit == "run"
            else f"{alarms.rate:.1f} alarms per 100 readings ({alarms.low:.1f} to {alarms.high:.1f})"
        )
        return f"threshold {self.threshold + 0.0:.3g} ({self._origin}): {self.runs_alarmed} benign runs alarm, {rate}"

    @property
    def _origin(self) -> str:
        """What the threshold is, or its interval where it has one."""
        if self.interval is not None:
            return f"95% interval over runs {self.interval.ci_low:.3g} to {self.interval.ci_high:.3g}"
        if self.at_start:
            return (
                f"the value before training, beyond which no benign run {'went' if self.rule.held == 1 else 'stayed'}"
            )
        place = 1 + sum(value > self.threshold for value in self.statistics.values())
        return f"{'the highest' if place == 1 else f'number {place} from above'} of {self.n_runs} benign runs"

    @property
    def _nested(self) -> str:
        """The bound where runs of one data set go together."""
        sets = self.sets_alarmed
        if sets is None or sets.n == self.n_runs:
            return ""
        if sets.n == 1:
            return ", on the same data set"
        return f"; {_upper(sets):.0%} if the runs of each of the {sets.n} data sets go together"

    @property
    def shortfall(self) -> str:
        """What the rate would need; empty where the runs are enough."""
        if self.supported:
            return ""
        aim = f"{self.wanted:g} false alarms per {self.unit}: that needs {self.needed}"
        if self.unit == "run":
            lack = f"{self.n_runs} benign runs cannot promise {aim}"
        else:
            lack = f"{self.alarms.n} readings of benign runs cannot show {aim}"
        return (
            f"{lack}; the least for these is {self.smallest_rate:.2g}. Used instead, the highest value in a benign run"
        )

    @property
    def statement(self) -> str:
        """The finding, after the shortfall where there is one."""
        return self.finding if self.supported else f"{self.shortfall}: {self.finding}"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, the sentences included."""
        sentences = {"shortfall": self.shortfall, "finding": self.finding, "statement": self.statement}
        return {**asdict(self), "n_runs": self.n_runs, "rate_bound": self.rate_bound, **sentences}


def _upper(share: ExactRate) -> float:
    return clopper_pearson(share.count, share.n, 0.9)[1]  # a one-sided 95% bound is the end of a 90% interval


UNITS = ("run", "100 readings")
ROUNDING = 1e-9
Runs = list[Float[np.ndarray, " readings"]]


def conformal_rank(n: int, rate: float) -> int:
    """ceil((n + 1)(1 - rate)): which of n ordered statistics is the threshold; above n, there is none."""
    return ceil((n + 1) * (1 - rate) - ROUNDING)


def conformal_threshold(statistics: Float[np.ndarray, " runs"], rate: float) -> float:
    """The conformal quantile; the largest statistic where they are too few for the rate."""
    n = len(statistics)
    return float(np.sort(statistics)[min(conformal_rank(n, rate), n) - 1])


def calibrate(
    series: Series, rule: HeldRule, rate: float, unit: str = "run", sets: Mapping[str, str] | None = None
) -> CalibratedRule:
    """The threshold at which the rule alarms on at most the wanted share of benign runs like these.

    Per run it is the split conformal quantile (Vovk et al. 2005; Papadopoulos et al. 2002): of n statistics the
    ceil((n + 1)(1 - rate))-th smallest. A new run that is exchangeable with these exceeds it with probability at most
    `rate`, whatever the distribution. Per 100 readings it is the lowest threshold from which on the benign runs stay
    within the rate: a count, not a promise, and its interval is that of the count.

    Nothing is extrapolated: with too few runs for the wanted rate, `supported` is False and the threshold is the
    highest statistic seen, which promises 1 / (n + 1).

    Args:
        sets: run to the data set that it is trained on. Runs of one data set are not independent: with it, the finding
            also says what bound the data sets alone support.

    Raises:
        InputError: fewer than two runs, a run too short for the rule, an unknown unit or a rate outside its range.
    """
    _check(series, rule, rate, unit)
    runs = list(series.values())
    threshold = _threshold(runs, rule, rate, unit)
    alarms = [len(rule.alarms(values, threshold)) for values in runs]
    n, readings = len(runs), _readings(runs)
    have, needed, smallest = (
        (n, ceil(1 / rate - 1 - ROUNDING), 1 / (n + 1))
        if unit == "run"
        else (readings, ceil(100 / rate - ROUNDING), 100 / readings)
    )
    statistics = {run: rule.statistic(values) for run, values in series.items()}
    alarmed = {run for run, count in zip(series, alarms, strict=True) if count}
    return CalibratedRule(
        rule=rule,
        wanted=rate,
        unit=unit,
        statistics=statistics,
        threshold=threshold,
        supported=have >= needed,
        smallest_rate=smallest,
        needed=needed,
        interval=_interval(runs, rule, rate, unit),
        runs_alarmed=exact_share(len(alarmed), n),
        alarms=per_100(sum(alarms), readings),
        sets_alarmed=_sets_alarmed(alarmed, series, sets),
        at_start=not alarmed and _all_start_at(runs, rule, threshold),
    )


def _sets_alarmed(alarmed: Set[str], series: Series, sets: Mapping[str, str] | None) -> ExactRate | None:
    if sets is None:
        return None
    return exact_share(len({sets[run] for run in alarmed}), len({sets[run] for run in series}))


def _all_start_at(runs: Runs, rule: HeldRule, threshold: float) -> bool:
    """Whether the threshold is the first reading of every run."""
    return all(HeldRule(1, rule.side).levels(values)[0] == threshold for values in runs)


def _threshold(runs: Runs, rule: HeldRule, rate: float, unit: str) -> float:
    if unit == "run":
        return conformal_threshold(np.array([rule.statistic(values) for values in runs]), rate)
    return _threshold_per_100(runs, rule, rate)


def _interval(runs: Runs, rule: HeldRule, rate: float, unit: str) -> Estimate | None:
    """The threshold again on runs drawn with replacement; None where that can show no end above, or no width."""
    statistics = [rule.statistic(values) for values in runs]
    if unit == "run":
        found = bootstrap_statistic(statistics, lambda sample: conformal_threshold(sample, rate))
    else:
        places = list(range(len(runs)))
        found = bootstrap_statistic(
            places, lambda sample: _threshold_per_100([runs[int(i)] for i in sample], rule, rate), n_boot=200
        )
    return found if found.ci_low < found.ci_high < max(statistics) else None


def _readings(runs: Runs) -> int:
    return sum(int(np.isfinite(values).sum()) for values in runs)


def _threshold_per_100(runs: Runs, rule: HeldRule, rate: float) -> float:
    """Lowest level from which on all levels give at most `rate` alarms per 100 readings.

    The count is not monotone: a lower threshold can join two excursions into one. So the search goes from above.
    """
    allowed = (rate + ROUNDING) * _readings(runs) / 100
    levels = np.unique(np.concatenate([rule.levels(values) for values in runs]))[::-1]
    within = [sum(len(rule.alarms(values, float(level))) for values in runs) <= allowed for level in levels]
    return float(levels[within.index(False) - 1 if False in within else -1])


def _check(series: Series, rule: HeldRule, rate: float, unit: str) -> None:
    if unit not in UNITS:
        raise InputError(f"unknown unit {unit!r}: write 'run' or '100 readings'")
    top = 1 if unit == "run" else 100
    if not 0 < rate < top:
        raise InputError(f"the wanted false-alarm rate per {unit} must lie between 0 and {top}, not {rate}")
    if len(series) < 2:
        raise InputError(f"{len(series)} benign runs: a threshold needs at least two; give more --seeds")
    if reason := unreadable(series, rule):
        raise InputError(reason)


def unreadable(series: Series, rule: HeldRule) -> str | None:
    """Why a rule cannot be calibrated on these runs, or None where it can."""
    if not any(np.isfinite(values).any() for values in series.values()):
        return "nothing was read that could be compared: the feature does not vary on the base model's probes"
    short = [run for run, values in series.items() if not rule.can_fire(values)]
    return f"run {short[0]!r} has fewer than {rule.held} readings: read more often, or lower held" if short else None


# --- Benign runs for a located study: its correct arms over new seeds, read at every checkpoint


def calibration_study(source: Context, out: Path | None = None, device: str | None = None) -> Context:
    """The run folder of the benign runs (default: `<run>-calibration`), of the same config as the located study's.

    Raises:
        InputError: the device is not available, or the folder is the study itself or holds another run.
    """
    device, path = pick_device(device or source.config.device), source.run.path  # first: a bad device makes no folder
    folder = path.with_name(f"{path.name}-calibration") if out is None else out
    if folder.resolve() == path.resolve():
        raise InputError(f"{folder} is the located study itself: choose another --out")
    return Context(RunFolder.create(folder, source.config), device)


def benign_readings(
    source: Context, benign: Context, seeds: Sequence[int], arms: Sequence[str] = ("correct",)
) -> pd.DataFrame:
    """Train and read benign arms. Finished runs in the folder are kept, so more seeds can follow later.

    Args:
        source: a located study: its features are read.
        benign: where the runs go, see `calibration_study`.
        seeds: none that the source used, since its control arm helped to choose the features.
        arms: benign arms of the config.

    Returns:
        Columns run, step, feature, shift, data (the data set) and those of readings.parquet; one run for each arm and
        seed.

    Raises:
        InputError: an unknown or bad arm, a seed of the source, or locate has not run.
    """
    _check_benign(source, seeds, arms)
    features = study_features(source)  # first: its error names the stage to run
    ctx, run = benign, benign.run
    with run.writing():
        for arm in arms:
            for seed in seeds:
                if not run.has(f"arms/{arm}-s{seed}"):
                    with ctx.run.timed("calibrate"):
                        induce_one(ctx, arm, seed)
        if missing := [(a, s) for a in arms for s in seeds if not run.has(_part(a, s))]:
            reader = make_reader(ctx, features)
            with ctx.run.timed("calibrate"):
                _read(benign, reader, missing)
    frame = pd.concat([run.read_table(_part(a, s)) for a in arms for s in seeds], ignore_index=True)
    frame["shift"] = (frame["mean"] - frame["base_mean"]) / frame["base_sd"].where(frame["base_sd"] > 0)
    data = {arm: source.config.arms[arm].data or arm for arm in arms}
    return frame.assign(run=frame["arm"] + "-s" + frame["seed"].astype(str), data=frame["arm"].map(data))


def _read(benign: Context, reader: FeatureReader, missing: Sequence[tuple[str, int]]) -> None:
    base = reader.read(benign.model)
    for arm, seed in missing:
        log.info("reading %s, seed %d", arm, seed)
        rows = [reading_rows(base, base, arm, seed, 0)]
        for step in benign.run.steps(arm, seed):
            with benign.organism(arm, seed, step) as model:
                rows.append(reading_rows(reader.read(model), base, arm, seed, step))
        benign.run.write_table(_part(arm, seed), pd.concat(rows))


def _part(arm: str, seed: int) -> str:
    return f"parts/calibrate-{arm}-s{seed}.readings.parquet"


def _check_benign(source: Context, seeds: Sequence[int], arms: Sequence[str]) -> None:
    for arm in arms:
        if arm not in source.config.arms:
            raise unknown("arm", arm, source.config.arms)
        if arm in ("incorrect", source.config.realign.start):
            raise InputError(f"arm {arm!r} is not benign: thresholds come from benign runs")
    overlap = set(seeds) & set(source.config.seeds)
    if overlap:
        raise InputError(f"seed {min(overlap)} helped to choose the features: calibrate on other seeds")


def calibration_record(
    readings: pd.DataFrame, features: Sequence[str] | None, rule: HeldRule, rate: float, unit: str
) -> dict[str, Any]:
    """Thresholds of features (None: all that were read) as plain JSON values, with the steps that were read."""
    names = list(dict.fromkeys(readings["feature"])) if features is None else features
    sets = dict(zip(readings["run"], readings["data"], strict=True)) if "data" in readings else None
    records = {name: _calibrated(series_of(readings, name), rule, rate, unit, sets) for name in names}
    steps = sorted(int(step) for step in readings.loc[readings["step"] > 0, "step"].unique())
    return {"value": "shift from the base, in base standard deviations", "steps": steps, "features": records}


def _calibrated(
    series: Series, rule: HeldRule, rate: float, unit: str, sets: Mapping[str, str] | None
) -> dict[str, Any]:
    """The record of one feature. One that is silent on the probes gets none, and the others still get theirs."""
    if len(series) > 1 and (reason := unreadable(series, rule)):
        return {"threshold": None, "statement": f"no threshold: {reason}"}
    return calibrate(series, rule, rate, unit, sets).to_dict()
