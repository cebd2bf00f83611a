"""`run --json` and `realign --json` of a study that is finished: nothing is trained again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from persona_probe.study.study import Study
from tests.factories import run_command


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    run_command(*arguments)
    return json.loads(capsys.readouterr().out)


def test_run_and_realign_print_what_the_folder_holds(
    finished: Study,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")
    mine = Path(shutil.copytree(finished.path, tmp_path / "run"))
    said = printed(capsys, "run", place / "study.yaml", "--out", mine, "--json")
    assert said["run"] == str(mine) and said["report"] == str(mine / "report.html")
    assert said["summary"]["headline"] == finished.run_folder.read_json("summary.json")["headline"]
    verdicts = printed(capsys, "realign", mine, "--json")["verdicts"]
    assert verdicts.keys() == finished.config.realign.arms.keys()
    assert all(verdict["statement"] for verdict in verdicts.values())
