"""The verdict of a correction, in its folder: measured once, its stress statements kept up to date."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from persona_probe.context import Context
from persona_probe.data.readers import read_conversations
from persona_probe.finetune.realignment.correct import OUTCOME, ROWS, SPEC, checkpoint_in
from persona_probe.finetune.stress.run import statements
from persona_probe.realign_verdict import RealignVerdict, study_verdict
from persona_probe.runs import write_atomic

VERDICT = "verdict.json"


def write_verdict(ctx: Context, folder: Path) -> RealignVerdict:
    """Judge a correction (see `realign_verdict`) and write verdict.json, with lengths and notes of its rows."""
    spec, found = (_read(folder / name) for name in (SPEC, OUTCOME))
    if (folder / VERDICT).is_file():
        verdict = replace(read_verdict(folder), stress=statements(folder))
    else:
        rows, checkpoint = read_conversations(folder / ROWS), checkpoint_in(folder)
        verdict = study_verdict(
            ctx, spec["name"], spec["seed"], checkpoint=checkpoint, corrective=rows, stress=statements(folder)
        )
    lengths = {key: found[key] for key in ("answer_tokens", "inducing_tokens", "length_ratio", "notes")}
    write_atomic(folder / VERDICT, json.dumps({**verdict.to_dict(), "corrective_rows": lengths}, indent=2) + "\n")
    return verdict


def read_verdict(folder: Path) -> RealignVerdict:
    """What `write_verdict` wrote."""
    return RealignVerdict.from_dict(_read(folder / VERDICT))


def verdict_lines(folder: Path) -> list[str]:
    """The verdict as lines for a terminal, notes on the corrective rows included."""
    notes = _read(folder / VERDICT)["corrective_rows"]["notes"]
    return [str(read_verdict(folder)), *(f"note: {note}" for note in notes)]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
