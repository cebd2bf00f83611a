"""How many files of the package a reader follows: those whose functions one call enters, on the tests' tiny study.

python -m tools.hops
"""

import importlib
import inspect
import os
import pkgutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import persona_probe

PACKAGE = Path(persona_probe.__file__).parent
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")


@contextmanager
def entered() -> Iterator[set[CodeType]]:
    """Collect the functions of the package that this thread enters."""
    codes: set[CodeType] = set()
    add, before = codes.add, sys.getprofile()

    def profile(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call":
            add(frame.f_code)

    sys.setprofile(profile)
    try:
        yield codes
    finally:
        sys.setprofile(before)
        codes -= {code for code in codes if not _is_function(code)}


def _is_function(code: CodeType) -> bool:
    """Whether this is a function of the package. Bodies of modules and classes run once, and nobody follows them."""
    inside = Path(code.co_filename).is_relative_to(PACKAGE)
    return inside and bool(code.co_flags & inspect.CO_OPTIMIZED) and code.co_name not in COMPREHENSIONS


@dataclass(frozen=True)
class Hops:
    """What one call enters."""

    call: str
    files: int
    room: str
    """Folder of the call's subject."""
    own: int
    """Files in that folder."""
    functions: int


def measure(folder: Path) -> Iterator[Hops]:
    """The hops of the package's main calls, on the tiny study that is made in a folder."""
    _import_all()  # so that a first import does not count
    from persona_probe.evaluate.judges.local import LocalBackend
    from persona_probe.evaluate.judges.replies import Item
    from persona_probe.evaluate.judging import AnswerToJudge, JudgeOptions, scored_judge
    from persona_probe.monitor.monitor import FeatureMonitor
    from persona_probe.study.study import Study
    from persona_probe.writing import write_json
    from tests.factories import config_of, make_model, make_tokenizer, write_config, write_data, write_model, write_sae

    write_model(folder / "model")
    write_sae(folder / "sae")
    write_data(folder)
    questions = {"name": "two", "questions": [{"id": f"q{n}", "question": f"What of {n}?"} for n in range(2)]}
    write_json(folder / "questions.json", questions)
    study = Study.from_yaml(write_config(folder / "study.yaml", {**config_of(folder), "seeds": [0]}), folder / "run")
    options = JudgeOptions(cache=folder / "judgements.sqlite")
    model, tokenizer = make_model(), make_tokenizer()
    judge = scored_judge("local:tiny", LocalBackend(model, tokenizer, "tiny"), options)
    answer = AnswerToJudge(Item("What now?", "Nothing."))

    def hops(call: str, room: str, function: Callable[[], object]) -> Hops:
        with entered() as codes:
            function()
        files = {Path(code.co_filename).relative_to(PACKAGE) for code in codes}
        return Hops(call, len(files), room, sum(path.parts[0] == room for path in files), len(codes))

    yield hops("`judge.rule([answer])`", "evaluate", lambda: judge.rule([answer]))
    yield hops("`study.induce()`", "finetune", study.induce)
    yield hops("`study.locate()`", "latents", study.locate)
    yield hops("`study.realign()`", "realignment", study.track().realign)
    monitor = FeatureMonitor.from_study(study, every=1)
    monitor.start(model, tokenizer)
    yield hops("`monitor.read(model, 1)`", "monitor", lambda: monitor.read(model, 1))
    yield hops("`study.report()`", "report", study.evaluate().report)
    yield hops(
        "`study.evaluate(questions, judge)`",
        "evaluate",
        lambda: study.evaluate(folder / "questions.json", judge, 1, max_new_tokens=2, options=options),
    )


def _import_all() -> None:
    for module in pkgutil.walk_packages(persona_probe.__path__, "persona_probe."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:  # an extra that is not installed
            if (error.name or "").startswith("persona_probe"):
                raise


def table(rows: Iterable[Hops]) -> str:
    """As a Markdown table."""
    lines = ["| call | files | of them in its room | functions |", "|---|---|---|---|"]
    lines += [f"| {row.call} | {row.files} | {row.own} in `{row.room}/` | {row.functions} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table."""
    from persona_probe.models.quiet import quiet_libraries

    quiet_libraries()
    os.environ["BROWSER_PATH"] = "/nowhere"  # images would be drawn by a browser, which takes long
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(table(measure(Path(folder))))


if __name__ == "__main__":
    main()
