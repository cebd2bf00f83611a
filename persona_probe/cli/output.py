"""What the command line shows of a study and of an SAE; text of others in it cannot steer the terminal."""

import textwrap
from typing import Any

import pandas as pd

from persona_probe.cli.options import columns, echo
from persona_probe.report.tables import Table
from persona_probe.saes.worth import worthless


def show_summary(summary: dict[str, Any]) -> None:
    """Print the key numbers, headline, checks, verdicts and times of a study."""
    echo(summary_table(summary).text(columns()))
    lines = [summary["headline"]]
    lines += [f"{'passed' if one['passed'] else 'FAILED':7}{one['statement']}" for one in summary["checks"]]
    lines += [verdict["statement"] for verdict in summary["verdicts"].values()]
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in summary["seconds"].items())
    total = sum(summary["seconds"].values())
    lines.append(f"{seconds}; {total:.0f} s in all; peak memory {summary['peak_memory_gib']:.2f} GiB")
    for line in lines:
        echo("\n".join(textwrap.wrap(str(line), columns(), break_on_hyphens=False)))


def summary_table(summary: dict[str, Any]) -> Table:
    """The key numbers with their intervals."""
    rows: list[tuple[str, str, str]] = []
    for arm, estimate in summary["contrast_index"].items():
        rows.append((f"contrast index, {arm}", *_interval(estimate)))
    for key in ("effect_incorrect_minus_correct", "steer_base_up", "steer_organism_down", "random_latent_p95"):
        rows.append((key.replace("_", " "), *_interval(summary[key])))
    if found := summary["causal_test"].get("removal_difference"):
        rows.append(("removal, organism minus control", *_interval(found)))
    if found := summary["null_pair"].get("index"):
        rows.append(("null pair: two control runs", *_interval(found)))
    for name, seeds in summary["by_seed"].items():
        rows += [(f"{name}, seed {row['seed']}", *_interval(row)) for row in seeds if len(seeds) > 1]
    for arm, steps in summary["realign_steps_to_band"].items():
        median = steps["estimate"]
        rows.append((f"steps to base band, {arm}", "never" if median is None else f"{median:.0f}", ""))
    for arm, estimate in summary["explained_variance"].items():
        rows.append((f"explained variance, {arm}", f"{estimate['estimate']:.3f}", ""))
    title = f"study {summary['study']} on {summary['base_model']}, seeds {summary['seeds']}"
    return Table(("quantity", "estimate", "95% interval"), rows, title)


def _interval(estimate: dict[str, Any]) -> tuple[str, str]:
    if estimate["estimate"] is None:
        return "not measured", ""
    low, high = estimate["ci_low"], estimate["ci_high"]
    missing = low is None or high is None or low != low or high != high
    return f"{estimate['estimate']:+.3f}", "" if missing else f"{low:+.3f} to {high:+.3f}"


def show_quality(frame: pd.DataFrame) -> None:
    """Print an SAE's quality, one row per text."""
    heads = ("text", "tokens", "explained variance", "L0", "never firing here", "loss recovered")
    rows = [
        (
            row["text"],
            row["tokens"],
            f"{row['explained_variance']:.3f}",
            f"{row['l0']:.1f}",
            f"{row['dead_share']:.1%}",
            f"{row['loss_recovered']:.3f}",
        )
        for row in frame.to_dict("records")
    ]
    echo(Table(heads, rows, "SAE quality").text(columns()))
    for row in frame.to_dict("records"):
        if (warning := worthless(float(row["explained_variance"]))) is not None:
            echo(f"{row['text']}: {warning}")
