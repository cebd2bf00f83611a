"""Small records of finished runs, for the repository, and the figures drawn from them.

python -m tools.records pack RUN records/demo
python -m tools.records draw records runs/figures
python -m tools.records judge records/mitigations docs/mitigations.md
"""

import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from persona_probe.errors import InputError
from persona_probe.mitigate.grid.grid_summary import MARKS, markdown, summarise
from persona_probe.mitigate.grid.grid_verdict import judge_rows
from persona_probe.monitor.band import Band
from persona_probe.report.export import csv_text, export_figures
from persona_probe.report.figures import figures_of
from persona_probe.report.records import load_records
from persona_probe.report.tables import fill_page
from persona_probe.runs import RunFolder
from persona_probe.screening.prediction import pairs_of
from persona_probe.verdicts import MARGIN
from persona_probe.writing import write_text

logger = logging.getLogger(__name__)

FILES = (
    *("readings.parquet", "evals.parquet", "latents.parquet", "steering.parquet", "agreement.parquet"),
    *("planted.parquet", "sizes.parquet", "mitigations.parquet", "screening.parquet", "cards.json", "directions.json"),
    *("judged_steps.parquet", "items.parquet", "evals_2x2.parquet", "dictionaries.parquet", "signals.parquet"),
    *("precision.parquet", "safety.parquet", "safety_latent.parquet"),
    *("summary.json", "results.json", "samples.jsonl"),
)
"""What a record keeps of a run folder: tables and numbers; no weights, no parts, no pages."""
LARGEST = 2 * 2**20
"""Bytes that one file of a record may have."""
PATH = re.compile(r'"(?:/|~/|[A-Za-z]:\\)[^"\n]*[/\\][^"\n]*"')
"""A JSON string that is an absolute path."""
PLANTED = {"kind": "planted", "config": {"name": "planted", "model": "smollm2-135m-instruct"}, "seeds": [0]}
"""The manifest of a planted table of version 0.1.0, which wrote none."""


def pack(source: str | Path, target: str | Path) -> list[Path]:
    """Write a slim copy of finished results, with the CSVs of their figures.

    Args:
        source: a run folder, a labelled study, the parquet file of `bench planted --out`, or a screening calibration
            (JSON).
        target: the record's folder.

    Returns:
        The files written: the records, and `figures/<name>.csv` of every figure that they show.

    Raises:
        InputError: nothing to pack, a file too large for the repository, or a path of this machine in a file.
    """
    root, folder = Path(source), Path(target)
    if root.resolve() == folder.resolve():
        raise InputError(f"{root} would be packed onto itself: name another folder for the record")
    folder.mkdir(parents=True, exist_ok=True)
    if root.suffix == ".parquet":
        written = _planted(root, folder)
    elif root.suffix == ".json" and root.is_file():
        written = _calibration(json.loads(root.read_text(encoding="utf-8")), folder)
    elif (root / "manifest.json").is_file():
        paths = [root / name for name in (*FILES, "manifest.json")]
        paths += [root / "realign" / "doses.parquet", *sorted(root.glob("realign/*/stress.parquet"))]
        written = [_copy(path, folder / path.relative_to(root)) for path in paths if path.is_file()]
    else:
        raise InputError(f"{root} holds no records: give a run folder, or the parquet file of `bench planted --out`")
    for path in written:
        _check(path)
    return written + write_csvs(folder, folder / "figures")


def _planted(table: Path, folder: Path) -> list[Path]:
    """A table of planted truth, with the manifest that `bench planted` wrote next to it."""
    manifest = table.with_name(f"{table.stem}.manifest.json")
    if manifest.is_file():
        written = _copy(manifest, folder / "manifest.json")
    else:
        written = write_text(folder / "manifest.json", json.dumps(PLANTED, indent=2) + "\n")
    return [_copy(table, folder / "planted.parquet"), written]


def _calibration(calibration: Mapping[str, Any], folder: Path) -> list[Path]:
    """A screening calibration as a table, with its provenance as the manifest."""
    pairs, provenance = pairs_of(calibration), calibration["provenance"]
    RunFolder(folder).write_table("screening.parquet", pd.DataFrame([asdict(pair) for pair in pairs]))
    config = {"name": "screening calibration", "model": provenance["model"], "sae": provenance["sae"]}
    seeds = sorted({pair.seed for pair in pairs})
    metadata = {"kind": "screening", "config": config, "seeds": seeds, **provenance}
    manifest = write_text(folder / "manifest.json", json.dumps(metadata, indent=2) + "\n")
    return [folder / "screening.parquet", manifest]


def _copy(source: Path, target: Path) -> Path:
    """Byte by byte, so that the hashes of tables in the manifest hold for the record too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(source, target))


def _check(path: Path) -> None:
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes, more than {LARGEST:,}: leave it out of the record")
    if path.suffix in (".json", ".jsonl") and (place := PATH.search(path.read_text(encoding="utf-8"))):
        raise InputError(f"{path} holds a path of this machine, {place.group()}: name models and data by their names")


def write_csvs(record: str | Path, folder: str | Path) -> list[Path]:
    """The CSV of every figure that a record shows."""
    records, target = load_records(record), Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    return [write_text(target / f"{s.name}.csv", csv_text(s.data(records))) for s in figures_of(records).values()]


def draw(records: str | Path, target: str | Path, formats: Sequence[str] = ("html", "csv", "svg")) -> list[str]:
    """Draw every figure of every record below a folder, and compare the CSVs with the shipped ones.

    Returns:
        Names (`record/figure.csv`) of the CSVs that differ from the shipped ones, byte by byte.

    Raises:
        InputError: no record below the folder.
    """
    folders = sorted(path.parent for path in Path(records).glob("*/manifest.json"))
    if not folders:
        raise InputError(f"no record below {records}: pack a run with `python -m tools.records pack`")
    differing = []
    for folder in folders:
        export_figures(load_records(folder), Path(target) / folder.name, formats=formats)
        for shipped in sorted((folder / "figures").glob("*.csv")):
            new = Path(target) / folder.name / shipped.name
            if not new.is_file() or new.read_bytes() != shipped.read_bytes():
                differing.append(f"{folder.name}/{shipped.name}")
    return differing


def judge(record: str | Path, study: str | Path | None = None, page: str | Path | None = None) -> list[Path]:
    """Judge the record of a grid of mitigations again by this version's rules, from its table; nothing is measured.

    Args:
        record: the grid's record.
        study: the record of the study that it was made from, for the persona feature's base band; None takes the band
            that the grid's summary.json holds.
        page: the Markdown page whose table is filled in.

    Returns:
        The files written.

    Raises:
        InputError: no table there, or a study that is not the grid's.
    """
    folder = RunFolder(Path(record))
    if not folder.has("mitigations.parquet"):
        raise InputError(f"{record} holds no mitigations.parquet: give the record of a grid")
    own = folder if study is None else RunFolder(Path(study))
    if study is not None and folder.manifest["study"] != own.manifest["config_hash"]:
        raise InputError(f"{study} is not the study of {record}: its hash is another")
    if "base_band" not in own.read_json("summary.json"):
        raise InputError(f"{record} does not hold its study's base band: give the study's record too")
    band, config = Band(*(own.read_json("summary.json")["base_band"][end] for end in ("low", "high"))), folder.manifest
    margin, bound = config["config"].get("margin", MARGIN), config["config"]["perplexity_bound"]
    table = judge_rows(folder.read_table("mitigations.parquet"), band, bound, margin)
    old = folder.read_json("summary.json")
    summary = {**old, "base_band": asdict(band), "margin": margin, **summarise(table, old["missing"])}
    folder.write_table("mitigations.parquet", table)
    folder.write_json("summary.json", summary)
    if page is not None:
        fill_page(Path(page), MARKS, markdown(table, old["missing"]))
    return write_csvs(folder.path, folder.path / "figures")


def main(args: Sequence[str]) -> int:
    """`pack RUN FOLDER`, `draw RECORDS FOLDER` or `judge GRID PAGE`; returns the exit code."""
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)  # this module only: the browser logs every step
    started, commands = (
        time.monotonic(),
        {"pack": pack, "draw": draw, "judge": lambda grid, page: judge(grid, page=page)},
    )
    if len(args) != 3 or args[0] not in commands:
        logger.error("give `pack RUN FOLDER`, `draw RECORDS FOLDER` or `judge GRID PAGE`")
        return 2
    try:
        names: list[Any] = commands[args[0]](args[1], args[2])
    except InputError as error:
        logger.error("%s", error)
        return 2
    if args[0] != "draw":
        logger.info("%s: %d files", args[2 if args[0] == "pack" else 1], len(names))
        return 0
    outcome = (
        f"CSVs that differ from the shipped ones: {', '.join(names)}" if names else "all CSVs are the shipped ones"
    )
    logger.info("%s drawn in %.0f s; %s", args[2], time.monotonic() - started, outcome)
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
