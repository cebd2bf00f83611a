"""What the command line shows of a study and of an SAE: tables by rich, made from plain records."""

from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from persona_probe.saes.worth import worthless


def show_summary(summary: dict[str, Any]) -> None:
    """Print the key numbers, headline, checks, verdicts and times of a study."""
    console = Console()
    console.print(summary_table(summary))
    console.print(Text(summary["headline"], style="bold"))
    for check in summary["checks"]:
        word, style = ("passed", "green") if check["passed"] else ("FAILED", "bold red")
        console.print(Text.assemble((f"{word:7}", style), check["statement"]))
    for verdict in summary["verdicts"].values():
        console.print(Text(verdict["statement"]))
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in summary["seconds"].items())
    total = sum(summary["seconds"].values())
    console.print(Text(f"{seconds}; {total:.0f} s in all; peak memory {summary['peak_memory_gib']:.2f} GiB"))


def summary_table(summary: dict[str, Any]) -> Table:
    """The key numbers with their intervals."""
    table = Table(title=f"study {summary['study']} on {summary['base_model']}, seeds {summary['seeds']}")
    for column in ("quantity", "estimate", "95% interval"):
        table.add_column(column)
    for arm, estimate in summary["contrast_index"].items():
        table.add_row(f"contrast index, {arm}", *_interval(estimate))
    for key in ("effect_incorrect_minus_correct", "steer_base_up", "steer_organism_down", "random_latent_p95"):
        table.add_row(key.replace("_", " "), *_interval(summary[key]))
    if found := summary["causal_test"].get("removal_difference"):
        table.add_row("removal, organism minus control", *_interval(found))
    if found := summary["null_pair"].get("index"):
        table.add_row("null pair: two control runs", *_interval(found))
    for name, rows in summary["by_seed"].items():
        for row in rows if len(rows) > 1 else ():
            table.add_row(f"{name}, seed {row['seed']}", *_interval(row))
    for arm, steps in summary["realign_steps_to_band"].items():
        median = steps["estimate"]
        table.add_row(f"steps to base band, {arm}", "never" if median is None else f"{median:.0f}", "")
    for arm, estimate in summary["explained_variance"].items():
        table.add_row(f"explained variance, {arm}", f"{estimate['estimate']:.3f}", "")
    return table


def _interval(estimate: dict[str, Any]) -> tuple[str, str]:
    if estimate["estimate"] is None:
        return "not measured", ""
    low, high = estimate["ci_low"], estimate["ci_high"]
    missing = low is None or high is None or low != low or high != high
    return f"{estimate['estimate']:+.3f}", "" if missing else f"{low:+.3f} to {high:+.3f}"


def show_quality(frame: pd.DataFrame) -> None:
    """Print an SAE's quality, one row per text."""
    table = Table(title="SAE quality")
    for column in ("text", "tokens", "explained variance", "L0", "never firing here", "loss recovered"):
        table.add_column(column)
    for row in frame.to_dict("records"):
        table.add_row(
            Text(str(row["text"])),
            str(row["tokens"]),
            f"{row['explained_variance']:.3f}",
            f"{row['l0']:.1f}",
            f"{row['dead_share']:.1%}",
            f"{row['loss_recovered']:.3f}",
        )
    console = Console()
    console.print(table)
    for row in frame.to_dict("records"):
        if (warning := worthless(float(row["explained_variance"]))) is not None:
            console.print(Text(f"{row['text']}: {warning}", style="bold red"))
