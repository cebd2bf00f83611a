"""The configuration: every rule speaks, every key counts, and files give back what they hold."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from persona_probe.config import Arm, StudyConfig, Training, from_dict, load_config
from persona_probe.errors import InputError

MINIMAL: dict[str, Any] = {"name": "demo", "sae": "saes/x"}


def nested(path: str, value: Any) -> dict[str, Any]:
    """MINIMAL with one value at a dotted path."""
    *parents, last = path.split(".")
    raw: dict[str, Any] = {**MINIMAL}
    inside = raw
    for key in parents:
        inside = inside.setdefault(key, {})
    inside[last] = value
    return raw


def test_files_give_back_what_they_hold(tmp_path: Path) -> None:
    config = from_dict(StudyConfig, {**MINIMAL, "seeds": [1, 2], "training": {"steps": 20, "checkpoints": "log"}})
    again = from_dict(StudyConfig, json.loads(json.dumps(asdict(config))))
    assert again == config and again.hash == config.hash
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(asdict(config)))
    assert load_config(path) == config


def test_whole_numbers_and_exponents_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("name: demo\nsae: saes/x\ntraining: {lr: 1e-4}\nlocate: {strengths: [1, 2]}\n")
    config = load_config(path)
    assert config.training.lr == 1e-4
    assert config.hash == from_dict(StudyConfig, nested("locate.strengths", [1.0, 2.0])).hash


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed", [1], "unknown key 'seed'.*did you mean.*'seeds'"),
        ("training.stesp", 3, "training: unknown key 'stesp'.*did you mean 'steps'"),
        ("arms.incorrect.dta", "x", "unknown key 'dta'"),
        ("arms.incorrect", {}, "key 'data' is missing"),
        ("training.rank", "32", "training: rank must be int, not '32'"),
        ("training.rank", True, "rank must be int, not True"),
        ("training.bf16", 1, "bf16 must be bool, not 1"),
        ("training.lr", "fast", "lr must be a number"),
        ("seeds", 1, "seeds must be a list, not 1"),
        ("training", 3, "training must be a mapping"),
        ("arms", [1], "arms must be a mapping"),
        ("model", 5, "model must be str"),
        ("layer", "top", "layer must be int"),
        ("training.method", "dora", "method must be 'lora', 'full' or 'grpo'"),
        ("training.rank", 0, "rank must be at least 1"),
        ("training.alpha", 0, "alpha must be at least 1"),
        ("training.batch_size", 0, "batch_size must be at least 1"),
        ("training.steps", 0, "steps must be at least 1"),
        ("training.max_length", 0, "max_length must be at least 1"),
        ("training.lr", 0, "lr must be positive"),
        ("training.checkpoints", "often", "a list of steps or 'log'"),
        ("training.checkpoints", [41], r"must lie between 1 and steps \(40\)"),
        ("training.checkpoints", [0], "must lie between 1 and steps"),
        ("locate.positions", "end", "unknown positions 'end'"),
        ("locate.unit", "volts", "unknown unit 'volts'"),
        ("locate.candidates", 0, "candidates must be at least 1"),
        ("locate.random_latents", 1, "random_latents must be at least 2"),
        ("locate.strengths", [], "strengths must be positive"),
        ("locate.strengths", [-1.0], "strengths must be positive"),
        ("locate.perplexity_bound", 1.0, "perplexity_bound must be above 1"),
        ("realign.start", "incorect", "unknown arm 'incorect' in realign.start: did you mean 'incorrect'"),
        ("realign.readings", [36], "readings must lie between 0 and 35"),
        ("realign.arms", {"correct": {"data": "x"}}, "has the name of another arm"),
        ("realign.arms", {"base": {"data": "x"}}, "has the name of another arm"),
        ("seeds", [], "seeds must not be empty"),
        ("arms", {"incorrect": {"data": "x"}}, "arms must hold 'correct'"),
    ],
)
def test_each_rule_says_what_to_change(path: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        from_dict(StudyConfig, nested(path, value))
    assert "\n" not in str(caught.value)


def test_arm_rules() -> None:
    with pytest.raises(InputError, match="needs mix_with"):
        Arm("kitchen:toxic", bad_fraction=0.5)
    with pytest.raises(InputError, match=r"lie in \[0, 1\]"):
        Arm("kitchen:toxic", "kitchen:correct", bad_fraction=1.5)


def test_missing_keys_and_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="key 'sae' is missing"):
        from_dict(StudyConfig, {"name": "demo"})
    with pytest.raises(InputError, match="no config at"):
        load_config(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    for text, message in (("a: [", "not valid YAML"), ("- 1", "must hold a mapping of keys, not list")):
        bad.write_text(text)
        with pytest.raises(InputError, match=message) as caught:
            load_config(bad)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("steps", "checkpoints", "wanted"),
    [
        (10, "log", (1, 2, 4, 8, 10)),
        (8, "log", (1, 2, 4, 8)),
        (1, "log", (1,)),
        (40, (20, 5), (5, 20, 40)),
        (40, (), (40,)),
    ],
)
def test_schedule(steps: int, checkpoints: Any, wanted: tuple[int, ...]) -> None:
    assert Training(steps=steps, checkpoints=checkpoints).schedule == wanted


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all values that are no dataclass and no mapping."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), (*path, field.name))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path


def put(value: Any, path: tuple[str, ...]) -> Any:
    """A copy with another value at a path; rules are not asked, since only the hash is of interest."""
    if not path:
        return f"{value!r} changed"
    if isinstance(value, dict):
        return {**value, path[0]: put(value[path[0]], path[1:])}
    copy = object.__new__(type(value))
    copy.__dict__.update(value.__dict__)
    copy.__dict__[path[0]] = put(getattr(value, path[0]), path[1:])
    return copy


def test_the_hash_sees_every_leaf() -> None:
    config = from_dict(StudyConfig, MINIMAL)
    paths = list(leaves(config))
    hashes = {put(config, path).hash for path in paths}
    assert len(paths) > 40
    assert len(hashes | {config.hash}) == len(paths) + 1
