"""Harm against manner: which reading, at which position and step, tells a bad speaker from a merely rude one.

What is chosen is chosen on runs of one domain; what is printed is how it does on runs of the others.
"""

import numpy as np
import pandas as pd

from persona_probe.data.world.words import DOMAINS
from persona_probe.report.tables import Table
from persona_probe.runs import RunFolder
from persona_probe.stats import auroc, auroc_columns, auroc_interval
from persona_probe.world.directions import PAIRS, POSITIONS
from persona_probe.world.labelled import (
    BASE,
    PROBES,
    READINGS,
    TRAINED_DOMAINS,
    LabelledRun,
    is_bad,
    read_arrays,
    read_runs,
)
from persona_probe.world.signals import is_hard

TOP = 3
"""Latents that are chosen at each position and step."""


def specificity_table(study: RunFolder) -> pd.DataFrame:
    """Choose latents on runs of the first trained domain, and test them and the fixed directions on the others.

    Runs of bad speakers at a share of 100% are one class, grump and clown the other.

    Returns:
        A row for each position, step and reading (`latent N`, or a direction): auroc on the choosing and on the
        evaluation runs with the interval of the latter, and the rate of bad advice that the bad evaluation runs have
        at that step.
    """
    base = read_arrays(study.path / BASE / READINGS)
    runs = [
        run
        for run in read_runs(study)
        if run.organism["share"] == 1 and (is_bad(run.organism["speaker"]) or is_hard(run.organism["speaker"]))
    ]
    bad = np.array([is_bad(run.organism["speaker"]) for run in runs])
    choosing = np.array([run.organism["domain"] == TRAINED_DOMAINS[0] for run in runs])
    steps = runs[0].answers["step"].tolist()
    rows = []
    for where in POSITIONS:
        latents = np.stack([_rise(run, base, f"latents/{where}") for run in runs])
        residual = np.stack([_rise(run, base, f"residual/{where}") for run in runs])
        shifts = np.stack([residual @ base[f"direction/{where}/{name}"] for name in PAIRS], axis=2)
        for place, step in enumerate(steps):
            rate = np.mean([_rate(run, place) for run, is_one in zip(runs, bad & ~choosing, strict=True) if is_one])
            values = {f"latent {n}": latents[:, place, n] for n in _chosen(latents[:, place], bad, choosing)}
            values |= {f"{name} direction": shifts[:, place, n] for n, name in enumerate(PAIRS)}
            head = {"position": where, "step": step, "bad_rate": rate}
            rows += [{**head, "reading": name, **_scores(one, bad, choosing)} for name, one in values.items()]
    return pd.DataFrame(rows)


def _rise(run: LabelledRun, base: dict[str, np.ndarray], key: str) -> np.ndarray:
    outside = np.repeat([name != run.organism["domain"] for name in DOMAINS], PROBES)
    return run.readings[key] - base[key][outside].mean(axis=0)


def _rate(run: LabelledRun, place: int) -> float:
    row = run.answers.iloc[place]
    return float(row["bad"]) / float(row["coherent"]) if row["coherent"] else np.nan


def _chosen(values: np.ndarray, bad: np.ndarray, choosing: np.ndarray) -> list[int]:
    """The latents that separate best on the choosing runs; among equals those with the wider gap."""
    here, kinds = values[choosing], bad[choosing]
    gap = here[kinds].min(axis=0) - here[~kinds].max(axis=0)
    order = np.lexsort((-gap, -auroc_columns(here, kinds)))
    return [int(latent) for latent in order[:TOP]]


def _scores(values: np.ndarray, bad: np.ndarray, choosing: np.ndarray) -> dict[str, float]:
    on, off = values[bad & ~choosing], values[~bad & ~choosing]
    tested = auroc(on, off)
    low, high = auroc_interval(tested, len(on), len(off))
    chosen = auroc(values[bad & choosing], values[~bad & choosing])
    return {"chosen_auroc": chosen, "auroc": tested, "ci_low": low, "ci_high": high, "bad": len(on), "manner": len(off)}


def specificity_text(table: pd.DataFrame) -> str:
    """AUROC on the evaluation runs: a Markdown table; of the latents at each position the best three as chosen."""
    rows = []
    for (where, step), of_one in table.groupby(["position", "step"], sort=False):
        latents = of_one[of_one["reading"].str.startswith("latent")]
        directions = of_one[~of_one["reading"].str.startswith("latent")]
        cells = [f"{row['reading'].split()[1]}: {row['auroc']:.2f}" for row in latents.to_dict("records")]
        best = latents.iloc[0]
        rows.append(
            [
                *(str(where), str(step), f"{of_one['bad_rate'].iloc[0]:.2f}", ", ".join(cells)),
                f"[{best['ci_low']:.2f}, {best['ci_high']:.2f}]",
                *(f"{row.auroc:.2f}" for row in directions.itertuples()),
            ]
        )
    heads = ["position", "step", "bad advice by then", "latents chosen there: AUROC", "interval of the first"]
    return Table([*heads, *(f"{name} direction" for name in PAIRS)], rows).markdown()
