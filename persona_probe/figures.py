"""The figures as functions: `pp.figures.NAME(records)` gives a plotly figure from the records of a folder.

```python
records = pp.load_records("records/demo")
pp.figures.trajectory(records)
pp.figures.for_print(pp.figures.trajectory(records), width="column")
```
Its numbers are `pp.figures.data("trajectory", records)`, its caption `figure.layout.meta["caption"]`.
"""

import pandas as pd

from persona_probe.errors import unknown
from persona_probe.report.figures import ALL_FIGURES
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
from persona_probe.report.figures.repairs import doses, stress
from persona_probe.report.figures.screening_calibration import screening_calibration
from persona_probe.report.figures.separation import separation
from persona_probe.report.figures.trajectory import trajectory
from persona_probe.report.printing import for_print
from persona_probe.report.records import Records


def data(name: str, records: Records) -> pd.DataFrame:
    """The numbers that a figure draws.

    Raises:
        InputError: no figure of that name.
    """
    if name not in ALL_FIGURES:
        raise unknown("figure", name, ALL_FIGURES)
    return ALL_FIGURES[name].data(records)


__all__ = [
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
