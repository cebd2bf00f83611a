"""Figures: pure functions of a run folder's records, and the registry that the CLI and the report use."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from persona_probe.errors import unknown
from persona_probe.report.figures import alarms as _alarms
from persona_probe.report.figures import arms as _arms
from persona_probe.report.figures import bad_share as _bad_share
from persona_probe.report.figures import categories as _categories
from persona_probe.report.figures import coherence as _coherence
from persona_probe.report.figures import controls as _controls
from persona_probe.report.figures import domains as _domains
from persona_probe.report.figures import dose_response as _dose_response
from persona_probe.report.figures import doses as _doses
from persona_probe.report.figures import judge_agreement as _judge_agreement
from persona_probe.report.figures import latents as _latents
from persona_probe.report.figures import lengths as _lengths
from persona_probe.report.figures import mitigations as _mitigations
from persona_probe.report.figures import model_size as _size
from persona_probe.report.figures import passages as _passages
from persona_probe.report.figures import planted_truth as _planted
from persona_probe.report.figures import ranker_agreement as _rankers
from persona_probe.report.figures import rates as _rates
from persona_probe.report.figures import realignment as _realignment
from persona_probe.report.figures import recovery as _recovery
from persona_probe.report.figures import screening_calibration as _screening
from persona_probe.report.figures import separation as _separation
from persona_probe.report.figures import stress as _stress
from persona_probe.report.figures import trajectory as _trajectory
from persona_probe.report.figures.alarms import alarms
from persona_probe.report.figures.arms import arms
from persona_probe.report.figures.bad_share import early_detection, score_share
from persona_probe.report.figures.categories import categories
from persona_probe.report.figures.coherence import coherence
from persona_probe.report.figures.controls import controls
from persona_probe.report.figures.domains import domains
from persona_probe.report.figures.dose_response import dose_response
from persona_probe.report.figures.judge_agreement import judge_agreement
from persona_probe.report.figures.latents import latents
from persona_probe.report.figures.lengths import lengths
from persona_probe.report.figures.mitigations import pareto as mitigation_pareto
from persona_probe.report.figures.model_size import model_size
from persona_probe.report.figures.passages import passages
from persona_probe.report.figures.planted_truth import planted_truth
from persona_probe.report.figures.ranker_agreement import ranker_agreement
from persona_probe.report.figures.rates import rates
from persona_probe.report.figures.realignment import realignment
from persona_probe.report.figures.recovery import recovery
from persona_probe.report.figures.screening_calibration import screening_calibration
from persona_probe.report.figures.separation import separation
from persona_probe.report.figures.trajectory import trajectory
from persona_probe.report.records import Records
from persona_probe.report.theme import for_print

# --- What the registry knows of a figure


@dataclass(frozen=True)
class FigureSpec:
    """One figure: a pure function of records, and the numbers that it draws."""

    name: str
    """File name and anchor."""
    title: str
    """Heading."""
    data: Callable[[Records], pd.DataFrame]
    """The numbers that it draws; empty when its stage has not run."""
    draw: Callable[[Records], Any]
    """The plotly figure (whose traces no type checker can follow); its caption is `fig.layout.meta["caption"]`."""
    missing: str
    """What to say when there is nothing to draw."""
    paper: str = "new"
    """Number of the figure of Wang et al. (2025, arXiv 2506.19823) that it answers to."""


_SPECS = (
    FigureSpec("arms", "Contrast index by arm", _arms.arms_data, _arms.arms, _arms.MISSING, "2"),
    FigureSpec(
        "trajectory",
        "What rises during training",
        _trajectory.trajectory_data,
        _trajectory.trajectory,
        _trajectory.MISSING,
    ),
    FigureSpec(
        "dose_response",
        "Steering, up and down",
        _dose_response.dose_response_data,
        _dose_response.dose_response,
        _dose_response.MISSING,
        "8",
    ),
    FigureSpec(
        "realignment",
        "What a corrective fine-tune undoes",
        _realignment.realignment_data,
        _realignment.realignment,
        _realignment.MISSING,
        "16",
    ),
    FigureSpec(
        "latents", "Causal effect of the top latents", _latents.latents_data, _latents.latents, _latents.MISSING, "9"
    ),
    FigureSpec(
        "categories",
        "Contrast index by category",
        _categories.categories_data,
        _categories.categories,
        _categories.MISSING,
        "13",
    ),
    FigureSpec(
        "controls", "The feature beside its controls", _controls.controls_data, _controls.controls, _controls.MISSING
    ),
)
_JUDGED_SPECS = (
    FigureSpec("rates", "Misalignment rate by arm and question", _rates.rates_data, _rates.rates, _rates.MISSING, "2"),
    FigureSpec(
        "coherence", "Alignment and coherence", _coherence.coherence_data, _coherence.coherence, _coherence.MISSING
    ),
    FigureSpec(
        "judge_agreement",
        "Where judges agree",
        _judge_agreement.judge_agreement_data,
        _judge_agreement.judge_agreement,
        _judge_agreement.MISSING,
    ),
)
_MORE_SPECS = (
    FigureSpec(
        "separation",
        "Score against reading",
        _separation.separation_data,
        _separation.separation,
        _separation.MISSING,
        "9",
    ),
    FigureSpec(
        "passages",
        "Passages on which latents fire most",
        _passages.passages_data,
        _passages.passages,
        _passages.MISSING,
        "10 to 12",
    ),
    FigureSpec(
        "ranker_agreement",
        "Where rankers agree",
        _rankers.ranker_agreement_data,
        _rankers.ranker_agreement,
        _rankers.MISSING,
    ),
    FigureSpec(
        "recovery",
        "Feature and behaviour on one time axis",
        _recovery.recovery_data,
        _recovery.recovery,
        _recovery.MISSING,
        "16",
    ),
    FigureSpec("lengths", "How long answers are", _lengths.lengths_data, _lengths.lengths, _lengths.MISSING),
    FigureSpec(
        "doses",
        "How many corrective rows are enough",
        lambda r: _doses.doses_data(r.doses),
        lambda r: _doses.doses(r.doses),
        _doses.MISSING,
    ),
    FigureSpec(
        "stress",
        "What a repair withstands",
        lambda r: _stress.stress_data(r.stress),
        lambda r: _stress.stress(r.stress),
        _stress.MISSING,
    ),
)
_COLLECTION_SPECS = (
    FigureSpec("domains", "Score by domain", _domains.domains_data, _domains.domains, _domains.MISSING, "2"),
    FigureSpec("model_size", "Score by model size", _size.model_size_data, _size.model_size, _size.MISSING, "4"),
    FigureSpec(
        "score_share",
        "Score against share of bad data",
        _bad_share.score_share_data,
        _bad_share.score_share,
        _bad_share.MISSING,
        "14",
    ),
    FigureSpec(
        "early_detection",
        "Feature and score against share of bad data",
        _bad_share.bad_share_data,
        _bad_share.early_detection,
        _bad_share.MISSING,
        "15",
    ),
    FigureSpec("alarms", "What the monitor saw, and when", _alarms.alarms_data, _alarms.alarms, _alarms.MISSING),
    FigureSpec(
        "planted_truth",
        "What rankers find of known plants",
        _planted.planted_truth_data,
        _planted.planted_truth,
        _planted.MISSING,
    ),
    FigureSpec(
        _mitigations.NAME, _mitigations.TITLE, _mitigations.pareto_data, _mitigations.pareto, _mitigations.MISSING
    ),
    FigureSpec(
        _screening.NAME,
        _screening.TITLE,
        _screening.screening_calibration_data,
        _screening.screening_calibration,
        _screening.MISSING,
    ),
)
FIGURES: dict[str, FigureSpec] = {spec.name: spec for spec in _SPECS}
"""The figures of every study by name, in the report's order."""
JUDGED_FIGURES: dict[str, FigureSpec] = {spec.name: spec for spec in _JUDGED_SPECS}
"""Figures of judged answers: a study without any does not show them."""
MORE_FIGURES: dict[str, FigureSpec] = {spec.name: spec for spec in _MORE_SPECS}
"""Further figures of one study, shown where it holds what they draw."""
COLLECTION_FIGURES: dict[str, FigureSpec] = {spec.name: spec for spec in _COLLECTION_SPECS}
"""Figures of many runs: a labelled study, several models, planted truth."""
ALL_FIGURES: dict[str, FigureSpec] = FIGURES | JUDGED_FIGURES | MORE_FIGURES | COLLECTION_FIGURES
"""Every figure by name."""


def figures_of(records: Records) -> dict[str, FigureSpec]:
    """The figures that a folder shows: of a study all of `FIGURES`; the others where they have something to draw.

    A folder of other results (a labelled study, planted truth) shows only what it holds.
    """
    others = {name: spec for name, spec in ALL_FIGURES.items() if name not in FIGURES}
    shown = {name: spec for name, spec in others.items() if not spec.data(records).empty}
    own = {} if "kind" in records.manifest else FIGURES
    return own | shown


# --- The figures as functions: `pp.figures.NAME(records)` gives a plotly figure from the records of a folder


def doses(records: Records):
    """Index and feature after corrections."""
    return _doses.doses(records.doses)


def stress(records: Records):
    """Stress tests."""
    return _stress.stress(records.stress)


def data(name: str, records: Records) -> pd.DataFrame:
    """The numbers that a figure draws.

    Raises:
        InputError: no figure of that name.
    """
    if name not in ALL_FIGURES:
        raise unknown("figure", name, ALL_FIGURES)
    return ALL_FIGURES[name].data(records)


__all__ = [
    "ALL_FIGURES",
    "COLLECTION_FIGURES",
    "FIGURES",
    "JUDGED_FIGURES",
    "MORE_FIGURES",
    "FigureSpec",
    "alarms",
    "arms",
    "categories",
    "coherence",
    "controls",
    "data",
    "domains",
    "dose_response",
    "doses",
    "early_detection",
    "figures_of",
    "for_print",
    "judge_agreement",
    "latents",
    "lengths",
    "mitigation_pareto",
    "model_size",
    "passages",
    "planted_truth",
    "ranker_agreement",
    "rates",
    "realignment",
    "recovery",
    "score_share",
    "screening_calibration",
    "separation",
    "stress",
    "trajectory",
]
