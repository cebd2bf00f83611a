"""The pieces of a study on a world, each made once: an interrupted study goes on, and processes share the work."""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from persona_probe.locks import InUse
from persona_probe.runs import RunFolder
from persona_probe.writing import write_json, write_table

TABLE, SETTINGS = "table.parquet", "settings.json"
LONGEST_S = 600.0
"""How long another process may take for one piece."""
PAUSE_S = 10.0
"""Between two looks at what another process makes."""
ANEW = "move it elsewhere, or choose another --out"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A folder of a study that appears when it is whole."""

    place: str
    """Its folder in the study's."""
    settings: Mapping[str, Any]
    """What decides its numbers, as JSON values."""
    make: Callable[[Path], None]
    """Fills a folder; writes `record` too."""
    record: str = SETTINGS
    """The file that holds the settings (under the key `settings`, where it holds more)."""


def make_pieces(study: RunFolder, pieces: Sequence[Piece], stage: str) -> None:
    """Make the pieces that the study lacks, in order. Started twice, two processes share them.

    Args:
        stage: what the manifest counts their seconds as, and what a line of progress calls them.

    Raises:
        InputError: a piece was made with other settings, or another process takes too long for one.
    """
    for number, piece in enumerate(pieces, 1):
        with contextlib.suppress(InUse):
            _finish(study, piece, stage, f"{stage}, {number} of {len(pieces)}")
    for piece in pieces:  # what another process was making
        with study.locked(piece.place, LONGEST_S):
            _finish(study, piece, stage, f"{stage}, one that another process left")


def _finish(study: RunFolder, piece: Piece, stage: str, label: str) -> None:
    if study.finished(piece.place, piece.settings, piece.record, ANEW):
        return
    with study.timed(stage), study.staging(piece.place) as folder:
        log.info("%s: %s", label, piece.place.rpartition("/")[2])
        piece.make(folder)


def table_piece(place: str, settings: Mapping[str, Any], make: Callable[[], pd.DataFrame]) -> Piece:
    """A piece that is one table."""

    def fill(folder: Path) -> None:
        write_table(folder / TABLE, make())
        write_json(folder / SETTINGS, dict(settings))

    return Piece(place, settings, fill)


def read_pieces(study: RunFolder, pieces: Sequence[Piece]) -> pd.DataFrame:
    """The tables of finished pieces, one after the other."""
    return pd.concat([study.read_table(f"{piece.place}/{TABLE}") for piece in pieces], ignore_index=True)


def make_all(makers: Sequence[Callable[[], object]]) -> None:
    """Call each until it has been called to its end: one that another process is busy with is called again later.

    Raises:
        InputError: what the calls raise, but not that something is in use.
    """
    waiting = list(makers)
    while waiting:
        taken = []
        for make in waiting:
            try:
                make()
            except InUse:
                taken.append(make)
        if waiting := taken:
            time.sleep(PAUSE_S)
