"""The methods paragraph of a run, in LaTeX, and BibTeX of the methods that it used."""

import re
from dataclasses import dataclass
from pathlib import Path

from persona_probe.methods import STAGES
from persona_probe.references import REFERENCES
from persona_probe.runs import RunFolder

_CITED = re.compile(r"\\cite\{([^}]*)\}")


@dataclass(frozen=True)
class Citation:
    """What `cite` prints."""

    methods: str
    """One paragraph of LaTeX, with citations."""
    bibtex: str
    """The entries that it cites, sorted by key."""

    def __str__(self) -> str:
        return f"{self.methods}\n\n{self.bibtex}\n"


def cite(folder: str | Path) -> Citation:
    """Methods and references of a run, from its manifest, its summary and its tables. Stages not run are left out.

    Raises:
        InputError: not a run folder, or a damaged file in it.
    """
    run = RunFolder.open(folder)
    methods = " ".join(sentence for stage in STAGES for sentence in stage(run))
    keys = sorted({key.strip() for group in _CITED.findall(methods) for key in group.split(",")})
    return Citation(methods, "\n\n".join(REFERENCES[key] for key in keys))
