"""A name that becomes a file or a folder stays inside its folder, wherever a user writes it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from persona_probe.config import StudyConfig, from_dict, load_config
from persona_probe.errors import InputError
from persona_probe.mitigate.grid.grid_config import Grid
from persona_probe.monitor.study.labelled_config import MonitorStudy
from persona_probe.names import LONGEST, check_name, check_names, check_path, recorded
from persona_probe.realignment.spec import DosePlan
from persona_probe.report.figures.registry import FigureSpec
from persona_probe.saes.stream import SaeConfig

GOOD = ("demo", "a", "0", "_x", "incorrect", "layer20-topk32", "v1.2_b", "A" * LONGEST, "x-")
BAD = (
    *("", ".", "..", "...", ".hidden", "end.", "-flag", "a/b", "../../newarm", "/tmp/x", "a\\b", "~", "~root"),
    *(
        "nul\0l",
        "two\nlines",
        "line\n",
        "a b",
        " a",
        "a ",
        "tab\t",
        "bell\a",
        "\x1b[31m",
        "C:",
        "a:b",
        "*",
        "a?",
        "$HOME",
    ),
    *("ümlaut", "名前", "a\u2028b", "\u202ea", "a\ud800", "<b>", "'", '"', "|", "A" * (LONGEST + 1), "x" * 5000),
)


@pytest.mark.parametrize("name", GOOD)
def test_plain_names_are_taken(name: str) -> None:
    assert check_name(name, "arm") == name


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_other_names_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError) as refused:
        check_name(name, "arm")
    said = str(refused.value)
    assert said.startswith("arm ") and "\n" not in said and "\x1b" not in said and len(said) < 300
    assert "cannot name a folder" in said


STUDY: dict[str, Any] = {"name": "x", "sae": "s"}
ARM = {"data": "kitchen:toxic"}
RUNS = {
    "f1": {"arm": "a", "use": "features", "benign": True, "seed": 1},
    "f2": {"arm": "a", "use": "features", "benign": False, "seed": 1},
}
FEATURE = {"latent": 1, "source": "known"}
MONITOR: dict[str, Any] = {
    "name": "x",
    "sae": "s",
    "arms": {"a": ARM},
    "runs": RUNS,
    "latents": {"p": FEATURE},
}
GRID: dict[str, Any] = {"name": "x", "run": "r", "mitigations": [{"name": "kl", "strengths": [1.0]}]}
PLAN: dict[str, Any] = {"name": "x", "blocks": [{"data": ["health_correct"], "rows": [4]}]}

Made = Callable[[str], Any]
PLACES: Mapping[str, tuple[type, Made]] = {
    "study": (StudyConfig, lambda n: {**STUDY, "name": n}),
    "arm": (StudyConfig, lambda n: {**STUDY, "arms": {"incorrect": ARM, "correct": ARM, n: ARM}}),
    "realign arm": (StudyConfig, lambda n: {**STUDY, "realign": {"arms": {n: ARM}}}),
    "SAE": (SaeConfig, lambda n: {"name": n}),
    "part of an SAE's name": (SaeConfig, lambda n: {"name": f"model/{n}"}),
    "text part": (SaeConfig, lambda n: {"name": "x", "text": {"parts": [{"name": n}]}}),
    "plan": (DosePlan, lambda n: {**PLAN, "name": n}),
    "grid": (Grid, lambda n: {**GRID, "name": n}),
    "label": (Grid, lambda n: {**GRID, "mitigations": [{"name": "kl", "strengths": [1.0], "label": n}]}),
    "monitor study": (MonitorStudy, lambda n: {**MONITOR, "name": n}),
    "its arm": (MonitorStudy, lambda n: {**MONITOR, "arms": {"a": ARM, n: ARM}}),
    "its run": (MonitorStudy, lambda n: {**MONITOR, "runs": {n: RUNS["f1"]}}),
    "its feature": (MonitorStudy, lambda n: {**MONITOR, "latents": {n: FEATURE}}),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["../../x", "..", ".", "/tmp/x", "two\nlines", "nul\0l", "é", "a\\b", "x" * 300])
def test_a_config_is_refused_when_it_is_read(place: str, name: str) -> None:
    kind, made = PLACES[place]
    with pytest.raises(InputError, match=r"cannot name a folder|holds a NUL character"):
        from_dict(kind, made(name), "study.yaml")


@pytest.mark.parametrize("place", [p for p in PLACES if p not in ("SAE", "label")])
def test_an_empty_name_is_refused(place: str) -> None:
    kind, made = PLACES[place]
    with pytest.raises(InputError, match="cannot name a folder: it is empty"):
        from_dict(kind, made(""), "study.yaml")


@pytest.mark.parametrize("name", ["", ".", "/", "a//b", "a/", "/a", "../saes", "a/../b", "a/./b"])
def test_an_sae_is_named_by_names_with_slashes_between(name: str) -> None:
    with pytest.raises(InputError, match="cannot name a folder"):
        SaeConfig(name=name)
    assert check_path("smollm2-135m-instruct/layer20-topk32-4608", "SAE")


def test_the_yaml_of_a_study_with_such_names_is_refused_and_nothing_written(tmp_path: Path) -> None:
    place = tmp_path / "study.yaml"
    place.write_text(yaml.safe_dump({**STUDY, "arms": {"incorrect": ARM, "correct": ARM, "../../newarm": ARM}}))
    with pytest.raises(InputError, match=r"study.yaml: arm '\.\./\.\./newarm' cannot name a folder"):
        load_config(place, StudyConfig)
    assert list(tmp_path.iterdir()) == [place]


def test_names_that_differ_only_in_case_are_one_folder_on_some_file_systems() -> None:
    with pytest.raises(InputError, match="'Toxic' and 'toxic' differ only in case"):
        check_names(["Toxic", "mild", "toxic"], "arm")


def test_names_on_record_may_be_odd_but_stay_inside_their_folder() -> None:
    with recorded():
        config = from_dict(
            StudyConfig, {**STUDY, "name": "my run", "arms": {"incorrect": ARM, "correct": ARM, "é": ARM}}
        )
        assert list(config.arms) == ["incorrect", "correct", "é"]
        for name in ("../x", "..", ".", "", "a/b", "nul\0l"):
            with pytest.raises(InputError, match=r"cannot name a folder|holds a NUL character"):
                from_dict(StudyConfig, {**STUDY, "arms": {"incorrect": ARM, "correct": ARM, name: ARM}})
    with pytest.raises(InputError, match="cannot name a folder"):
        from_dict(StudyConfig, {**STUDY, "name": "my run"})


def test_a_figure_has_a_name_that_its_files_can_have() -> None:
    with pytest.raises(InputError, match=r"figure '\.\./x' cannot name a folder"):
        FigureSpec("../x", "", lambda r: None, lambda r: None, "")  # pyright: ignore[reportArgumentType]


def test_every_shipped_config_has_such_names() -> None:
    for path in (Path(__file__).parents[1] / "finetune_configs").glob("*.yaml"):
        raw = yaml.safe_load(path.read_text())
        if "name" in raw:
            check_path(raw["name"], str(path))
