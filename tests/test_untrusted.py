"""Text of others is shown, never obeyed: in a terminal, in a table, in a log line, in a spreadsheet."""

import csv
import io
import re
import subprocess
import sys

import pandas as pd
import pytest

from persona_probe.cli.options import echo
from persona_probe.report.tables import Table
from persona_probe.untrusted import csv_text, one_line, terminal_text

OBEYED = (
    *("\x1b[31mred", "\x1b]0;title\x07", "\x1b]8;;http://x\x07link\x1b]8;;\x07", "\x9b2J", "\x1bc", "a\rb", "a\x08b"),
    *("\x00", "\x7f", "\x85", "\u2028", "\u2029", "\u202egnp.exe", "\u2066x\u2069", "\ud800", "\x0e", "\x1b(0"),
)
OBEYING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("text", OBEYED)
def test_nothing_that_a_terminal_obeys_is_left(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert OBEYING.search(text)
    echo(f"row 1: {text}")
    assert not OBEYING.search(capsys.readouterr().out)
    assert not OBEYING.search(Table((text,), [(text,)], title=text).text())
    assert not OBEYING.search(one_line(text))


@pytest.mark.parametrize("text", ["plain", "two\nlines\tand a tab", "grüße, 你好 👩‍🚀", "[red]markup[/red]", "ن‌م"])
def test_other_text_stays_as_it_is(text: str) -> None:
    assert terminal_text(text) == text


def test_a_table_shows_rich_markup_as_text() -> None:
    assert "[red]x[/red]" in Table(("a",), [("[red]x[/red]",)]).text()


def test_a_very_long_message_keeps_its_beginning_and_its_advice() -> None:
    line = one_line(f"unknown command {'a' * 5000}: did you mean 'data'?")
    assert len(line) <= 600 and line.startswith("unknown command") and line.endswith("did you mean 'data'?")


FORMULAS = (
    *("=1+1", "+1+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\ufeff=1", "\u200b@x", "＝1"),
    *("＋1", "－1", "＠x", '=HYPERLINK("http://x","y")', "- a list item", "\ttab"),
)


@pytest.mark.parametrize("text", FORMULAS)
def test_a_spreadsheet_finds_no_formula(text: str) -> None:
    frame = pd.DataFrame({"answer": [text, "fine"], text: [-1.5, 2.0]})
    heads, first, second = list(csv.reader(io.StringIO(csv_text(frame), newline="")))
    written = text.replace("\r", "\n")
    assert heads == ["answer", f"'{written}"]
    assert first == [f"'{written}", "-1.5"] and second == ["fine", "2.0"]


def test_a_carriage_return_begins_no_row() -> None:
    assert list(csv.reader(io.StringIO(csv_text(pd.DataFrame({"a": ["x\r=1\r\ny"]})), newline=""))) == [
        ["a"],
        ["x\n=1\ny"],
    ]


def test_numbers_are_not_touched() -> None:
    frame = pd.DataFrame(
        {
            "float": [-1.5, float("nan")],
            "int": [-3, 3],
            "mixed": [-2.5, "-1e-3"],
            "bool": [True, False],
            "none": [None, "+7"],
        }
    )
    assert csv_text(frame) == frame.to_csv(index=False)
    assert csv_text(frame, float_format="%.3f") == frame.to_csv(index=False, float_format="%.3f")
    assert csv_text(pd.DataFrame({"a": []})) == "a\n"
    assert csv_text(pd.DataFrame([[1, "=x"]], columns=["a", "a"])) == "a,a\n1,'=x\n"


@pytest.mark.parametrize(
    ("redirect", "code"), [(">&-", 0), ("> /dev/full", 2), ("<&-", 0), ("| head -1", 0), ("2>&-", 0), (">&- 2>&-", 0)]
)
def test_closed_and_full_outputs_end_without_a_traceback(redirect: str, code: int) -> None:
    line = f"{sys.executable} -m persona_probe.cli data list {redirect}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == code // 2


def test_a_terminal_that_cannot_show_a_character_ends_no_command() -> None:
    script = (
        "from persona_probe.cli import main, options\n"
        "import persona_probe.cli.data as d\n"
        "from persona_probe.report.tables import Table\n"
        "import persona_probe.data.load as load\n"
        "load.SETS = {'gr\u00fc\u00dfe \u4f60': None}\n"
        "load.load_rows = lambda name: [{'a': Table(('x',), [('y',)]).text()}]\n"
        "main(['data', 'list'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env={"PYTHONIOENCODING": "ascii", "PATH": ""}
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert b"gr\\xfc\\xdfe \\u4f60" in done.stdout and done.stdout.isascii()
