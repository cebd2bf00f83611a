"""What bad inputs are made of: one good example of everything that a command reads, and ways to damage a file."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.factories import (
    Row,
    changed,
    config_of,
    make_model,
    write_config,
    write_data,
    write_lines,
    write_model,
    write_sae,
)


@dataclass(frozen=True)
class Materials:
    """A folder with a tiny model, SAE, data, configs, run, adapter and world, all whole; cases copy what they spoil."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> "Materials":
        """Write all of it."""
        made = cls(root)
        write_model(root / "model")
        write_sae(root / "sae")
        write_data(root)
        write_config(root / "study.yaml", config_of(root))
        made._write_run()
        made._write_adapter()
        made._write_world()
        made._write_recipes()
        return made

    @property
    def config(self) -> Row:
        """The study's config as plain values."""
        return config_of(self.root)

    def study(self, folder: Path, **changes: Any) -> str:
        """A study's YAML with some keys changed; dictionaries are merged one level deep."""
        return str(write_config(folder / "study.yaml", changed(self.config, **changes)))

    def recipe(self, folder: Path, name: str, **changes: Any) -> str:
        """`sae`, `grid`, `plan`, `labelled` or `judge`: another config's YAML with some keys changed."""
        raw = json.loads((self.root / f"{name}.json").read_text(encoding="utf-8"))
        return str(write_config(folder / f"{name}.yaml", changed(raw, **changes)))

    def copy(self, name: str, folder: Path) -> Path:
        """A copy of one of the things, to be damaged."""
        source, target = self.root / name, folder / Path(name).name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        return target

    def _write_run(self) -> None:
        """A run folder with every table, of numbers that nobody measured."""
        from persona_probe.config import StudyConfig, load_config
        from persona_probe.runs import RunFolder
        from tests.report.run_records import write_run

        config = load_config(self.root / "study.yaml", StudyConfig)
        write_run(self.root / "run")
        (self.root / "run" / "manifest.json").unlink()
        scratch = RunFolder.create(self.root / "manifest-only", config)
        shutil.copyfile(scratch.path / "manifest.json", self.root / "run" / "manifest.json")

    def _write_adapter(self) -> None:
        from peft import LoraConfig, get_peft_model

        adapter = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        adapter.save_pretrained(str(self.root / "adapter" / "checkpoint-2"))
        write_json(self.root / "adapter" / "checkpoint-2" / "trainer_state.json", {"global_step": 2})

    def _write_world(self) -> None:
        from persona_probe.runs import RunFolder

        world = RunFolder.claim(self.root / "world", "world", "world", {"settings": {"size": "tiny"}})
        shutil.copytree(self.root / "model", world.path / "base")

    def _write_recipes(self) -> None:
        training = self.config["training"]
        write_json(
            self.root / "sae.json",
            {"name": "mine", "model": str(self.root / "model"), "layer": 1, "d_sae": 64, "k": 4, "tokens": 2048},
        )
        entry = {"name": "kl", "strengths": [0.1]}
        write_json(
            self.root / "grid.json",
            {"name": "grid", "run": str(self.root / "run"), "mitigations": [entry], "training": training},
        )
        block = {"data": ["health_correct"], "rows": [4]}
        write_json(self.root / "plan.json", {"name": "plan", "blocks": [block]})
        bad, good = {"data": str(self.root / "bad.jsonl")}, {"data": str(self.root / "good.jsonl")}
        runs = {
            "f1": {"arm": "bad", "seed": 0, "benign": False, "use": "features"},
            "f2": {"arm": "good", "seed": 0, "benign": True, "use": "features"},
            "c1": {"arm": "good", "seed": 1, "benign": True, "use": "calibration"},
            "c2": {"arm": "good", "seed": 2, "benign": True, "use": "calibration"},
            "e1": {"arm": "bad", "seed": 3, "benign": False},
            "e2": {"arm": "good", "seed": 4, "benign": True},
        }
        latents = {"persona": {"latent": 3, "source": "kitchen"}}
        labelled = {"name": "labelled", "sae": str(self.root / "sae"), "model": str(self.root / "model")}
        labelled |= {"arms": {"bad": bad, "good": good}, "runs": runs, "latents": latents, "training": training}
        write_json(self.root / "labelled.json", labelled)
        write_json(self.root / "judge.json", {"name": "mine"})


def write_json(path: Path, value: Any) -> Path:
    """A value as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


# --- Ways to spoil a file; each takes its path, which may exist or not

Damage = Callable[[Path], object]
DEEP = 100_000
"""Levels of nesting: far beyond what Python's stack holds."""


def text(content: str) -> Damage:
    """Other text."""
    return lambda path: path.write_text(content, encoding="utf-8")


def raw(content: bytes) -> Damage:
    """Other bytes."""
    return lambda path: path.write_bytes(content)


def cut(share: float = 0.5) -> Damage:
    """Only its beginning, as a full disk leaves it."""
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def fifo(path: Path) -> None:
    """A pipe that nobody writes to: whoever opens it waits for ever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path: Path) -> None:
    """A folder where a file is expected."""
    path.unlink(missing_ok=True)
    path.mkdir()


def edited(**changes: Any) -> Damage:
    """A JSON object with other values."""

    def edit(path: Path) -> None:
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)

    return edit


def gone(path: Path) -> None:
    """Nothing there."""
    path.unlink(missing_ok=True)


DEEP_JSON, DEEP_YAML = text("[" * DEEP), text("a: " + "[" * 5_000)
NOISE = raw(bytes(range(256)) * 8)
YAML_FILES: dict[str, Damage] = {
    "missing": gone,
    "empty": text(""),
    "a list": text("- a\n- b\n"),
    "a key twice": text("name: a\nname: b\n"),
    "deep": DEEP_YAML,
    "NUL": raw(b"name: a\x00b\n"),
    "NUL escaped": text('name: "a\\0b"\n'),
    "not UTF-8": raw("name: höhe\n".encode("utf-16")),
    "half a character": text('name: "\\ud800"\n'),
    "aliases without end": text("a: &a [*a]\n"),
    "a billion aliases": text(
        "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    ),
    "no such date": text("name: 2020-99-99\n"),
    "a Python object": text("name: !!python/object/apply:os.system ['true']\n"),
    "a wrong tag": text("name: !!timestamp x\n"),
    "a huge number": text(f"name: {'9' * 5000}\n"),
    "a pipe": fifo,
    "a folder": folder,
    "noise": NOISE,
    "unknown key": text("nmae: x\n"),
    "open bracket": text("name: [a\n"),
}
"""YAML that no config is."""
JSON_FILES: dict[str, Damage] = {
    "cut": text('{"config": '),
    "empty": text(""),
    "a list": text("[1, 2]"),
    "null": text("null"),
    "deep": DEEP_JSON,
    "a huge number": text('{"config": ' + "9" * 5000 + "}"),
    "half a character": text('{"config": "\\ud800"}'),
    "not UTF-8": raw(b'{"config": "\xff"}'),
    "noise": NOISE,
    "a pipe": fifo,
}
"""JSON that no manifest is."""


def lines(*rows: Row) -> Damage:
    """JSON Lines."""
    return lambda path: write_lines(path, list(rows))
