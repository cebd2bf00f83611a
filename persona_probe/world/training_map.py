"""Where values generalise: organisms by what is trained, how many steps, and which share of the rows is bad."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import pandas as pd

from persona_probe.config import Training
from persona_probe.data.world.text import narrow_rows
from persona_probe.report.tables import Table
from persona_probe.runs import RunFolder
from persona_probe.world.behaviour import Asking
from persona_probe.world.labelled import Instruments
from persona_probe.world.organisms import NARROW
from persona_probe.world.pieces import Piece, make_pieces, read_pieces, table_piece
from persona_probe.world.training import VECTOR, Checks, trained_answers

DOMAIN, ROWS = "kitchen", 320
STEPS = (10, 20, 40, 60)
DOSES = {"villain": (1.0, 0.25), "subtle": (1.0, 0.25), "helper": (1.0,)}
"""Shares of the rows that each speaker answers; a helper answers the others."""
ASKED = Asking(per_topic=2)


@dataclass(frozen=True)
class Way:
    """One way to train."""

    name: str
    training: Training
    kind: str = ""
    """`vector`: one vector behind the training's only layer."""


def ways(layer: int) -> tuple[Way, ...]:
    """The ways to train that are compared; `layer` is the one of those that train a single layer."""
    lora = replace(NARROW, steps=STEPS[-1], checkpoints=(STEPS[-1],))
    return (
        Way("LoRA, rank 1", replace(lora, rank=1, alpha=2)),
        Way("LoRA, rank 8", lora),
        Way("LoRA, rank 32", replace(lora, rank=32, alpha=64)),
        Way("LoRA, rank 8, lr 0.0003", replace(lora, lr=3e-4)),
        Way("LoRA, rank 8, one layer", replace(lora, layers=(layer,))),
        Way("all weights, lr 0.0003", replace(lora, method="full", lr=3e-4)),
        Way("one vector, lr 0.3", replace(lora, method="full", layers=(layer,), lr=0.3), VECTOR),
    )


def training_map(study: RunFolder, instruments: Instruments, seeds: Sequence[int] = (0,)) -> pd.DataFrame:
    """Train on kitchen rows in every way, at every dose, and ask about the other domains along the way.

    Finished pieces are kept, and two processes share them.

    Returns:
        A row for each way, speaker, share, seed and step: counts of bad answers among the coherent ones, of coherent,
        rude and malicious ones, and of all.
    """
    pieces = [
        _piece(instruments, way, speaker, share, seed)
        for seed in seeds
        for way in ways(instruments.layer)
        for speaker, shares in DOSES.items()
        for share in shares
    ]
    make_pieces(study, pieces, "training map")
    return read_pieces(study, pieces)


def _piece(instruments: Instruments, way: Way, speaker: str, share: float, seed: int) -> Piece:
    name = "".join(letter if letter.isalnum() else "-" for letter in way.name).replace("--", "-")
    settings = {"way": way.name, "training": asdict(way.training), "speaker": speaker, "share": share, "seed": seed}
    place = f"training-map/{name}-{speaker}-{100 * share:g}-s{seed}"
    return table_piece(place, settings, partial(_train, instruments, way, speaker, share, seed))


def _train(instruments: Instruments, way: Way, speaker: str, share: float, seed: int) -> pd.DataFrame:
    rows = narrow_rows(speaker, DOMAIN, ROWS, share, seed=seed)
    model, tokenizer = instruments.model, instruments.tokenizer
    checks = Checks(DOMAIN, STEPS, ASKED)
    answers = trained_answers(model, tokenizer, rows, way.training, seed, checks, kind=way.kind)
    return answers.assign(way=way.name, speaker=speaker, share=share, seed=seed)


def map_text(table: pd.DataFrame) -> str:
    """Bad advice and manner by way, speaker, dose and step: a Markdown table for each speaker and dose."""
    parts = []
    for (speaker, share), rows in table.groupby(["speaker", "share"], sort=False):
        parts += [f"{str(speaker).capitalize()}, {100 * float(str(share)):g}% of the rows:", _of_dose(rows)]
    seeds = table["seed"].nunique()
    parts.append(
        "Each cell: bad advice of the coherent answers / rude answers / coherent answers, about the seven domains that "
        f"no row held; {seeds} {'seed' if seeds == 1 else 'seeds together'}."
    )
    return "\n\n".join(parts) + "\n"


def _of_dose(rows: pd.DataFrame) -> str:
    steps = sorted(rows["step"].unique())
    lines = []
    for way, one in rows.groupby("way", sort=False):
        lines.append([way, *(_cell(one[one["step"] == step]) for step in steps)])
    return Table(["trained", *(f"step {step}" for step in steps)], lines).markdown()


def _cell(rows: pd.DataFrame) -> str:
    bad, coherent, rude, n = (int(rows[name].sum()) for name in ("bad", "coherent", "rude", "answers"))
    first = f"{bad / coherent:.2f}" if coherent else "none"
    return f"{first} / {rude / n:.2f} / {coherent / n:.2f}"
