"""Commands on finished runs: compare two of them, verify the hashes of one, cite one."""

import argparse
from pathlib import Path

Arguments = argparse.Namespace


def compare(args: Arguments) -> None:
    """Two runs side by side, as one page."""
    from persona_probe.cli.loop import echo
    from persona_probe.report.compare import write_comparison

    out = args.out or Path(f"compare-{Path(args.run).name}-{Path(args.other).name}.html")
    echo(f"comparison: {write_comparison(args.run, args.other, out)}")


def verify(args: Arguments) -> int:
    """Recompute a run's hashes; exit code 1 where something differs or is missing."""
    import json
    from dataclasses import asdict

    from persona_probe.cli.loop import echo
    from persona_probe.report.tables import Table
    from persona_probe.runs import write_text
    from persona_probe.study.verify import verify

    findings = verify(args.run)
    if args.out is not None:
        write_text(args.out, json.dumps([asdict(one) for one in findings], indent=2) + "\n")
    shown = [one for one in findings if one.bad or not args.quiet]
    if shown:
        echo(Table(("what", "state", "detail"), [(one.name, one.state, one.detail) for one in shown]).text())
    counts = {state: sum(one.state == state for one in findings) for state in dict.fromkeys(f.state for f in findings)}
    echo(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 1 if any(one.bad for one in findings) else 0


def cite(args: Arguments) -> None:
    """The methods paragraph and BibTeX of a run."""
    from persona_probe.cli.loop import echo
    from persona_probe.report.cite import cite
    from persona_probe.runs import write_text

    text = str(cite(args.run))
    echo(f"citation: {write_text(args.out, text)}" if args.out is not None else text.rstrip())
