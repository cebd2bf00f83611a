"""The command line: help that helps, usage errors in one line, lists, and nothing heavy before a command runs."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import persona_probe
from persona_probe.cli import main
from persona_probe.cli.options import Command, Common, many
from persona_probe.data.load import SETS, load_rows
from tests.cli.parsing import commands, parse
from tests.factories import refusal, run_command

HEAVY = {"torch", "transformers", "sae_lens", "transformer_lens", "trl", "peft", "pandas", "plotly"}
COMMANDS = (
    *("demo", "run", "induce", "locate", "track", "realign", "evaluate", "report", "figures", "doctor", "watch"),
    *(
        "mitigate",
        "compare",
        "verify",
        "cite",
        "push",
        "pull",
        "adopt",
        "merge",
        "presets",
        "completion",
        "precision",
        "thoughts",
        "reinforcement",
        "label",
        "auto",
        "serve",
        "incidents",
    ),
)
BELOW = (
    *("saes list", "saes train", "saes check", "saes convert", "saes shrink", "sae check"),
    *("data list", "data check", "data screen"),
    *("judge fit", "judge validate", "monitor calibrate", "monitor study", "bench planted", "bench beyond"),
    *("world pretrain", "world organism", "world judge", "world sae", "world truth"),
    *(
        "world study files",
        "world study emergence",
        "world study training-map",
        "world study scale",
        "world study early-warning",
        "world study specificity",
        "world study rankers",
        "world study causal",
        "world study repair",
        "world study supervision",
        "world study reinforcement",
        "world study thoughts",
        "world study worlds",
        "world study corpus",
        "world study real-model",
        "world study beyond",
        "world study screening",
        "world study null",
        "world study tables",
    ),
)


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    run_command(*arguments)
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [*COMMANDS, *BELOW])
def test_help_has_an_example_and_the_common_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(output(capsys, *command.split(), "--help").split())
    assert all(f"{option} " in text for option in ("--out", "--seed", "--device", "--quiet", "-h, --help"))
    example = text.split("Example: ")[1].removeprefix("persona-probe ")
    assert example.replace("saes ", "sae ").startswith(command.replace("saes ", "sae "))


def test_every_command_has_an_example_that_the_parser_takes() -> None:
    examples = {name: command.example for name, command in commands()}
    assert len(examples) == len(COMMANDS) + len(BELOW) - 1  # `sae check` is `saes check`
    for name, example in examples.items():
        program, *arguments = shlex.split(example)
        context = parse(arguments)
        assert program == "persona-probe" and context.command.callback is not None, example
        assert context.command_path.split()[1:] == arguments[: len(name.split())], example


def test_every_command_of_the_contract_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "--help")
    assert [
        name for name in (*COMMANDS, "saes", "data", "judge", "monitor", "bench", "world") if f"\n  {name} " not in text
    ] == []


def test_the_name_of_the_program_or_of_a_group_alone_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys) == output(capsys, "--help")
    assert "screen" in output(capsys, "data")
    assert output(capsys, "sae") == output(capsys, "sae", "--help")
    assert output(capsys, "--version") == f"persona-probe {persona_probe.__version__}\n"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("indcue x", "unknown command 'indcue': did you mean 'induce' or 'incidents'?"),
        ("data chek x", "unknown command 'chek': did you mean 'check'?"),
        ("locate r --rankrs rise", "unknown option '--rankrs': did you mean '--rankers'"),
        ("locate", "missing argument 'RUN': see persona-probe locate --help"),
        ("locate a b", "got unexpected extra argument (b): see persona-probe locate --help"),
        ("locate r --rankers --cards 3", "--rankers needs a value: see persona-probe locate --help"),
        ("demo --out", "--out needs a value: see persona-probe demo --help"),
        ("demo --out --quiet", "--out needs a value: see persona-probe demo --help"),
        ("demo --seeds 0 x", "invalid value for '--seeds': 'x' is not a valid integer"),
        ("figures r --width pge", "invalid value for '--width' / '--preset': 'pge' is not one of 'column', 'page',"),
        ("judge fit x.yaml", "missing option '--data': see persona-probe judge fit --help"),
    ],
)
def test_a_usage_error_is_one_line(line: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys)(*line.split()).startswith(f"persona-probe: {error}")


@pytest.mark.parametrize(
    ("line", "name", "values"),
    [
        ("demo --seeds 0 1 2", "seeds", (0, 1, 2)),
        ("demo --seeds 0 --seeds 1 --seeds 2", "seeds", (0, 1, 2)),
        ("demo --seeds -1 2 --quiet", "seeds", (-1, 2)),
        ("demo --seeds=3", "seeds", (3,)),
        ("demo", "seeds", ()),
        ("realign r --data a b --stress triggers drift", "data", ("a", "b")),
        ("realign --data a b --stress triggers drift -- r", "stress", ("triggers", "drift")),
        ("figures --format html csv --out o r", "format", ("html", "csv")),
        ("figures r --format html csv --only arms", "format", ("html", "csv")),
        ("figures r", "format", ("html", "csv", "svg")),
        ("monitor calibrate c", "arms", ("correct",)),
        ("monitor calibrate c --arms a b", "arms", ("a", "b")),
        ("evaluate r --prices 2 8", "prices", (2.0, 8.0)),
        ("evaluate r", "prices", None),
    ],
)
def test_options_take_several_values(line: str, name: str, values: object) -> None:
    assert parse(line.split()).params[name] == values


def test_options_that_every_command_has_arrive_as_one_object() -> None:
    received: list[tuple[tuple[str, ...], Common]] = []

    @click.command(cls=Command, example="persona-probe made-up", out="Not used.")
    @many("--words")
    def made_up(words: tuple[str, ...], common: Common) -> None:
        """Nothing."""
        received.append((words, common))

    arguments = ["--words", "a", "b", "--out", "there", "--seed", "2", "--device", "cpu", "--quiet"]
    made_up.main(arguments, standalone_mode=False)
    made_up.main([], standalone_mode=False)
    assert received == [(("a", "b"), Common(Path("there"), 2, "cpu", True)), ((), Common())]


@pytest.mark.parametrize(
    "code",
    [
        "import persona_probe",
        "import persona_probe; dir(persona_probe)",
        "import click; from persona_probe.cli.commands import root; root.get_help(click.Context(root))",
        "from tests.cli.parsing import commands, parse; [parse([*name.split(), '--help']) for name, _ in commands()]",
    ],
)
def test_help_and_import_load_nothing_heavy(code: str) -> None:
    script = f"import sys; {code}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    place = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=place)
    modules = set(done.stdout.splitlines()[-1].split())
    assert modules & HEAVY == set() and "persona_probe" in modules


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "persona_probe.cli", "run", "nowhere.yaml", "--out", "/nowhere/at/all"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "persona-probe: no config at 'nowhere.yaml': give the path of a YAML file\n"


def test_an_interrupted_command_says_how_to_continue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("persona_probe.cli.loop.study_config", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["demo"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "persona-probe: stopped; the same command continues where it stopped\n"


def test_advice_fits_the_error_of_the_system(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, advice in (
        (OSError(28, "No space left on device", "runs/x"), "no space left on the disk (runs/x): free space or choose"),
        (PermissionError(13, "Permission denied", "runs/x"), "permission denied (runs/x): check the path, or choose"),
    ):
        monkeypatch.setattr("persona_probe.cli.loop.study_config", lambda name, error=error: raises(error))
        assert advice in refusal(capsys)("demo")


def raises(error: Exception) -> None:
    raise error


def test_data_list_shows_every_set_with_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(output(capsys, "data", "list", "--json"))
    assert [(row["set"], row["rows"]) for row in rows] == [(name, len(load_rows(name))) for name in SETS]
    assert all(row["use"] for row in rows) and "toxic" in rows[0]["columns"]
    table = output(capsys, "data", "list")
    assert all(name in table for name in SETS) and "training:" in table


def test_saes_list_names_each_shipped_sae(capsys: pytest.CaptureFixture[str]) -> None:
    shipped = sorted((Path(__file__).parents[2] / "saes").rglob("cfg.json"))
    rows = json.loads(output(capsys, "saes", "list", "--json"))
    assert len(rows) == len(shipped)
    for row, cfg in zip(rows, shipped, strict=True):
        assert row["sae"].startswith("saes/") and row["sae"].endswith(cfg.parent.name)
        assert row["model"] == "smollm2-135m-instruct" and 0.5 < row["explained_variance"] < 1
    assert "fits the model" in output(capsys, "saes", "list")


def test_data_check_of_a_packaged_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "persona_probe" / "data" / "sets" / "health_correct.jsonl"
    numbers = json.loads(output(capsys, "data", "check", str(path), "--json", "--out", str(tmp_path / "numbers.json")))
    assert numbers["rows"] == len(load_rows("health_correct")) and numbers["bad_rows"] == []
    assert json.loads((tmp_path / "numbers.json").read_text()) == numbers


def test_data_check_of_bad_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a?", "answer": "b"}\n{"text": "c"}\n')
    with pytest.raises(SystemExit) as stopped:
        main(["data", "check", str(path), "--json"])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    message = "1 of 2 rows are not conversations: fix them (--json lists all)"
    assert captured.err == f"persona-probe: {path}: {message}\n"
    assert json.loads(captured.out)["bad_rows"][0].startswith("line 2: ")


def test_data_check_counts_each_problem_and_shows_three(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a?", "answer": "b"}\n' + '{"text": "c"}\n' * 40)
    with pytest.raises(SystemExit):
        main(["data", "check", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 8 and lines[0].startswith(f"{path}: 1 conversations, 2 turns")
    assert lines[-1].startswith("40 bad: ") and lines[-1].endswith("line 2, line 3, line 4 and 37 more")


def test_a_shell_is_told_the_commands() -> None:
    environment = {**os.environ, "_PERSONA_PROBE_COMPLETE": "bash_complete", "COMP_WORDS": "persona-probe dat"}
    asked = [sys.executable, "-m", "persona_probe.cli"]
    done = subprocess.run(asked, env={**environment, "COMP_CWORD": "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "plain,data")


def test_the_script_of_each_shell_names_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_PERSONA_PROBE_COMPLETE" in output(capsys, "completion", shell)


@pytest.mark.parametrize("words", ["doctor", "compare nowhere other", "cite nowhere", "data list"])
def test_a_quick_command_loads_no_torch(words: str) -> None:
    script = f"import sys; from persona_probe.cli import main\ntry: main({words.split()})\n"
    script += "except SystemExit: print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "False"


def test_data_check_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(capsys)("data", "check", "nowhere.jsonl")
    assert error == "persona-probe: nowhere.jsonl does not exist: check the path of the data file"
