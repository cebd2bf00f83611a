"""The record of the monitor's study, evaluated again from its tables by the rules of this version.

python -m tools.monitor_record records/monitor-study docs/monitor-study.md
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from persona_probe.config import from_dict
from persona_probe.errors import InputError
from persona_probe.monitor.calibration import CalibratedRule, HeldRule
from persona_probe.monitor.study.labelled_config import MonitorStudy
from persona_probe.monitor.study.results import MARKS, evaluate, feature_signals, markdown
from persona_probe.report.records import LABELLED
from persona_probe.report.tables import check_page, fill_page
from persona_probe.runs import RunFolder
from persona_probe.stats import ExactRate, exact_share
from persona_probe.writing import json_values

logger = logging.getLogger(__name__)

KEPT = ("study", "model", "sae", "features", "seconds")


def evaluate_again(record: str | Path, page: str | Path) -> dict[str, Any]:
    """Write a record's results.json again and fill in the docs page; needs no model.

    The record of version 0.1.0 has no signals.parquet. The values of the watched features are in its readings.parquet;
    of the rivals (loss, weight norm, drift) it has AUROC, alarms and calibration, but no values. Theirs are kept. What
    needs the values is not given, except that a perfect AUROC stays perfect whichever data set is left out.

    Returns:
        What results.json holds.

    Raises:
        InputError: no labelled study, or a page without the marks.
    """
    folder = RunFolder(Path(record))
    if not folder.has("manifest.json") or folder.manifest.get("kind") != LABELLED:
        raise InputError(f"{record} is no record of a labelled study: `persona-probe monitor study` makes one")
    check_page(Path(page), MARKS)
    config, old = from_dict(MonitorStudy, folder.manifest["config"]), folder.read_json("results.json")
    has_signals = folder.has("signals.parquet")
    values = folder.read_table("signals.parquet" if has_signals else "readings.parquet")
    signals = values if has_signals else feature_signals(values)
    results = evaluate(config, folder.read_table("evals.parquet"), signals)
    known = results["signals"]
    like = next(iter(known.values()))  # every signal was read in the same runs at the same steps
    known |= {name: _kept(old, like, config) for name, old in old["signals"].items() if name not in known}
    results = json_values({**{key: old[key] for key in KEPT}, **results})
    folder.write_json("results.json", results)
    fill_page(Path(page), MARKS, markdown(results))
    return results


def _kept(old: dict[str, Any], like: Mapping[str, Any], config: MonitorStudy) -> dict[str, Any]:
    """The old results of a signal without values, with the data sets of a signal that has them."""
    return {
        "auroc": [_area(area, new) for area, new in zip(old["auroc"], like["auroc"], strict=True)],
        "auroc_own_end": _area(old["auroc_own_end"], like["auroc_own_end"]),
        "rules": [_rule(rule, config) for rule in old["rules"]],
    }


def _area(old: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    if any(old[name] != like[name] for name in ("step", "positives", "negatives")):
        raise InputError(f"{old['signal']!r} was read in other runs than {like['signal']!r}: make the study again")
    left_out = {name: None if area is None else old["auroc"] for name, area in like["left_out"].items()}
    area = {name: old[name] for name in ("signal", "step", "auroc", "against_quiet")}
    return {**like, **area, "low": None, "high": None, "left_out": left_out if old["auroc"] in (0, 1) else None}


def _rule(old: dict[str, Any], config: MonitorStudy) -> dict[str, Any]:
    """An old rule with the sentences of this version, from the statistics of its calibration runs."""
    if "calibration" not in old:
        return old
    values = old["calibration"]
    if values["unit"] != "run" or values["supported"] or values["runs_alarmed"]["count"]:
        raise InputError("a threshold is not the highest value of the record's benign runs: make the study again")
    rule, statistics = HeldRule(**values["rule"]), values["statistics"]
    calibration = CalibratedRule(
        **{name: values[name] for name in ("wanted", "unit", "threshold", "supported", "smallest_rate", "needed")},
        rule=rule,
        statistics=statistics,
        interval=None,
        runs_alarmed=ExactRate(**values["runs_alarmed"]),
        alarms=ExactRate(**values["alarms"]),
        sets_alarmed=exact_share(0, len({config.data_set(run) for run in statistics})),
        at_start=rule.held == 1 and not any(statistics.values()),  # at step 0 the drift is zero by definition
    )
    return {**old, "calibration": calibration.to_dict()}


def main(args: Sequence[str]) -> int:
    """`RECORD PAGE`; returns the exit code."""
    logging.basicConfig(format="%(message)s")
    if len(args) != 2:
        logger.error("give the record's folder and the page: records/monitor-study docs/monitor-study.md")
        return 2
    try:
        evaluate_again(*args)
    except InputError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
