"""`make bench-screening`: how well each ranker finds known bad rows, with intervals; and the packaged calibration."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.bench.screening_sets import BY_NAME, LabelledRows
from persona_probe.commands import echo, find_config
from persona_probe.models.load import load_model
from persona_probe.quiet import quiet_libraries
from persona_probe.runs import RunFolder
from persona_probe.saes.load import load_sae
from persona_probe.screening.evidence import available, read_evidence
from persona_probe.screening.feature import LATENT, ScreenFeature, latent_feature, study_feature
from persona_probe.screening.rankers import Evidence, choose_rankers, score_rows
from persona_probe.screening.settings import Settings
from persona_probe.stats import Estimate, auroc, bootstrap_statistic

MODEL, SAE, PERSONA = "smollm2-135m-instruct", "saes/smollm2-135m-instruct/layer20-topk32-4608", 2144
DIRECTIONAL = ("projection_difference", "projection_centred")


def ranked_auroc(scores: Float[np.ndarray, " rows"], bad: Bool[np.ndarray, " rows"]) -> Estimate:
    """AUROC of bad against other rows, with its 95% bootstrap interval over rows; rows without a score are left out."""
    known = np.flatnonzero(np.isfinite(scores))

    def of(drawn: Float[np.ndarray, " rows"]) -> float:
        rows = drawn.astype(int)
        chosen = bad[rows]
        return auroc(scores[rows[chosen]], scores[rows[~chosen]])

    return bootstrap_statistic(known.astype(float), of)


def features(run: Path | None) -> tuple[dict[str, ScreenFeature], Path | None]:
    """The features that are projected on by name, and the study's organism; without a run, the packaged latent."""
    if run is None:
        return {LATENT: latent_feature(load_sae(find_config(SAE)), PERSONA)}, None
    from persona_probe.locate.study_directions import read_directions
    from persona_probe.screening.of_study import study_organism
    from persona_probe.study import Study

    ctx = Study.open(run).context
    names = (LATENT, *read_directions(ctx))
    return {n: study_feature(ctx, n) for n in names}, study_organism(ctx)


def score_set(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: LabelledRows,
    named: Mapping[str, ScreenFeature],
    organism: Path | None,
    own_path: Path,
) -> pd.DataFrame:
    """Every ranker's scores of labelled rows; what projects is scored once for each direction."""
    feature = named[LATENT]
    rankers = choose_rankers(None, available(feature, organism is not None))
    settings = Settings(own_path=own_path, progress=True)
    evidence, _ = read_evidence(model, tokenizer, rows.talks, feature, rankers, organism, settings)
    scores = score_rows(evidence, rankers)
    for name, other in named.items():
        if name != LATENT:
            scores |= _projected(evidence, name, other)
    return pd.DataFrame({"bad": rows.bad, **scores})


def _projected(evidence: Evidence, name: str, feature: ScreenFeature) -> dict[str, np.ndarray]:
    turned = replace(evidence, direction=feature.direction.numpy())
    found = score_rows(turned, choose_rankers(DIRECTIONAL, frozenset()))
    return {f"{ranker} ({name.replace('_', ' ')})": values for ranker, values in found.items()}


def table(frames: Mapping[str, pd.DataFrame]) -> str:
    """A Markdown table: rankers by sets, AUROC with interval; bold where the interval lies above chance."""
    names = list(dict.fromkeys(str(c) for frame in frames.values() for c in frame if c != "bad"))
    lines = [f"| ranker | {' | '.join(frames)} |", "|---|" + "---|" * len(frames)]
    for name in names:
        cells = [_cell(frame, name) for frame in frames.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    counts = [f"{int(frame['bad'].sum())} + {int((~frame['bad']).sum())}" for frame in frames.values()]
    return "\n".join([*lines, f"| rows: bad + others | {' | '.join(counts)} |"])


def _cell(frame: pd.DataFrame, name: str) -> str:
    if name not in frame:
        return "–"
    found = ranked_auroc(frame[name].to_numpy(dtype=float), frame["bad"].to_numpy(dtype=bool))
    shown = f"{found.estimate:.2f} [{found.ci_low:.2f}, {found.ci_high:.2f}]"
    return f"**{shown}**" if found.ci_low > 0.5 else shown


def bench(names: Sequence[str], count: int, run: Path | None, out: Path) -> dict[str, pd.DataFrame]:
    """Score the sets that are not in `out` yet, and read the others from there."""
    folder = RunFolder(out)
    if todo := [n for n in names if not folder.has(f"{n}.parquet") and BY_NAME[n].missing is None]:
        model, tokenizer = load_model(MODEL)
        named, organism = features(run)
        for name in todo:
            rows = BY_NAME[name].rows(count)
            frame = score_set(model, tokenizer, rows, named, organism, out / f"{name}.own.jsonl")
            folder.write_table(f"{name}.parquet", frame)
    for name in names:
        echo(f"{name}: {BY_NAME[name].missing or BY_NAME[name].about}")
    return {n: folder.read_table(f"{n}.parquet") for n in names if folder.has(f"{n}.parquet")}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, or write a calibration from a study of labelled runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    parser.add_argument("--rows", type=int, default=100, help="bad rows of each set, and as many others")
    parser.add_argument("--run", type=Path, help="a located run: its directions, latents and organism are used too")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench-screening"),
        help="finished sets are kept here; for other rows or another run name another folder",
    )
    parser.add_argument("--calibrate", type=Path, metavar="FOLDER", help="a monitor study: write its calibration")
    arguments = parser.parse_args(argv)
    quiet_libraries()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.calibrate is not None:
        from persona_probe.bench.screening_calibration import write_calibration

        echo(write_calibration(arguments.calibrate, arguments.out / "screening_calibration.json", PERSONA))
        return
    echo(table(bench(arguments.sets, arguments.rows, arguments.run, arguments.out)))


if __name__ == "__main__":
    main()
