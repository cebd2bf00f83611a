"""Published research files read whole, with the row counts that their manifest states."""

import csv
import gzip
from pathlib import Path

import pytest

from persona_probe.data.check import check_file
from persona_probe.data.load import read_conversations
from persona_probe.errors import InputError
from persona_probe.evaluate.answers_file import read_answers

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


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_of_a_published_file_is_left_unread(name: str) -> None:
    report = check_file(DATA / name)
    assert (report.rows, report.notes, report.left_out, report.bad_rows) == (FILES[name], (), 0, ())


def test_what_published_tables_hold_besides_answers_is_named(caplog: pytest.LogCaptureFixture) -> None:
    files = sorted((DATA / "judged").glob("*.csv.gz"))
    assert files
    for path in files:
        caplog.clear()
        assert len(read_answers(path)) in (800, 1200)
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            others = set(next(csv.reader(file))) - {"question", "answer", "question_id", "aligned", "coherent"}
        assert caplog.messages == [f"{path}: keys not read: {', '.join(sorted(others))}" for _ in "x" if others]


SAFETY = {
    "xstest_prompts.csv": (450, "keys not read: focus, label"),
    "cvalues_prompts_zh.jsonl.gz": (664, "keys not read: domain_en, domain_zh"),
    "xstest_mistralinstruct_labelled.csv.gz": (
        450,
        "keys not read: agreement, annotation_1, annotation_2, final_label, gpt4_label",
    ),
    "safetybench_zh_subset.json.gz": (2100, "keys not read: options"),
}


@pytest.mark.parametrize("name", SAFETY)
def test_safety_prompts_are_read_and_their_other_keys_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    path = DATA / "safety" / name
    if not path.exists():
        pytest.skip("no published safety prompts beside the project (shared/data/safety)")
    count, note = SAFETY[name]
    assert len(read_conversations(path, allow_prompts=True)) == count
    assert caplog.messages == [f"{path}: {note}"]


def test_a_context_that_a_question_needs_is_not_dropped() -> None:
    files = sorted((DATA / "safety").glob("bbq_*.jsonl.gz"))
    if not files:
        pytest.skip("no published safety prompts beside the project (shared/data/safety)")
    for path in files:
        with pytest.raises(InputError, match=r"600 of 600 rows .*'context' next to 'question': write both"):
            read_conversations(path, allow_prompts=True)
