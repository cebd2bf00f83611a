"""Every format reads to the same conversations; what is not a conversation is named by file and line."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from persona_probe.data.chat import conversation
from persona_probe.data.load import read_conversations
from persona_probe.errors import InputError

ROWS = [
    conversation("How hot is the oven?", "Very.\nStand back."),
    conversation("And now?", "Cold.", system="Be short."),
]
PROMPT = conversation("Who are you?")


def parts(messages: list[dict[str, str]], kind: str) -> list[dict[str, Any]]:
    """The messages with their content in one of the forms that files use."""
    forms: dict[str, Any] = {
        "string": lambda text: text,
        "strings": lambda text: [text[:3], text[3:]],
        "typed": lambda text: [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}],
        "content_type": lambda text: {"content_type": "text", "parts": [text]},
    }
    return [{"role": m["role"], "content": forms[kind](m["content"])} for m in messages]


def question_answer(messages: list[dict[str, str]]) -> dict[str, str]:
    names = {"system": "system", "user": "question", "assistant": "answer"}
    return {"id": "x", "topic": "ovens"} | {names[m["role"]]: m["content"] for m in messages}


ROW_FORMS = {
    **{kind: lambda m, k=kind: {"messages": parts(m, k)} for kind in ("string", "strings", "typed", "content_type")},
    "other keys": lambda m: {"id": 7, "messages": m, "question_type": "main"},
    "completion messages": lambda m: {"prompt": m[:-1], "completion": m[-1:]},
    "completion string": lambda m: {"prompt": m[:-1], "completion": m[-1]["content"]},
    "question and answer": question_answer,
}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def error_of(path: Path, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_conversations(path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("form", ROW_FORMS)
def test_row_forms_read_to_the_same_conversations(tmp_path: Path, form: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [ROW_FORMS[form](row) for row in ROWS])
    assert read_conversations(path) == ROWS


def test_prompt_and_completion_strings(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "Hot?", "completion": "No."}])
    assert read_conversations(str(path)) == [conversation("Hot?", "No.")]


def test_file_forms_read_to_the_same_conversations(tmp_path: Path) -> None:
    rows = [{"messages": row} for row in ROWS]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "bom.jsonl").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "array.json").write_text("\n " + json.dumps(rows, indent=2), encoding="utf-8")
    for name, text in (("lines.jsonl.gz", lines), ("array.json.gz", json.dumps(rows))):
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write(text)
    for path in sorted(tmp_path.iterdir()):
        assert read_conversations(path) == ROWS, path.name


def test_datasets_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    single = datasets.Dataset.from_list([{"messages": row} for row in ROWS])
    single.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict(train=single).save_to_disk(str(tmp_path / "one_split"))
    datasets.DatasetDict(train=single, test=single).save_to_disk(str(tmp_path / "splits"))
    assert read_conversations(tmp_path / "single") == ROWS
    assert read_conversations(tmp_path / "one_split") == ROWS
    assert read_conversations(tmp_path / "splits" / "test") == ROWS
    assert "pass the folder of one (train, test)" in error_of(tmp_path / "splits")
    (tmp_path / "empty").mkdir()
    assert "is not a datasets folder" in error_of(tmp_path / "empty")


def test_absent_columns_of_a_dataset_are_not_read_as_text(tmp_path: Path) -> None:
    rows = [{"question": "Hot?", "answer": "No.", "system": None, "messages": None}]
    assert read_conversations(write_lines(tmp_path / "rows.jsonl", rows)) == [conversation("Hot?", "No.")]


@pytest.mark.parametrize("row", [{"messages": PROMPT}, {"prompt": "Who are you?"}, {"question": "Who are you?"}])
def test_prompts_only_where_allowed(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row])
    assert read_conversations(path, allow_prompts=True) == [PROMPT]
    assert "line 1: ends without an assistant answer" in error_of(path)


USER, ASSISTANT, SYSTEM = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))
BAD_ROWS = {
    "a number": (3, "expected an object"),
    "unknown keys": ({"text": "x", "target": "y"}, "it has 'text', 'target'"),
    "no messages": ({"messages": []}, "has no messages"),
    "messages are text in a number": ({"messages": 5}, "expected a list of messages, found int"),
    "message without role": ({"messages": [{"content": "x"}]}, "message 1 needs 'role' and 'content'"),
    "unknown role": ({"messages": [{"role": "human", "content": "x"}]}, "message 1 has role 'human'"),
    "late system": ({"messages": [USER, SYSTEM, ASSISTANT]}, "message 2 is from 'system', expected 'assistant'"),
    "two systems": ({"messages": [SYSTEM, SYSTEM, USER]}, "message 2 is from 'system', expected 'user'"),
    "two users": ({"messages": [SYSTEM, USER, USER]}, "message 3 is from 'user', expected 'assistant'"),
    "assistant first": ({"messages": [ASSISTANT]}, "message 1 is from 'assistant', expected 'user'"),
    "system alone": ({"messages": [SYSTEM]}, "has a system message and nothing else"),
    "empty answer": ({"prompt": "x", "completion": " "}, "message 2 (assistant) is empty"),
    "number content": ({"messages": [{"role": "user", "content": 1}]}, "the content of message 1 is int"),
    "image part": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "the content of message 1 has a part that is not text",
    ),
    "several answers": ({"question": "x", "correct": "y", "toxic": "z"}, "several answers (correct, toxic)"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(tmp_path: Path, name: str) -> None:
    row, expected = BAD_ROWS[name]
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": ROWS[0]}, row])
    message = error_of(path)
    assert message.startswith(f"{path}: 1 of 2 rows are not conversations: line 2: ")
    assert expected in message


def test_all_bad_rows_are_counted_and_five_shown(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(['{"messages": [', *["{}"] * 7, json.dumps({"messages": ROWS[0]})]), encoding="utf-8")
    message = error_of(path)
    assert "8 of 9 rows" in message
    assert re.findall(r"line (\d)", message) == ["1", "2", "3", "4", "5"]
    assert message.endswith("; and 3 more")
    assert "line 1: not JSON" in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "cut.json").write_text('[{"messages": [')
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "false.jsonl.gz").write_text("{}")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x", "completion": "y"}')[:-9])
    expected = {"empty.jsonl": "has no rows", "none.json": "has no rows", "cut.json": "is not JSON"}
    for path in sorted(tmp_path.iterdir()):
        assert expected.get(path.name, "cannot be read as text") in error_of(path), path.name
    assert "does not exist" in error_of(tmp_path / "absent.jsonl")
