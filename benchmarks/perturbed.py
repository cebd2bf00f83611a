"""`make perturbed`: locate and judge a finished study again, with other rounding; are the words the same?

Another processor, another number of threads or another library rounds differently. Each perturbation copies the run
without what was computed from its organisms, computes it again in a process of its own, and compares every verdict word
and every interval. Organisms, corrections with what was read of them, and judged answers are kept: what other rounding
does to training and sampling, a second whole run says (`--whole`).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.cli.options import echo
from persona_probe.latents.causal import random_latents
from persona_probe.latents.stage import firing_rates
from persona_probe.realignment.spec import slug
from persona_probe.report.tables import Marks, check_page, fill_page
from persona_probe.runs import write_json
from persona_probe.study.study import Study

ONE_CORE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
TWO_CORES = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
PERTURBATIONS: Mapping[str, Mapping[str, str]] = {
    "one thread": ONE_CORE,
    "two threads": TWO_CORES,
    "float32 products without AVX-512": {**ONE_CORE, "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "matrix products without AMX": {**TWO_CORES, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}
"""Environment variables of torch's, MKL's and oneDNN's choice of kernels, by name; a machine without them ignores some.

`ATEN_CPU_CAPABILITY=avx2` is no choice: torch 2.13 then fails in bf16 attention on a processor with AVX-512.
"""
JITTER, DRAWS = 0.005, 100
MARKS: Marks = ("<!-- perturbed: begin (make perturbed) -->", "<!-- perturbed: end -->")
RECORD = Path(__file__).parents[1] / "records" / "perturbed"
RESULTS = (
    *("latents.parquet", "steering.parquet", "agreement.parquet", "dictionaries.parquet", "cards.json"),
    *("directions.json", "directions.safetensors", "summary.json", "report.html", "readings.parquet"),
)
"""Results at the top of a run folder that locate, track and the summary make again."""
KEPT = ("realign-", "2x2-realigned", "samples-", "judged-")
"""Parts of a run that other stages made."""

# --- The run, again


def copy_of(run: Path, place: Path) -> Path:
    """A copy of a finished run without what locate and track computed from its organisms."""
    if (place / "manifest.json").is_file():
        return place  # goes on where it was
    shutil.copytree(run, place, ignore=shutil.ignore_patterns("figures", "*.lock"))
    for name in RESULTS:  # of the run itself; the null pair's folder has tables of the same names
        (place / name).unlink(missing_ok=True)
    for part in (place / "parts").glob("*"):
        if not part.name.startswith(KEPT):
            part.unlink()
    manifest = json.loads((place / "manifest.json").read_text())
    manifest.pop("random_latents", None)
    write_json(place / "manifest.json", manifest)
    return place


def again(run: Path, place: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """Locate, track and summarise a copy under these environment variables; its summary.json."""
    copy = copy_of(run, place)
    for stage in ("locate", "track", "report"):
        command = [sys.executable, "-m", "persona_probe.cli", stage, str(copy), "--quiet"]
        subprocess.run(command, env={**os.environ, **variables}, check=True)
    return json.loads((copy / "summary.json").read_text())


# --- What is compared


def words(summary: Mapping[str, Any]) -> dict[str, str]:
    """Every verdict word of a summary, by name."""
    found = {"persona latent": str(summary["persona_feature"]["latent"]), "effect": summary["woken"]["word"]}
    found |= {f"check {check['name']}": "passed" if check["passed"] else "failed" for check in summary["checks"]}
    found |= {f"{test} beyond random": str(one["beyond"]) for test, one in summary["causal_test"].items()}
    for arm, verdict in summary["verdicts"].items():
        found |= {f"{arm}: {part}": verdict[part] for part in ("feature", "behaviour", "sae")}
    for kind, levels in summary["evidence"].items():
        found[f"evidence on the {kind}"] = ", ".join(levels["shown"])
    return found


def estimates(summary: Mapping[str, Any], path: str = "") -> dict[str, tuple[float, float, float]]:
    """Every estimate with an interval, by its path in the summary; timings and memory have none."""
    if {"estimate", "ci_low", "ci_high"} <= summary.keys():
        three = [summary[key] for key in ("estimate", "ci_low", "ci_high")]
        return {path: (three[0], three[1], three[2])} if None not in three and three[1] < three[2] else {}
    found: dict[str, tuple[float, float, float]] = {}
    for key, value in summary.items():
        if isinstance(value, Mapping):
            found |= estimates(value, f"{path}/{key}")
    return found


def compare(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """One row: words that differ, and how many estimates lie in the first run's intervals."""
    before, after = words(first), words(second)
    differing = [f"{key}: {before.get(key)} became {after.get(key)}" for key in before if before[key] != after.get(key)]
    old, new = estimates(first), estimates(second)
    shared = sorted(old.keys() & new.keys())
    moves = [abs(new[key][0] - old[key][0]) / (old[key][2] - old[key][1]) for key in shared]
    return {
        "perturbation": name,
        "words": len(before),
        "differing": len(differing),
        "differences": "; ".join(differing),
        "estimates": len(shared),
        "inside": sum(old[key][1] <= new[key][0] <= old[key][2] for key in shared),
        "largest_move": float(np.max(moves)),
    }


def jittered(run: Path) -> dict[str, Any]:
    """The draw of random latents with every firing rate off by up to 0.5%, many times: how often it differs."""
    study = Study.open(run)
    table = study.run_folder.read_table("parts/rank.parquet")
    firing, drawn = firing_rates(table), [int(latent) for latent in study.run_folder.manifest["random_latents"]]
    latents = study.features
    candidates = [int(latent) for latent in latents.loc[latents["kind"] == "candidate", "latent"]]
    rng = np.random.default_rng(study.context.seed)
    differing = sum(
        random_latents(
            firing * rng.uniform(1 - JITTER, 1 + JITTER, len(firing)), candidates, len(drawn), study.context.seed
        )
        != drawn
        for _ in range(DRAWS)
    )
    return {"perturbation": f"firing rates off by up to {JITTER:.1%}", "words": DRAWS, "differing": differing}


def table_text(table: pd.DataFrame) -> str:
    """The table as Markdown."""
    lines = [
        "| perturbation | words that differ | numbers in their interval | largest move, of an interval's width |",
        "|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        if pd.isna(row["estimates"]):
            text = f"{row['differing']} of {row['words']} draws of random latents | - | -"
        else:
            said = f" ({row['differences']})" if row["differences"] else ""
            text = f"{row['differing']} of {row['words']}{said} | {row['inside']:.0f} of {row['estimates']:.0f} | "
            text += f"{row['largest_move']:.1%}"
        lines.append(f"| {row['perturbation']} | {text} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Perturb a finished run, print the table and keep it as a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run folder of the demo")
    parser.add_argument("--out", type=Path, default=Path("runs/perturbed"))
    parser.add_argument("--only", nargs="*", choices=[*PERTURBATIONS], default=[*PERTURBATIONS])
    parser.add_argument(
        "--whole", nargs="*", default=[], metavar="NAME=RUN", help="further finished runs of the same config, by name"
    )
    parser.add_argument("--record", type=Path, default=RECORD, help="folder of the table (default %(default)s)")
    parser.add_argument("--page", type=Path, default=None, help="page whose table is filled in (docs/evidence.md)")
    args = parser.parse_args(argv)
    if args.page is not None:
        check_page(args.page, MARKS)
    first = json.loads((args.run / "summary.json").read_text())
    rows = [jittered(args.run)]
    for name in args.only:
        rows.append(compare(name, first, again(args.run, args.out / slug(name), PERTURBATIONS[name])))
    for named in args.whole:
        name, _, run = named.partition("=")
        rows.append(compare(f"whole run: {name}", first, json.loads((Path(run) / "summary.json").read_text())))
    table = pd.DataFrame(rows)
    echo(table_text(table))
    args.record.mkdir(parents=True, exist_ok=True)
    table.to_parquet(args.record / "words.parquet")
    write_json(
        args.record / "recipe.json",
        {
            "kind": "perturbed",
            "config": {"name": "demo"},
            "perturbations": {name: dict(PERTURBATIONS[name]) for name in args.only},
            "whole": [named.partition("=")[0] for named in args.whole],
        },
    )
    if args.page is not None:
        fill_page(args.page, MARKS, table_text(table))


if __name__ == "__main__":
    main()
