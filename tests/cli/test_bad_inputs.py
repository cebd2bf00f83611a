"""Bad inputs on the command line: exit code 2, at most three lines, no traceback. `make assault` runs all of them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click
import pytest
from click.testing import CliRunner

from benchmarks.assault.damaged_files import Materials
from benchmarks.assault.inputs import BAD_INPUTS, BadInput, Outcome
from persona_probe.cli import main
from tests.made_once import made_once

FAST = (
    *("data check: ", "run: a config", "induce: a config", "mitigate: ", "monitor study: ", "sae train: a config"),
    *("realign --plan", "figures: ", "cite: ", "compare: ", "verify: ", "merge: ", "watch: ", "presets: "),
    "demo: a seed",
)
"""What is refused before a model loads."""
LIMIT_S = 60
COMMANDS = (
    *("demo", "run", "induce", "adopt", "locate", "track", "realign", "mitigate", "evaluate", "report", "figures"),
    *("compare", "merge", "verify", "cite", "watch", "doctor", "presets", "sae list", "sae train", "sae check"),
    *("sae convert", "sae shrink", "data check", "data screen", "judge fit", "judge validate", "monitor calibrate"),
    *("monitor study", "bench planted", "world pretrain", "world organism", "world judge", "world sae"),
    *("world truth", "world study"),
)


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def program(arguments: tuple[str, ...]) -> None:
    """The program as a command of click, for its runner; `main` is what exits."""
    main(arguments)


program.allow_interspersed_args = False


class Waits(Exception):
    """Not an OSError, which would be refused in one line as a good program does."""


@contextmanager
def alarm() -> Iterator[None]:
    """An error in place of waiting for ever, which a pipe that is opened would mean."""

    def ring(_: int, __: FrameType | None) -> None:
        raise Waits

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    return Materials(made_once(tmp_path_factory, "bad-inputs", Materials.make))


@pytest.mark.parametrize("case", [c for c in BAD_INPUTS if c.name.startswith(FAST)], ids=lambda case: case.name)
def test_a_bad_input_is_refused_in_one_line(
    case: BadInput, materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with alarm():
        result = CliRunner().invoke(program, case.build(materials, tmp_path))
    assert Outcome(result.exit_code, result.stderr).problem == "", result.stderr


def test_every_command_has_bad_inputs() -> None:
    assert len(BAD_INPUTS) >= 150 and len({case.name for case in BAD_INPUTS}) == len(BAD_INPUTS)
    assert [name for name in COMMANDS if not any(case.name.startswith(name) for case in BAD_INPUTS)] == []
