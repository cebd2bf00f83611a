"""The figures of `realign RUN --plan` and `--stress`, from a run folder's records."""

import pandas as pd
import plotly.graph_objects as go

from persona_probe.report.figures import doses as _doses
from persona_probe.report.figures import stress as _stress
from persona_probe.report.records import Records

NO_DOSES, NO_STRESS = _doses.MISSING, _stress.MISSING


def doses_data(records: Records) -> pd.DataFrame:
    """The finished cells of the grid of corrections (see `figures.doses`)."""
    return _doses.doses_data(records.doses)


def doses(records: Records) -> go.Figure:
    """Index and feature after corrections, by number of rows and by how they were chosen."""
    return _doses.doses(records.doses)


def stress_data(records: Records) -> pd.DataFrame:
    """The numbers of all stress tests of a study (see `figures.stress`)."""
    return _stress.stress_data(records.stress)


def stress(records: Records) -> go.Figure:
    """One panel a stress test, one line an effect."""
    return _stress.stress(records.stress)
