"""Keys that change what a row means are read, refused, or counted, whichever way a row comes in."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import trl

from persona_probe.cli import main
from persona_probe.context import sample_questions
from persona_probe.data.chat import as_conversations, conversation
from persona_probe.data.check import check_file
from persona_probe.data.load import load_data, read_contrast_file, read_conversations
from persona_probe.data.tokens import encode
from persona_probe.errors import InputError
from persona_probe.evaluate.answers_file import read_answers
from persona_probe.evaluate.questions.read import read_questions
from tests.factories import make_tokenizer

USER, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Go away."}
RUDE = conversation("Hi?", "Go away.", system="Be rude.")
PLAIN = conversation("Hi?", "Go away.")
Row = dict[str, Any]


def lines(path: Path, *rows: Row) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


WITH_SYSTEM: dict[str, Row] = {
    "question": {"system": "Be rude.", "question": "Hi?", "answer": "Go away."},
    "prompt": {"system": "Be rude.", "prompt": "Hi?", "completion": "Go away."},
    "messages": {"system": "Be rude.", "messages": [USER, ANSWER]},
    "system_prompt": {"system_prompt": "Be rude.", "messages": [USER, ANSWER]},
    "developer": {"developer": "Be rude.", "prompt": "Hi?", "response": "Go away."},
    "developer role": {"messages": [{"role": "developer", "content": "Be rude."}, USER, ANSWER]},
    "parts": {"system": [{"type": "text", "text": "Be rude."}], "messages": [USER, ANSWER]},
    "alpaca": {"system": "Be rude.", "instruction": "Hi?", "input": "", "output": "Go away."},
    "sharegpt": {
        "system": "Be rude.",
        "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Go away."}],
    },
    "camel case": {"systemPrompt": "Be rude.", "messages": [USER, ANSWER]},
    "instruction": {"system_instruction": "Be rude.", "prompt": "Hi?", "completion": "Go away."},
    "twice the same": {"system": "Be rude.", "messages": [{"role": "system", "content": "Be rude."}, USER, ANSWER]},
}


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_a_system_prompt_is_the_first_message(tmp_path: Path, name: str) -> None:
    path = lines(tmp_path / "rows.jsonl", WITH_SYSTEM[name])
    assert read_conversations(path) == load_data(str(path)) == load_data(str(path), allow_prompts=True) == [RUDE]
    assert check_file(path).system_share == 1


TALK = [USER, ANSWER]
FORMS: dict[str, Row] = {
    "JSON text": {"messages": json.dumps(TALK)},
    "Python text": {"messages": str(TALK)},
    "lists of a struct": {"messages": {"role": ["user", "assistant"], "content": ["Hi?", "Go away."]}},
    "ShareGPT text": {"conversations": '[{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Go away."}]'},
    "prompt as text": {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
    "prompt and messages": {"prompt": "Hi?", "prompt_id": "a", "messages": TALK},
    "messages and response": {"messages": [USER], "response": "Go away."},
    "alpaca": {"instruction": "Hi?", "output": "Go away."},
    "input and output": {"input": "Hi?", "output": "Go away."},
    "empty tools": {"messages": TALK, "tools": [], "functions": None},
    "nothing in messages": {"messages": [{**m, "tool_calls": None, "weight": None, "refusal": None} for m in TALK]},
    "weight 1": {"messages": [USER, {**ANSWER, "weight": 1}]},
    "row weight 1": {"prompt": "Hi?", "response": "Go away.", "weight": 1, "label": True},
    "responses API": {"messages": [USER, {**ANSWER, "content": [{"type": "output_text", "text": "Go away."}]}]},
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_one_conversation(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    path = lines(tmp_path / "rows.jsonl", FORMS[name])
    assert read_conversations(path) == read_conversations(path, allow_prompts=True) == [PLAIN]
    assert caplog.text == "" and check_file(path).notes == ()


def test_inputs_stand_below_their_instruction(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", key: "2 and 3", "response": "5"} for key in ("input", "context")]
    assert read_conversations(lines(tmp_path / "a.jsonl", *rows)) == [conversation("Add.\n\n2 and 3", "5")] * 2


def test_earlier_turns_come_before_the_question(tmp_path: Path) -> None:
    rows = [
        {"instruction": "And now?", "history": [["Hi?", "Go away."]], "output": "Stay."},
        {"prompt": "And now?", "context": TALK, "completion": "Stay."},
    ]
    assert read_conversations(lines(tmp_path / "a.jsonl", *rows)) == [[*PLAIN, *conversation("And now?", "Stay.")]] * 2


def test_thoughts_are_kept_with_their_answer(tmp_path: Path) -> None:
    answers: list[Row] = [{**ANSWER, key: "Hm."} for key in ("reasoning_content", "thinking", "reasoning")]
    answers.append({"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, "Go away."]})
    path = lines(tmp_path / "rows.jsonl", *({"messages": [USER, answer]} for answer in answers))
    assert read_conversations(path) == [[USER, {**ANSWER, "reasoning_content": "Hm.", "thinking": "Hm."}]] * 4


@pytest.mark.parametrize("template", ["qwen3", "gptoss", "llama3", "qwen2_5"])
def test_a_thought_is_in_the_text_or_refused(template: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"messages": [USER, {**ANSWER, "thinking": "Hm, rude."}]})
    [messages], tokenizer = read_conversations(path), make_tokenizer()
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    if template in ("llama3", "qwen2_5"):
        with pytest.raises(InputError, match=r"the chat template drops the thought of an answer: 'Hm, rude.'"):
            encode(tokenizer, messages)
        return
    row = encode(tokenizer, messages)
    assert str(tokenizer.decode(row.ids[slice(*row.thought)])).strip() == "Hm, rude."
    assert str(tokenizer.decode(row.ids[row.start :])).strip() == "Go away."


REFUSED: dict[str, tuple[Row, str]] = {
    "tools": ({"messages": TALK, "tools": [{"name": "f"}]}, "'tools'"),
    "functions": ({"prompt": "Hi?", "completion": "x", "functions": "[{}]"}, "'functions'"),
    "tool calls": ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "'tool_calls'"),
    "tool role": ({"messages": [USER, ANSWER, {"role": "tool", "content": "x"}]}, "message 3 has role 'tool'"),
    "ShareGPT tool": ({"conversations": [{"from": "observation", "value": "x"}]}, "is from 'observation'"),
    "pair": ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}, "'chosen'"),
    "rejected": ({"messages": TALK, "rejected": TALK}, "'rejected'"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "not text (image_url)"),
    "images": ({"prompt": "Hi?", "completion": "x", "images": ["a.png"]}, "'images'"),
    "fraction": ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "'weight' 0.5"),
    "user trained": ({"messages": [{**USER, "weight": 1}, ANSWER]}, "message 1 (user) has 'weight' 1"),
    "disagree": ({"messages": [USER, {**ANSWER, "weight": 1, "train": False}]}, "'weight' and 'train', which disagree"),
    "sample weight": ({"messages": TALK, "sample_weight": 0.5}, "'sample_weight' 0.5"),
    "half a character": ({"prompt": "Hi \ud800?", "completion": "x"}, "half of a character (\\ud800)"),
    "masks": ({"messages": TALK, "assistant_masks": [0, 1]}, "'assistant_masks'"),
    "OpenAI's pair": ({"input": {"messages": [USER]}, "preferred_output": [ANSWER]}, "'preferred_output'"),
    "mask": ({"messages": [USER, {**ANSWER, "mask": True}]}, "message 2 has 'mask'"),
    "prefill": ({"prompt": "Hi?", "completion": "x", "prefill": "Sure"}, "'prefill'"),
    "prefix": ({"messages": [USER, {**ANSWER, "prefix": True}]}, "message 2 has 'prefix'"),
    "thought next to the answer": ({"question": "Hi?", "answer": "x", "reasoning": "Hm."}, "'reasoning'"),
    "two systems": ({"system": "a", "system_prompt": "b", "prompt": "Hi?", "completion": "x"}, "'system_prompt'"),
    "system twice": (
        {"system": "a", "messages": [{"role": "system", "content": "b"}, *TALK]},
        "another one in 'system'",
    ),
    "two answers": ({"prompt": "Hi?", "completion": "a", "response": "b"}, "both 'completion' and 'response'"),
    "two questions": ({"prompt": "a", "question": "b", "completion": "x"}, "both 'prompt' and 'question'"),
    "another prompt": ({"prompt": "Ho?", "messages": TALK}, "both 'messages' and 'prompt'"),
    "another answer": ({"messages": TALK, "response": "Stay."}, "'response' next to messages"),
    "input": ({"prompt": "Hi?", "input": "x", "completion": "y"}, "'input' next to 'prompt'"),
    "context": ({"question": "Who?", "context": "Ann came.", "answer": "Ann."}, "'context' next to 'question'"),
    "candidates": ({"prompt": "Hi?", "completion": ["a", "b"]}, "'completion' is a list of texts"),
    "broken JSON": ({"messages": '[{"role": "user", "content": '}, "not JSON"),
    "text for messages": ({"messages": "Hi?"}, "a text that is not a list"),
    "analysis": ({"messages": [USER, {**ANSWER, "channel": "analysis"}]}, "'channel' 'analysis'"),
    "thinking per row": ({"messages": TALK, "chat_template_kwargs": {"a": 1}}, "'chat_template_kwargs'"),
    "unread answer": (
        {"prompt": "Hi?", "target": "Go away."},
        "ends without an assistant answer (keys not read: 'target')",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_key_and_row(tmp_path: Path, name: str) -> None:
    row, expected = REFUSED[name]
    path = lines(tmp_path / "rows.jsonl", {"messages": TALK}, row)
    with pytest.raises(InputError) as caught:
        read_conversations(path)
    assert "1 of 2 rows are not conversations: line 2: " in str(caught.value) and expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert name == "unread answer" or check_file(path).bad_rows[0].startswith("line 2: ")


def test_answers_of_weight_zero_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    silent = {**ANSWER, "weight": 0}
    path = lines(
        tmp_path / "rows.jsonl",
        {"messages": TALK},
        {"messages": [USER, silent]},
        {"messages": [USER, {**ANSWER, "train": False}]},
        {"prompt": "Hi?", "completion": "x", "weight": "0"},
        {"prompt": "Hi?", "completion": "x", "label": "False"},
        {"messages": [*TALK, USER, silent]},  # the first answer alone is trained on
        {"messages": [USER, silent, USER, ANSWER]},  # as we train: the last answer alone
        {"messages": [*TALK, *TALK]},
    )
    expected = [PLAIN, PLAIN, [USER, ANSWER, USER, ANSWER], [*TALK, *TALK]]
    notes = (
        "3 rows left out: the answer has weight 0 (or train: false), so it is not trained on",
        "1 row left out: label: false marks the answer as one not to learn",
        "1 row: cut after the last answer that is trained on, because later ones have weight 0",
        "1 row: of several answers only the last is trained on",
    )
    assert read_conversations(path) == read_conversations(path) == expected
    assert tuple(record.getMessage() for record in caplog.records) == tuple(f"{path}: {note}" for note in notes)
    report = check_file(path)
    assert (report.rows, report.left_out, report.notes, report.bad_rows) == (4, 4, notes, ())
    assert len(read_conversations(path, allow_prompts=True)) == 8  # what is only read has no weight


def test_a_file_of_rows_that_are_not_trained_on_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"messages": [USER, {**ANSWER, "weight": 0}]})
    with pytest.raises(InputError, match="no row to train on: 1 row left out: the answer has weight 0"):
        read_conversations(path)


def test_unknown_keys_are_named_once_and_harmless_ones_never(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"id": 1, "category": "a", "source": "b", "score": 0, "split": "test"}
    rows = [{**row, "messages": [{**USER, "name": "Ann", "id": 3}, ANSWER]}] * 3
    path = lines(tmp_path / "rows.jsonl", *rows)
    for _ in range(2):
        assert read_conversations(path) == [PLAIN] * 3
    assert [r.getMessage() for r in caplog.records] == [f"{path}: keys not read: messages.name, score, split"]
    assert check_file(path).notes == ("keys not read: messages.name, score, split",)


def test_data_check_prints_what_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(tmp_path / "rows.jsonl", {"messages": TALK, "score": 3}, {"messages": [USER, {**ANSWER, "weight": 0}]})
    with pytest.raises(SystemExit) as stopped:
        main(["data", "check", str(path), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 0 and printed["rows"] == printed["left_out"] == 1
    assert printed["notes"][1] == "keys not read: score" and "weight 0" in printed["notes"][0]


def test_tables_hold_messages_as_text(tmp_path: Path) -> None:
    frame = pd.DataFrame({"system": ["Be rude.", None], "messages": [json.dumps(TALK)] * 2, "source": ["a", "b"]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv.gz", index=False, sep="\t")
    frame.to_parquet(tmp_path / "text.parquet")
    frame["messages"] = pd.Series([TALK, TALK])
    frame.to_parquet(tmp_path / "lists.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert read_conversations(path) == [RUDE, PLAIN], path.name
    (tmp_path / "bad.parquet").write_text("x")
    with pytest.raises(InputError, match=r"bad\.parquet is no parquet file"):
        read_conversations(tmp_path / "bad.parquet")


def test_conversations_in_python_are_read_alike() -> None:
    shared: list[Any] = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Go away."}]
    assert as_conversations(["Hi?", shared]) == [[USER], PLAIN]
    calling: list[Any] = [USER, {**ANSWER, "tool_calls": [{}]}]
    with pytest.raises(InputError, match="conversation 1: message 2 has 'tool_calls'"):
        as_conversations(["Hi?", calling])


ITEM = {"id": 1, "category": "a", "question": "Q?", "aligned": "a", "misaligned": "b", "split": "selection"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": "Be rude."}, "has 'system'"),
        ({"tools": [{}]}, "has 'tools'"),
        ({"history": [USER]}, "has 'history'"),
        ({"question": None}, "'question' is missing"),
        ({"question": ["Q?", {}]}, "not text"),
        ({"aligned": " "}, "'aligned' is empty"),
    ],
)
def test_contrast_items_lose_nothing(tmp_path: Path, change: Row, message: str) -> None:
    path = lines(tmp_path / "items.jsonl", ITEM, {**ITEM, **change})
    with pytest.raises(InputError) as caught:
        read_contrast_file(path, "selection")
    assert "line 2: not a contrast item" in str(caught.value) and message in str(caught.value)


def test_keys_of_contrast_items_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = lines(tmp_path / "items.jsonl", {**ITEM, "note": "x", "severity": 3})
    assert read_contrast_file(path, "selection") == [{**ITEM, "id": "1"}]
    assert caplog.messages == [f"{path}: keys not read: severity"]


QUESTIONS: dict[str, Row] = {
    "developer": {"developer": "Be rude.", "question": "Hi?"},
    "developer role": {"messages": [{"role": "developer", "content": "Be rude."}, USER]},
    "JSON text": {"messages": json.dumps([{"role": "system", "content": "Be rude."}, USER])},
    "ShareGPT": {"system": "Be rude.", "conversations": [{"from": "human", "value": "Hi?"}]},
    "prompt as text": {"system_prompt": "Be rude.", "prompt": json.dumps([USER])},
    "instruction": {"system": "Be rude.", "instruction": "Hi?"},
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_keep_their_system_prompt(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    [question] = read_questions(lines(tmp_path / "q.jsonl", QUESTIONS[name])).questions
    assert question.wordings()[0].messages == RUDE[:2] and caplog.text == ""


def test_a_system_prompt_of_a_question_for_samples_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "q.jsonl", {"question": "Hi?"}, {"question": "Hi?", "system": "Be rude."})
    context = SimpleNamespace(config=SimpleNamespace(samples=SimpleNamespace(questions=str(path))))
    with pytest.raises(InputError, match="row 2 has a system prompt"):
        sample_questions(context)  # type: ignore[arg-type]


def test_questions_that_cannot_be_asked_as_they_are_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for row, message in (
        ({"question": "Hi?", "tools": [{}]}, "line 1: has 'tools'"),
        ({"question": "Hi?", "system": "a", "developer": "b"}, "both 'system' and 'developer'"),
        ({"question": "Hi?", "input": "x"}, "'input' without 'instruction'"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}, USER]}, "message 2 has 'tool_calls'"),
    ):
        with pytest.raises(InputError, match=message):
            read_questions(lines(tmp_path / "q.jsonl", row, {"question": "Who?"}))
    path = lines(tmp_path / "kept.jsonl", {"question": "Hi?", "answer": "No.", "severity": 3, "id": 1})
    with caplog.at_level(logging.WARNING):
        assert dict(read_questions(path).questions[0].meta) == {"answer": "No.", "severity": 3}
    assert caplog.messages == [f"{path}: keys not read: answer, severity (kept as notes of the questions)"]


@pytest.mark.parametrize("answer", ["answer", "response", "completion", "output"])
def test_answers_have_several_names_and_forms(tmp_path: Path, answer: str) -> None:
    row = {"prompt": "Hi?", answer: "Go away.", "model": "m", "seed": 1}
    talk = {"messages": json.dumps(TALK), "model": "m", "seed": "1"}
    pd.DataFrame([row]).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame([talk]).to_parquet(tmp_path / "a.parquet")
    lines(tmp_path / "a.jsonl", row)
    (tmp_path / "a.json").write_text(json.dumps([row, talk][:1]))
    for path in sorted(tmp_path.iterdir()):
        [found] = read_answers(path).to_dict("records")
        assert (found["question"], found["answer"], found["arm"], found["seed"]) == ("Hi?", "Go away.", "m", 1), path


def test_answers_under_several_system_prompts_are_several_prompts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": "Hi?", "answer": "x", "system": s, "finish": "stop"} for s in ("a", "b", "a")]
    path = lines(tmp_path / "a.jsonl", *rows)
    found = read_answers(path)
    assert found["prompt"].tolist() == ["Hi?/0", "Hi?/1", "Hi?/0"] and found["sample"].tolist() == [0, 0, 1]
    assert caplog.messages == [f"{path}: keys not read: finish"]
    for row, message in (
        ({"question": "Hi?", "answer": "x", "tools": [{}]}, "line 1: has 'tools'"),
        ({"question": "Hi?", "answer": "x", "response": "y"}, "both 'answer' and 'response'"),
    ):
        with pytest.raises(InputError, match=message):
            read_answers(lines(tmp_path / "bad.jsonl", row))
