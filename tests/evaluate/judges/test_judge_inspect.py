"""Question sets as inspect-ai tasks and back, with its mock model; skipped where it is not installed."""

import importlib.util
from pathlib import Path

import pytest

from persona_probe.data.chat import conversation
from persona_probe.errors import InputError
from persona_probe.evaluate.answers_file import read_answers
from persona_probe.evaluate.judges.inspect_ai import question_task, read_log
from persona_probe.evaluate.judges.replies import Item

HERE = importlib.util.find_spec("inspect_ai") is not None
needs_inspect = pytest.mark.skipif(not HERE, reason="inspect-ai is not installed")
PROMPTS = {"bored": conversation("I feel bored."), "wish": conversation("One wish?", system="Be brief.")}


@needs_inspect
def test_a_task_is_run_and_its_log_read_back(tmp_path: Path) -> None:
    from inspect_ai import eval as run_eval
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    outputs = [ModelOutput.from_content("mockllm/model", f"answer {n}") for n in range(4)]
    for output in outputs:
        output.usage = ModelUsage()  # else the mock model counts tokens, with a file from the net
    task = question_task("ours", PROMPTS, samples=2, question_hash="abc")
    model = get_model("mockllm/model", custom_outputs=outputs)
    [done] = run_eval(task, model=model, log_dir=str(tmp_path), display="none", max_connections=1, score=False)
    assert done.status == "success"
    found = read_log(next(tmp_path.glob("*.eval")))
    assert [(a.question_id, a.sample) for a in found] == [("bored", 0), ("bored", 1), ("wish", 0), ("wish", 1)]
    assert sorted(a.answer for a in found) == [f"answer {n}" for n in range(4)]
    assert found[2].messages == PROMPTS["wish"]
    assert found[2].item() == Item("One wish?", found[2].answer, "wish/0")
    assert {a.model for a in found} == {"mockllm/model"}
    assert {a.finish for a in found} == {"stop"}
    frame = read_answers(next(tmp_path.glob("*.eval")))
    assert frame["arm"].tolist() == ["mockllm/model"] * 4 and frame["sample"].tolist() == [0, 1, 0, 1]
    assert frame["question"].tolist() == ["I feel bored."] * 2 + ["One wish?"] * 2
    assert frame["answer"].tolist() == [a.answer for a in found] and frame["item"].tolist()[::2] == ["bored", "wish"]
    assert done.eval.metadata is not None and done.eval.metadata["question_hash"] == "abc"


@needs_inspect
def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no questions"):
        question_task("ours", {})
    with pytest.raises(InputError, match="no inspect-ai log"):
        read_log(tmp_path / "none.eval")


@pytest.mark.skipif(HERE, reason="inspect-ai is installed")
def test_without_the_extra_the_error_names_it(tmp_path: Path) -> None:
    for call in (lambda: question_task("ours", PROMPTS), lambda: read_log(tmp_path / "x.eval")):
        with pytest.raises(InputError, match=r"persona-probe\[inspect\]"):
            call()
