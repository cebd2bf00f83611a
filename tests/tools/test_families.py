"""The matrix of families tells a green cell, a refusal and a wrong value apart."""

from pathlib import Path

import pytest

from persona_probe.errors import InputError
from tools import families
from tools.families import Case, Row, close, main, measure, table


def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_: Case) -> str:
        raise InputError("give a template")

    def is_wrong(_: Case) -> str:
        return f"{close(1.0, 2.0, 'a score')}"

    known = {"green": lambda _: "ok", "slow": lambda _: "ok, whole forwards", "refused": refuses, "wrong": is_wrong}
    monkeypatch.setattr(families, "STEPS", known)


def test_cells_are_green_refused_or_red(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps(monkeypatch)
    row = measure("llama3", tmp_path)
    assert row.red == ("wrong",)
    assert row.cells["wrong"] == "RED: WrongValueError: a score is off by 1"
    text = table([row, Row("gpt2", dict.fromkeys(families.STEPS, "ok"), ())])
    assert "| Llama 3 | ✓ | ✓ (1) | (2) | (3) |" in text and "| GPT-2 | ✓ | ✓ | ✓ | ✓ |" in text
    assert "\n2. give a template\n" in text


def test_a_red_cell_fails_the_command_and_the_page_gets_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps(monkeypatch)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- families: begin -->\nold\n<!-- families: end -->\nafter\n", encoding="utf-8")
    assert main(["gpt2", "--page", str(page)]) == 1
    written = page.read_text("utf-8")
    assert written.startswith("before\n<!-- families: begin -->\n| family | green |") and written.endswith("after\n")
    assert "old" not in written and "| GPT-2 |" in capsys.readouterr().out


def test_the_first_steps_of_a_family_are_green(tmp_path: Path) -> None:
    case = Case("qwen3", tmp_path)
    assert [families.STEPS[name](case) for name in ("encode", "readings", "steer, ablate")] == ["ok"] * 3
