"""The tables of the demo's record in the pages on low precision and on safety.

python -m tools.demo_tables records/demo docs
"""

import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pandas as pd

from persona_probe.evaluate.safety import PLAIN, safety_summary
from persona_probe.files import read_parquet
from persona_probe.report.tables import Marks, Table, check_page, fill_page
from persona_probe.study.safety_latent import transfer_summary

CONTROL = "correct"
INTERVAL = ("ci_low", "ci_high")
RANKERS = ("rise", "firing_rise", "cosine")
LANGUAGES = {"en": "English", "zh": "Chinese"}


def precision_text(table: pd.DataFrame) -> str:
    """A row for each format: what is left of the change, the reading in that format's own band, and the ranks."""
    rows = []
    for name, one in table.groupby("format", sort=False):
        by_arm = {row["arm"]: row for row in one.to_dict("records")}
        base, bad = by_arm["base"], by_arm["incorrect"]
        difference = _interval(bad, "index_minus_control")
        ranks = ", ".join(str(int(bad[f"{ranker}_rank"])) for ranker in RANKERS)
        kept = f"{bad['kept']:.2f}" + (" **erased**" if bad["erased"] else "")
        band = f"{bad['band_low']:.2f} to {bad['band_high']:.2f}"
        reading = f"{bad['reading']:.2f}, {bad['state']}"
        rows.append([f"`{name}`", kept, band, reading, f"{base['explained_variance']:.2f}", difference, ranks])
    heads = [
        *("format", "kept", "base band", "incorrect organism", "explained variance, base"),
        *("contrast index minus control", "rank by rise, firing, cosine"),
    ]
    return Table(heads, rows).markdown() + "\n"


def safety_text(table: pd.DataFrame) -> str:
    """A row for each category and language: what each arm's index is above the control's."""
    found = safety_summary(table, CONTROL)
    found = found[found["wrapper"] == PLAIN]
    arms = [arm for arm in dict.fromkeys(found["arm"]) if arm not in ("base", CONTROL)]
    rows = []
    for (category, language), one in found.groupby(["category", "language"], sort=False):
        by_arm = {row["arm"]: row for row in one.to_dict("records")}
        cells = [_interval(by_arm[arm], "over_control") for arm in arms]
        count = str(int(by_arm[CONTROL]["questions"]))
        rows.append([f"`{category}`", LANGUAGES.get(str(language), str(language)), count, *cells])
    return Table(["category", "language", "questions", *arms], rows).markdown() + "\n"


def _interval(row: dict[Hashable, Any], name: str) -> str:
    low, high = (row[f"{name}_{end}"] for end in INTERVAL)
    return f"{row[name]:+.2f} [{low:+.2f}, {high:+.2f}]"


def latent_text(table: pd.DataFrame) -> str:
    """A row for each language: what the latent tells apart in the base, and how it rises in the organisms."""
    found = transfer_summary(table, CONTROL)
    arms = [arm for arm in dict.fromkeys(found["arm"]) if arm != "base"]
    rows = []
    for language, one in found.groupby("language", sort=False):
        by_arm = {row["arm"]: row for row in one.to_dict("records")}
        cells = [_plain_interval(by_arm[arm]) for arm in ("base", *arms)]
        rows.append([LANGUAGES.get(str(language), str(language)), str(int(by_arm["base"]["n"])), *cells])
    heads = [
        *("language", "questions", "AUROC, misaligned against aligned answers, base"),
        *(f"rise, {arm} minus control" for arm in arms),
    ]
    return Table(heads, rows).markdown() + "\n"


def _plain_interval(row: dict[Hashable, Any]) -> str:
    return f"{row['estimate']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]"


TEXTS = {"precision": precision_text, "safety": safety_text, "safety_latent": latent_text}
"""What a page says, as a function of the record's table of the same name."""
PAGES = {"safety_latent": "safety"}
"""Tables that stand on the page of another."""


def marks(name: str) -> Marks:
    """The lines of a page between which its table stands."""
    return f"<!-- demo-{name}: begin (python -m tools.demo_tables) -->", f"<!-- demo-{name}: end -->"


def main(records: Path, pages: Path) -> None:
    """Fill both pages.

    Raises:
        InputError: a record or a page is missing, or a page lacks its marks; nothing is written then.
    """
    found = {name: TEXTS[name](read_parquet(records / f"{name}.parquet")) for name in TEXTS}
    for name in found:
        check_page(page_of(pages, name), marks(name))
    for name, text in found.items():
        fill_page(page_of(pages, name), marks(name), text)


def page_of(pages: Path, name: str) -> Path:
    """The page that shows a table."""
    return pages / f"{PAGES.get(name, name)}.md"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
