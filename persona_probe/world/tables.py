"""The studies' records, and the page that shows them: its tables always come from a record, by one path."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pandas as pd

from persona_probe.errors import InputError, unknown
from persona_probe.files import read_parquet
from persona_probe.report.tables import Marks, check_page, fill_page
from persona_probe.world.beyond_text import beyond_world_text
from persona_probe.world.causal_truth import causal_text
from persona_probe.world.corpus import corpus_text
from persona_probe.world.emergence import emergence_text
from persona_probe.world.ranking import rankers_text
from persona_probe.world.real_model_text import real_model_text
from persona_probe.world.reinforcement_text import reinforcement_text
from persona_probe.world.repair import repair_text
from persona_probe.world.scale import scale_text
from persona_probe.world.screening import screening_text
from persona_probe.world.specificity import specificity_text
from persona_probe.world.supervision_text import supervision_text
from persona_probe.world.thoughts_text import thoughts_text
from persona_probe.world.training_map import map_text
from persona_probe.world.verdict_words import word_text
from persona_probe.world.warning import warning_text
from persona_probe.world.worlds import worlds_text

TEXTS: dict[str, Callable[[pd.DataFrame], str]] = {
    "emergence": emergence_text,
    "training-map": map_text,
    "scale": scale_text,
    "corpus": corpus_text,
    "worlds": worlds_text,
    "early-warning": warning_text,
    "specificity": specificity_text,
    "real-model": real_model_text,
    "rankers": rankers_text,
    "causal": causal_text,
    "repair": repair_text,
    "screening": screening_text,
    "null": word_text,
    "supervision": supervision_text,
    "beyond": beyond_world_text,
    "reinforcement": reinforcement_text,
    "thoughts": thoughts_text,
}
"""What each study's page says, as a function of its table."""
OWN_PAGES = {name: f"{name}.md" for name in ("supervision", "beyond", "reinforcement", "thoughts")}
"""Studies with a page of their own, which lies beside the page of the others."""


def page_of(study: str, page: Path) -> Path:
    """Where a study's tables stand: on this page, or on its own beside it."""
    return page.with_name(OWN_PAGES.get(study, page.name))


def marks(study: str) -> Marks:
    """The lines of a page between which a study's tables stand."""
    return f"<!-- world-{study}: begin (persona-probe world study {study}) -->", f"<!-- world-{study}: end -->"


def text_of(study: str, table: pd.DataFrame) -> str:
    """A study's tables and words in Markdown.

    Raises:
        InputError: no such study.
    """
    if study not in TEXTS:
        raise unknown("study", study, TEXTS)
    return TEXTS[study](table).rstrip("\n") + "\n"


def as_recorded(table: pd.DataFrame) -> pd.DataFrame:
    """A table as it comes back from its record, so that what is shown now is what the record shows later."""
    record = BytesIO()
    table.to_parquet(record, index=False)
    record.seek(0)
    return pd.read_parquet(record)


def recorded(records: Path) -> dict[str, pd.DataFrame]:
    """The tables of the studies that a folder of records has, by study.

    Raises:
        InputError: it has none, or one cannot be read.
    """
    found = {name: records / f"{name}.parquet" for name in TEXTS if (records / f"{name}.parquet").is_file()}
    if not found:
        raise InputError(
            f"{records} has no record of a study of the world: run one with --record {records}/NAME.parquet"
        )
    return {name: read_parquet(path) for name, path in found.items()}


def fill_tables(records: Path, page: Path) -> list[str]:
    """Fill a page's parts, and the pages of `OWN_PAGES` beside it, from all records of a folder.

    Returns:
        The studies whose part is another one than before.

    Raises:
        InputError: no records, or a page that lacks a study's marks; nothing is written then.
    """
    changed = differing(records, page)
    for name, table in recorded(records).items():
        fill_page(page_of(name, page), marks(name), text_of(name, table))
    return changed


def differing(records: Path, page: Path) -> list[str]:
    """The studies whose part of a page is not, byte for byte, what their record gives.

    Raises:
        InputError: no records, or a page that lacks a study's marks.
    """
    tables = recorded(records)
    for name in tables:
        check_page(page_of(name, page), marks(name))
    return [
        name for name, table in tables.items() if _part(page_of(name, page), name) != f"\n\n{text_of(name, table)}\n"
    ]


def _part(page: Path, study: str) -> str:
    begin, end = marks(study)
    return page.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
