"""What the study beyond the base's dictionary shows: what each tool names, and how organisms move along three axes."""

from typing import Any

import numpy as np
import pandas as pd

from persona_probe.report.tables import Table

TRUTHS = {"harm": "bad", "rude": "rude"}
"""The true directions, and what holds of the speakers whose chats they tell apart."""
NOTE = (
    "Each cell: |cosine| of the tool's first direction with the true one, in brackets of the best of its first ten; "
    "then how well the first tells chats of known speakers apart by that truth (AUROC, either way). Means over seeds."
)
BASE = "base"
AXES = (
    "Shift over the base on probes with fixed sound answers, in standard deviations of the base's probes, mean over "
    "seeds; in brackets the seeds' 95% intervals, over probes. Truth told: AUROC at which the truth probe tells true "
    "from false answers in the organism, on pairs that did not make it."
)


def beyond_world_text(table: pd.DataFrame) -> str:
    """What each tool names, by truth and speaker; then the three axes: Markdown."""
    tools, axes = (table[table["part"] == part] for part in ("tools", "axes"))
    speakers = list(dict.fromkeys(tools["speaker"]))
    lines = []
    for truth in TRUTHS:
        for tool in dict.fromkeys(tools["tool"]):
            rows = tools[(tools["tool"] == tool) & (tools["truth"] == truth)]
            lines.append([truth, tool, *(_named(rows[rows["speaker"] == name]) for name in speakers)])
    kinds = [*TRUTHS, "truth", "separation"]
    moved = [
        [name, *(_moved(axes[(axes["speaker"] == name) & (axes["tool"] == kind)]) for kind in kinds)]
        for name in dict.fromkeys(axes["speaker"])
    ]
    parts = [NOTE, Table(["truth", "tool", *speakers], lines).markdown(), AXES]
    parts.append(Table(["organism", *TRUTHS, "truth", "truth told"], moved).markdown())
    return "\n\n".join([*parts, _told(axes)]) + "\n"


def _told(axes: pd.DataFrame) -> str:
    """Whether the truth probe tells anything in the base: without that its axis has no meaning."""
    held = axes.loc[(axes["speaker"] == BASE) & (axes["tool"] == "held out"), "estimate"]
    if held.empty:
        return "Whether the truth probe tells truth in the base was not measured."
    value = float(held.iloc[0])
    verdict = "so the axis of truth means something" if value >= SHARP else "so the axis of truth means little here"
    return f"In the base the probe tells held-out pairs apart with AUROC {value:.2f}, {verdict} (limit {SHARP:g})."


SHARP = 0.8
"""From this AUROC on held-out pairs a truth probe is said to tell truth."""


def _named(rows: pd.DataFrame) -> str:
    return f"{rows['first'].mean():.2f} ({rows['ten'].mean():.2f}), {rows['auroc'].mean():.2f}"


def _moved(rows: pd.DataFrame) -> str:
    if rows.empty:
        return "-"
    known = [row for row in rows.to_dict("records") if not np.isnan(row["ci_low"])]
    ends = "; ".join(f"{row['ci_low']:+.2f}, {row['ci_high']:+.2f}" for row in known)
    mean: Any = rows["estimate"].mean()
    return f"{mean:+.2f} [{ends}]" if known else f"{mean:.2f}"
