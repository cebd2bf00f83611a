"""The hops tool counts the files whose functions a call enters, and nothing that only an import runs."""

from itertools import islice
from pathlib import Path

from persona_probe.data.chat import conversation
from tools.hops import Hops, entered, measure, table


def test_only_functions_of_the_package_count() -> None:
    with entered() as codes:
        sorted(conversation("What now?"), key=str)

        class Body:
            value = conversation("A class body is not a function.")

    assert {Path(code.co_filename).name for code in codes} == {"chat.py"} and Body.value
    assert "conversation" in {code.co_name for code in codes}


def test_the_calls_are_measured_on_the_tiny_study(tmp_path: Path) -> None:
    judge, induce = islice(measure(tmp_path), 2)
    assert judge.room == "evaluate" and 3 <= judge.own <= judge.files < 15 < judge.functions
    assert induce.room == "finetune" and 2 <= induce.own <= induce.files < 30 < induce.functions
    lines = table([Hops("`f()`", 3, "data", 2, 9)]).splitlines()
    assert lines[0].count("|") == lines[2].count("|") and lines[2] == "| `f()` | 3 | 2 in `data/` | 9 |"
