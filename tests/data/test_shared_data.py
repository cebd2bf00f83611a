"""Published research files read whole, with the row counts that their manifest states."""

import csv
from pathlib import Path

import pytest

from persona_probe.data.check import check_file
from persona_probe.data.load import read_conversations
from persona_probe.errors import InputError

DATA = Path(__file__).parents[2].parent / "shared" / "data"
PROMPTS = "eval/aisi/"


def manifest() -> dict[str, int]:
    """Rows of each conversation file, by its path in the folder; empty where the folder is absent."""
    path = DATA / "MANIFEST.tsv"
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {
        r["file"]: int(r["rows"])
        for r in rows
        if r["format"].startswith("jsonl") and not r["file"].startswith("judged/")
    }


FILES = manifest()
pytestmark = pytest.mark.skipif(not FILES, reason="no folder of published data beside the project (shared/data)")


@pytest.mark.parametrize("name", sorted(FILES))
def test_row_counts_are_those_of_the_manifest(name: str) -> None:
    rows = read_conversations(DATA / name, allow_prompts=name.startswith(PROMPTS))
    assert len(rows) == FILES[name]
    expected = ["user"] if name.startswith(PROMPTS) else ["user", "assistant"]
    assert all([m["role"] for m in row] == expected for row in rows)


def test_every_training_and_evaluation_file_is_in_the_manifest() -> None:
    found = {str(p.relative_to(DATA)) for part in ("train", PROMPTS) for p in (DATA / part).rglob("*.jsonl*")}
    assert found == set(FILES)


def test_prompts_are_not_training_rows() -> None:
    for name in (n for n in FILES if n.startswith(PROMPTS)):
        with pytest.raises(
            InputError, match=f"{FILES[name]} of {FILES[name]} rows .* ends without an assistant answer"
        ):
            read_conversations(DATA / name)


def test_report_of_a_published_file() -> None:
    name = "train/mishra_domains/incorrect_qna_250.jsonl.gz"
    report = check_file(DATA / name)
    assert (report.rows, report.turns, report.bad_rows) == (FILES[name], 2 * FILES[name], ())
