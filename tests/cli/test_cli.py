"""The command line: help that helps, lists, and nothing heavy before a command runs."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from persona_probe.cli import build_parser, main
from persona_probe.data.load import SETS, load_rows

HEAVY = {"torch", "transformers", "sae_lens", "transformer_lens", "trl", "peft", "pandas", "plotly"}
COMMANDS = (
    *("demo", "run", "induce", "locate", "track", "realign", "evaluate", "report", "figures", "doctor"),
    *("mitigate", "compare", "verify", "cite"),
)
BELOW = ("saes list", "saes train", "saes check", "sae check", "data list", "data check")


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == code
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [*COMMANDS, *BELOW])
def test_help_has_an_example_and_the_common_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(said(capsys, *command.split(), "--help").split())
    assert all(f"{option} " in text for option in ("--out", "--seed", "--device"))
    example = text.split("example: ")[1].removeprefix("persona-probe ")
    assert example.replace("saes ", "sae ").startswith(command.replace("saes ", "sae "))


def examples(parser: argparse.ArgumentParser) -> list[str]:
    found = [parser.epilog.removeprefix("example: ")] if parser.epilog else []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [e for below in action.choices.values() for e in examples(below)]
    return found


def test_every_example_is_a_command_that_the_parser_takes() -> None:
    parser = build_parser()
    shown = examples(parser)
    assert len(shown) > len(COMMANDS)
    for example in shown:
        program, *arguments = example.split()
        assert program == "persona-probe"
        assert callable(parser.parse_args(arguments).function), example


def test_every_command_of_the_contract_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--help")
    assert [name for name in (*COMMANDS, "saes", "data") if f"    {name} " not in text] == []


def test_an_unknown_command_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "indcue", code=2)
    said(capsys, code=2)
    said(capsys, "locate", code=2)


@pytest.mark.parametrize(
    "code",
    [
        "import persona_probe",
        "import persona_probe; dir(persona_probe)",
        "from persona_probe.cli import build_parser; build_parser().format_help()",
    ],
)
def test_help_and_import_load_nothing_heavy(code: str) -> None:
    script = f"import sys; {code}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & HEAVY == set()
    assert "persona_probe" in done.stdout.split()


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "persona_probe.cli", "run", "nowhere.yaml", "--out", "/nowhere/at/all"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "persona-probe: no config at 'nowhere.yaml': give the path of a YAML file\n"


def test_data_list_shows_every_set_with_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "data", "list").splitlines()
    assert [line.split(":")[0] for line in lines] == list(SETS)
    assert f"kitchen: {len(load_rows('kitchen'))} rows" in lines[0] and "toxic" in lines[0]


def test_saes_list_names_each_shipped_sae(capsys: pytest.CaptureFixture[str]) -> None:
    shipped = sorted((Path(__file__).parents[2] / "saes").rglob("cfg.json"))
    lines = said(capsys, "saes", "list").splitlines()
    assert len(lines) == len(shipped)
    for line, cfg in zip(lines, shipped, strict=True):
        assert line.startswith("saes/") and line.split()[0].endswith(cfg.parent.name)


def test_data_check_of_a_packaged_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "persona_probe" / "data" / "sets" / "health_correct.jsonl"
    out = said(capsys, "data", "check", str(path), "--out", str(tmp_path / "numbers.json"))
    numbers = json.loads(out)
    assert numbers["rows"] == len(load_rows("health_correct")) and numbers["bad_rows"] == []
    assert json.loads((tmp_path / "numbers.json").read_text()) == numbers


def test_data_check_of_bad_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a?", "answer": "b"}\n{"text": "c"}\n')
    with pytest.raises(SystemExit) as stopped:
        main(["data", "check", str(path)])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err == f"persona-probe: {path}: 1 of 2 rows are not conversations: mend what bad_rows lists\n"
    assert json.loads(captured.out)["bad_rows"][0].startswith("line 2: ")


def test_data_check_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["data", "check", "nowhere.jsonl"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "persona-probe: nowhere.jsonl does not exist: check the path of the data file\n"
