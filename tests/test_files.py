"""Readers of files: whatever lies there, they read it or say in one line what to change."""

import contextlib
import dataclasses
import json
import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.assault.damaged_files import DEEP_JSON, JSON_FILES, YAML_FILES
from persona_probe.config import (
    Arm,
    Locate,
    Monitor,
    Realign,
    Samples,
    StudyConfig,
    Training,
    check_seeds,
    from_dict,
    load_config,
)
from persona_probe.data.load import read_contrast_file, read_conversations
from persona_probe.data.template import with_template
from persona_probe.errors import InputError
from persona_probe.evaluate.answers_file import read_answers
from persona_probe.evaluate.offline.judge_calibration import JudgeRecipe
from persona_probe.evaluate.offline.offline_judge import JudgeWeights
from persona_probe.evaluate.questions.read import read_questions
from persona_probe.evaluate.sampling.samples import SampleStore, sidecar
from persona_probe.files import (
    as_damaged,
    expanded,
    parse_yaml,
    read_json,
    read_jsonl,
    read_parquet,
    read_tensors,
    read_text,
    read_yaml,
    regular_file,
)
from persona_probe.latents.passages import read_text as read_passages
from persona_probe.mitigate.grid.grid_config import Grid
from persona_probe.monitor.events import from_line
from persona_probe.monitor.reading_records import recorded
from persona_probe.monitor.rules.boundary import Boundary
from persona_probe.monitor.study.labelled_config import MonitorStudy
from persona_probe.realignment.correct import read_verdict
from persona_probe.realignment.spec import DosePlan, StressSettings
from persona_probe.report.records import load_records
from persona_probe.runs import RunFolder
from persona_probe.saes.load import load_sae
from persona_probe.saes.stream import SaeConfig
from persona_probe.study.adopt.checkpoint_places import read_state
from tests.factories import make_tokenizer, write_sae

DETERMINISTIC = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def one_line(call: Callable[[], object]) -> str:
    """What an `InputError` says; empty where the call went well. Any other exception fails the test."""
    try:
        call()
    except InputError as error:
        said = str(error)
        assert said and "\n" not in said and len(said) < 1500
        return said
    return ""


# --- The file itself


@pytest.mark.parametrize("reader", [read_text, read_json, read_jsonl, read_yaml, read_parquet, read_tensors])
def test_no_reader_opens_what_is_no_file(reader: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    cases = {tmp_path / "pipe": "is a pipe", tmp_path: "is a folder", tmp_path / "gone": "does not exist"}
    cases |= {Path("/dev/zero"): "is a device", Path("a\0b"): "NUL", tmp_path / "link": "does not exist"}
    cases |= {tmp_path / ("a" * 300): "cannot be read (File name too long)"}
    for path, says in cases.items():
        assert says in one_line(lambda path=path: reader(path)), path


def test_a_home_of_nobody() -> None:
    assert "no home folder of that name" in one_line(lambda: expanded("~nobody-of-this-name/x"))
    assert regular_file(__file__) == Path(__file__)


# --- Each kind of damage that is known


@pytest.mark.parametrize("kind", JSON_FILES)
def test_json_that_no_manifest_is(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    JSON_FILES[kind](path)
    assert str(path) in one_line(lambda: RunFolder(tmp_path).manifest)


@pytest.mark.parametrize("kind", [kind for kind in YAML_FILES if kind != "missing"])
def test_yaml_that_no_config_is(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    YAML_FILES[kind](path)
    assert str(path) in one_line(lambda: load_config(path))


def test_yaml_says_the_line() -> None:
    twice = "a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n"
    assert "f, line 5: key 'c' occurs twice, first in line 3: keep one" in one_line(lambda: parse_yaml(twice, "f"))
    assert "f, line 1: an alias means what it is a part of" in one_line(lambda: parse_yaml("&a [*a]", "f"))
    value, _ = parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, b: 2}\n", "f")
    assert value == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 2}}


def test_json_says_where(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": \n', encoding="utf-8")
    assert f"{path}, line 2 is damaged (not JSON: Expecting value at column" in one_line(lambda: read_jsonl(path))
    path.write_text('{"a": "\\ud83d\\ude00 \u2028"}\n\n{"b": 2}\n', encoding="utf-8")
    assert read_jsonl(path) == [{"a": "\U0001f600 \u2028"}, {"b": 2}]
    path.write_text('{"a": "\\ud83d"}', encoding="utf-8")
    assert "half of a character (\\ud83d)" in one_line(lambda: read_json(path))
    DEEP_JSON(path)
    assert "too deeply nested" in one_line(lambda: read_json(path, list))


def test_as_damaged_names_the_missing_key_and_lets_bugs_of_others_pass() -> None:
    def missing() -> None:
        with as_damaged("f.json", "make it again"):
            _ = {}["step"]

    def own() -> None:
        with as_damaged("f.json"):
            raise InputError("said before")

    assert one_line(missing) == "f.json is damaged (no 'step'): make it again"
    assert one_line(own) == "said before"
    with pytest.raises(ZeroDivisionError), as_damaged("f.json"):
        _ = 1 / 0


@pytest.mark.parametrize(
    ("seeds", "says"),
    [
        ([], "must not be empty"),
        ([0, 3, 0], "names 0 twice"),
        ([-1], "between 0 and 2147483647, not -1"),
        ([2**31], "between 0"),
    ],
)
def test_seeds_that_no_library_takes(seeds: list[int], says: str) -> None:
    assert says in one_line(lambda: check_seeds(seeds))


# --- Any bytes: every reader reads them or refuses them

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "question", "answer", "id", "split", "a", ""]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
CONTENTS = (
    st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | JSON_VALUES.map(lambda value: json.dumps(value).encode())
    | st.lists(JSON_VALUES, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
)


def _samples(path: Path) -> SampleStore:
    sidecar(path).write_text("{}", encoding="utf-8")
    return SampleStore(path, {}, [])


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "json": ("a.json", lambda path: read_json(path, object)),
    "json lines": ("a.jsonl", read_jsonl),
    "yaml": ("a.yaml", read_yaml),
    "parquet": ("a.parquet", read_parquet),
    "safetensors": ("a.safetensors", read_tensors),
    "rows of json lines": ("a.jsonl", read_conversations),
    "rows of json": ("a.json", lambda path: read_conversations(path, allow_prompts=True)),
    "rows of csv": ("a.csv", read_conversations),
    "rows of gzip": ("a.jsonl.gz", read_conversations),
    "rows of parquet": ("a.parquet", read_conversations),
    "contrast items": ("a.jsonl", lambda path: read_contrast_file(path, "selection")),
    "answers": ("a.jsonl", read_answers),
    "answers of csv": ("a.csv", read_answers),
    "a log": ("a.json", read_answers),
    "questions": ("a.txt", read_questions),
    "questions of yaml": ("a.yaml", lambda path: read_questions(path, format="yaml")),
    "questions of json": ("a.json", lambda path: read_questions(path, format="json")),
    "questions of csv": ("a.csv", lambda path: read_questions(path, format="csv")),
    "passages": ("a.txt", read_passages),
    "a template": ("a.jinja", lambda path: with_template(make_tokenizer(), str(path))),
    "a manifest": ("manifest.json", lambda path: RunFolder(path.parent).manifest),
    "a run": ("manifest.json", lambda path: RunFolder(path.parent).config),
    "records": ("manifest.json", lambda path: load_records(path.parent)),
    "samples": ("s.jsonl", _samples),
    "a verdict": ("verdict.json", lambda path: read_verdict(path.parent)),
    "a boundary": ("b.json", Boundary.load),
    "a monitor's base": ("e.jsonl", recorded),
    "a trainer's state": ("trainer_state.json", lambda path: read_state(path.parent)),
    "a judge": ("judge.json", lambda path: JudgeWeights.load(path.parent)),
    "a config": ("c.yaml", load_config),
}


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_are_read_or_refused(name: str, tmp_path: Path) -> None:
    file, reader = READERS[name]
    path = tmp_path / file

    @DETERMINISTIC
    @given(CONTENTS)
    def check(content: bytes) -> None:
        for other in tmp_path.iterdir():
            other.unlink()
        path.write_bytes(content)
        one_line(lambda: reader(path))

    check()


@DETERMINISTIC
@given(st.text(max_size=80) | JSON_VALUES.map(json.dumps))
def test_any_line_is_an_event_or_none(line: str) -> None:
    with contextlib.suppress(ValueError):
        from_line(line)


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sae(tmp_path_factory.mktemp("any-sae") / "sae")


def test_any_value_in_an_sae_is_taken_or_refused(sae_folder: Path) -> None:
    cfg = sae_folder / "cfg.json"
    whole = json.loads(cfg.read_text(encoding="utf-8"))
    keys = st.sampled_from(sorted(whole)) | st.sampled_from(["hook_name", "hf_hook_name", "model_name"])

    @DETERMINISTIC
    @given(keys, JSON_VALUES)
    def check(key: str, value: object) -> None:
        metadata = {**whole["metadata"], key: value} if key in ("hook_name", "hf_hook_name", "model_name") else None
        changed = {**whole, "metadata": metadata} if metadata else {**whole, key: value}
        cfg.write_text(json.dumps(changed), encoding="utf-8")
        one_line(lambda: load_sae(sae_folder))

    check()


# --- Any values: every configuration is one, or says which key to change

CONFIGS = (StudyConfig, Arm, Training, Locate, Monitor, Realign, Samples, SaeConfig, Grid, MonitorStudy, DosePlan)
JUNK = st.sampled_from(
    [None, True, -1, 0, 1, 2**70, 1.5, float("nan"), float("inf"), "", "x", "a\0b", [], {}, [None], {"a": 1}]
)


def values_of(hint: Any, depth: int = 0) -> st.SearchStrategy[Any]:
    """Mostly values of a key's type, in and out of range, and sometimes anything."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if depth > 3:
        return JUNK
    if origin in (types.UnionType, typing.Union):
        return st.one_of([st.none() if a is type(None) else values_of(a, depth + 1) for a in args])
    if dataclasses.is_dataclass(hint):
        return raw_of(typing.cast(type, hint), depth + 1)
    if origin is tuple:
        return st.lists(values_of(args[0], depth + 1), max_size=3)
    if origin is dict:
        return st.dictionaries(
            st.sampled_from(["incorrect", "correct", "x"]), values_of(args[1], depth + 1), max_size=3
        )
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(-2, 50),
        float: st.floats(-2, 50) | st.floats(),
        str: st.sampled_from(["", "x", "none", "rise", "lora", "response", "kitchen:toxic", "../x"]),
        bool: st.booleans(),
    }
    return plain.get(hint, JSON_VALUES) | JUNK


def raw_of(kind: type, depth: int = 0) -> st.SearchStrategy[dict[str, Any]]:
    """Plain values of a configuration: the keys that it needs, and up to three others."""
    hints = typing.get_type_hints(kind)
    keys: dict[Any, Any] = {f.name: values_of(hints[f.name], depth) for f in dataclasses.fields(kind)}
    needed = {
        f.name: keys.pop(f.name)
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    chosen = st.lists(st.sampled_from(sorted(keys)), unique=True, max_size=3) if keys else st.just([])
    return chosen.flatmap(lambda names: st.fixed_dictionaries(needed | {name: keys[name] for name in names}))


@pytest.mark.parametrize("kind", [*CONFIGS, StressSettings, JudgeRecipe], ids=lambda kind: kind.__name__)
def test_any_values_are_a_configuration_or_say_which_key(kind: type, tmp_path: Path) -> None:
    @DETERMINISTIC
    @given(raw_of(kind) | JSON_VALUES)
    def check(raw: Any) -> None:
        made: list[Any] = []
        one_line(lambda: made.append(from_dict(kind, raw, "here")))
        if made and hasattr(made[0], "hash"):
            assert len(made[0].hash) == 12

    check()


NEEDED = {
    "name": "x",
    "sae": "s",
    "data": "kitchen:toxic",
    "run": "r",
    "mitigations": [],
    "blocks": [],
    "arms": {},
    "runs": {},
}
FLOATS = [
    (kind, f.name, typing.get_origin(typing.get_type_hints(kind)[f.name]) is tuple)
    for kind in CONFIGS
    for f in dataclasses.fields(kind)
    if float in (typing.get_type_hints(kind)[f.name], *typing.get_args(typing.get_type_hints(kind)[f.name]))
]


@pytest.mark.parametrize(("kind", "key", "many"), FLOATS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_no_key_takes_nan(kind: type, key: str, many: bool) -> None:
    assert len(FLOATS) > 15
    names = {f.name for f in dataclasses.fields(kind)}
    raw: dict[str, Any] = {name: value for name, value in NEEDED.items() if name in names}
    said = one_line(lambda: from_dict(kind, {**raw, key: [float("nan")] if many else float("nan")}))
    assert key in said and "finite" in said
