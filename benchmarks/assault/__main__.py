"""Run the parts of the assault, print their counts, and write them into the page of promises."""

import argparse
import importlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.assault.counts import Count, Part, Settings
from persona_probe.cli.options import echo
from persona_probe.report.tables import Table, check_page, fill_page

PARTS = {
    "kills": "kills",
    "doubles": "doubles",
    "inputs": "inputs",
    "text": "hostile_text",
    "replies": "replies",
    "monitor": "monitor_faults",
}
"""Names of the parts, and their modules; each has a function `assault`."""
MARKS = ("<!-- assault: begin -->", "<!-- assault: end -->")
HEADS = ("part", "what is done, and what must follow", "tried", "held")


def main() -> None:
    """Run the parts that were asked for; the exit code is 1 where anything did not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.assault", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="Parts to run.")
    parser.add_argument("--seed", type=int, default=0, help="Of the random moments and choices.")
    parser.add_argument("--short", action="store_true", help="A few of each kind, in two minutes.")
    parser.add_argument("--page", type=Path, help="Write the table between its marks in this page.")
    parser.add_argument("--keep", type=Path, help="Work in this folder, and leave it.")
    args = parser.parse_args()
    if args.page is not None:
        check_page(args.page, MARKS)
    with tempfile.TemporaryDirectory(prefix="assault-") as scratch:
        counts = run_parts(args.only, args.keep or Path(scratch), args.seed, args.short)
    echo(table(counts).text())
    if args.page is not None:
        fill_page(args.page, MARKS, table(counts).markdown())
    raise SystemExit(any(count.failures for found in counts.values() for count in found))


def run_parts(names: Sequence[str], place: Path, seed: int, short: bool) -> dict[str, list[Count]]:
    """The counts of each part, which are printed as they come."""
    counts: dict[str, list[Count]] = {}
    for name in names:
        part: Part = importlib.import_module(f"benchmarks.assault.{PARTS[name]}").assault
        folder = place / name
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        counts[name] = part(Settings(folder, seed, short))
        for count in counts[name]:
            echo(f"{name}: {count.what}: {count.held} of {count.tried}")
            for line in count.lines():
                echo(f"  {line}")
        echo(f"{name}: {time.monotonic() - began:.0f} s")
    return counts


def table(counts: dict[str, list[Count]]) -> Table:
    """One row for each count."""
    rows = [(name, count.what, count.tried, count.held) for name, found in counts.items() for count in found]
    return Table(HEADS, rows)


if __name__ == "__main__":
    main()
