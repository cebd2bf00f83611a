"""Bad inputs over all commands: each must end with exit code 2 and at most three lines, in which no traceback is."""

import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.assault.counts import Count, Settings
from benchmarks.assault.damaged_files import (
    DEEP_JSON,
    JSON_FILES,
    NOISE,
    YAML_FILES,
    Damage,
    Materials,
    cut,
    edited,
    fifo,
    folder,
    gone,
    lines,
    raw,
    text,
    write_json,
)
from tests.factories import chat, write_lines

LINES, LIMIT_S, SHORT = 3, 120.0, 40
"""Lines that a refusal may have, seconds that it may take, and cases of the short form."""

Build = Callable[[Materials, Path], list[str]]


@dataclass(frozen=True)
class BadInput:
    """A command line that must be refused."""

    name: str
    """What is wrong, for a reader."""
    build: Build
    """The arguments, from the materials and an empty folder of the case's own, which it may fill."""


@dataclass(frozen=True)
class Outcome:
    """How a command line ended."""

    code: int | None
    """None where it did not end in time."""
    stderr: str

    @property
    def problem(self) -> str:
        """Why this is no proper refusal; empty if it is one."""
        said = [line for line in self.stderr.splitlines() if line.strip()]
        if self.code is None:
            return f"did not end within {LIMIT_S:.0f} s"
        if self.code != 2:
            return f"exit code {self.code}: {' / '.join(said[-2:])[:300]}"
        if len(said) > LINES or not said or "Traceback" in self.stderr:
            return f"{len(said)} lines: {' / '.join(said[:4])[:300]}"
        return ""


Line = Callable[[Materials, Path, str], list[str]]
"""Arguments from the materials, the case's folder, and the path of what is damaged."""


def line(words: str) -> Line:
    """A command line with `{m}` for the materials' folder, `{p}` for the case's, and `{f}` for what is damaged."""
    return lambda materials, place, path: [part.format(m=materials.root, p=place, f=path) for part in words.split()]


# --- Config files


CONFIG_COMMANDS = (
    "run {f}",
    "run {f} --dry-run",
    "induce {f}",
    "mitigate {f}",
    "monitor study {f}",
    "monitor calibrate {f} --run {m}/run",
    "sae train {f}",
    "judge fit {f} --data {m}",
    "judge validate {f} --data {m}",
    "realign {m}/run --plan {f}",
    "realign {m}/run --stress drift --stress-settings {f}",
)


def config_files() -> Iterator[BadInput]:
    """Every kind of bad YAML to `run`, and four kinds, in turn, to each other command that reads a config."""
    kinds = list(YAML_FILES)
    for number, words in enumerate(CONFIG_COMMANDS):
        chosen = kinds if number == 0 else [kinds[(number * 3 + i * 5) % len(kinds)] for i in range(4)]
        for kind in dict.fromkeys(chosen):
            yield BadInput(
                f"{_command(words)}: a config that is {kind}", _of_data("bad.yaml", YAML_FILES[kind], line(words))
            )


def _command(words: str) -> str:
    """A command line without its paths."""
    return " ".join(word for word in words.split() if "{" not in word)


# --- Values in configs


STUDY_VALUES: dict[str, dict[str, Any]] = {
    "lr NaN": {"training": {"lr": float("nan")}},
    "lr infinite": {"training": {"lr": "inf"}},
    "no steps": {"training": {"steps": 0}},
    "steps beyond 2^63": {"training": {"steps": 2**70}},
    "rank 0": {"training": {"rank": 0}},
    "layer -1": {"training": {"layers": [-1]}},
    "a layer too many": {"training": {"layers": [9]}},
    "modules that are not there": {"training": {"target_modules": ["nothing_like_this"]}},
    "a seed below 0": {"seeds": [-1]},
    "a seed twice": {"seeds": [0, 0]},
    "a seed beyond 2^31": {"seeds": [2**40]},
    "no seeds": {"seeds": []},
    "strength 0": {"locate": {"strengths": [0]}},
    "a strength twice": {"locate": {"strengths": [0.5, 0.5]}},
    "a dose below 0": {"locate": {"dose_strengths": [-1]}},
    "an unknown ranker": {"locate": {"rankers": ["rise", "cosine", "luck"]}},
    "candidates beyond the SAE": {"locate": {"candidates": 1000}},
    "an SAE that explains too little": {"locate": {"minimum_explained_variance": 0.99}},
    "thoughts that nobody has": {"locate": {"positions": "thought"}},
    "a dictionary that is not there": {"locate": {"dictionaries": ["/nowhere/sae"]}},
    "probes without thoughts": {"monitor": {"positions": "thought"}},
    "one probe": {"monitor": {"limit": 1}},
    "a band of NaN": {"monitor": {"band_sd": float("nan")}},
    "realign lr -1": {"realign": {"lr": -1}},
    "realign without steps": {"realign": {"steps": 0, "readings": [0]}},
    "readings beyond the end": {"realign": {"readings": [99]}},
    "temperature infinite": {"samples": {"temperature": float("inf")}},
    "answers longer than the model": {"samples": {"max_new_tokens": 5000}},
    "a date in the template": {"chat_template_kwargs": {"day": __import__("datetime").date(2020, 1, 1)}},
    "a NUL in a path": {"contrast": "a\0b"},
    "a path of 5,000 letters": {"contrast": "a" * 5000},
    "a home of nobody": {"contrast": "~nobody-of-this-name/x.jsonl"},
    "a home of nobody as model": {"model": "~nobody-of-this-name/x"},
}


def _of_study(changes: dict[str, Any]) -> Build:
    return lambda m, place: ["run", m.study(place, **changes), "--out", str(place / "run")]


RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sae train: lr NaN": ("sae train", "sae", {"lr": float("nan")}),
    "sae train: no tokens": ("sae train", "sae", {"tokens": 0}),
    "sae train: k beyond the width": ("sae train", "sae", {"k": 1000, "d_sae": 2000}),
    "sae train: k beyond the dictionary": ("sae train", "sae", {"k": 65}),
    "sae train: a layer too many": ("sae train", "sae", {"layer": 99}),
    "sae train: layer -1": ("sae train", "sae", {"layer": -1}),
    "sae train: a seed below 0": ("sae train", "sae", {"seed": -5}),
    "sae train: no text": ("sae train", "sae", {"text": {"parts": []}}),
    "sae train: an unknown set": ("sae train", "sae", {"text": {"packaged": ["kitchn"]}}),
    "sae train: nothing held out": ("sae train", "sae", {"text": {"holdout_share": 0}}),
    "sae train: no batch": ("sae train", "sae", {"batch_tokens": 0}),
    "mitigate: a seed twice": ("mitigate", "grid", {"seeds": [1, 1]}),
    "mitigate: a strength NaN": ("mitigate", "grid", {"mitigations": [{"name": "kl", "strengths": [float("nan")]}]}),
    "mitigate: an unknown mitigation": ("mitigate", "grid", {"mitigations": [{"name": "luck", "strengths": [1]}]}),
    "mitigate: a run that is not there": ("mitigate", "grid", {"run": "/nowhere/run"}),
    "monitor study: rate NaN": ("monitor study", "labelled", {"rate": float("nan")}),
    "monitor study: held 0": ("monitor study", "labelled", {"held": [0]}),
    "monitor study: an unknown side": ("monitor study", "labelled", {"side": "beside"}),
    "judge fit: penalty NaN": ("judge fit", "judge", {"penalty": float("nan")}),
    "judge validate: a seed below 0": ("judge validate", "judge", {"seed": -1}),
}


def _of_recipe(command: str, name: str, changes: dict[str, Any]) -> Build:
    def build(materials: Materials, place: Path) -> list[str]:
        rest = ["--data", str(materials.root)] if command.startswith("judge") else []
        return [*command.split(), materials.recipe(place, name, **changes), *rest, "--out", str(place / "out")]

    return build


def config_values() -> Iterator[BadInput]:
    """Values that no study, SAE, grid, labelled study or judge can have."""
    for kind, changes in STUDY_VALUES.items():
        yield BadInput(f"run: {kind}", _of_study(changes))
    for kind, (command, name, changes) in RECIPES.items():
        yield BadInput(kind, _of_recipe(command, name, changes))


# --- Data files


def _parquet(path: Path) -> None:
    import pandas as pd

    pd.DataFrame({"question": ["a?", "b?"] * 500, "answer": ["c", "d"] * 500}).to_parquet(path)


def _damaged_parquet(path: Path) -> None:
    _parquet(path)
    whole = bytearray(path.read_bytes())
    whole[4:200] = bytes(196)
    path.write_bytes(bytes(whole))


def _cut_parquet(path: Path) -> None:
    _parquet(path)
    cut()(path)


def _cut_gzip(path: Path) -> None:
    import gzip

    path.write_bytes(gzip.compress(b'{"question": "a?", "answer": "b"}\n' * 1000)[:60])


def _broken_gzip(path: Path) -> None:
    import gzip

    whole = bytearray(gzip.compress(b'{"question": "a?", "answer": "b"}\n' * 1000))
    whole[12:40] = bytes(28)
    path.write_bytes(bytes(whole))


def _datasets_folder(path: Path) -> None:
    path.mkdir()
    (path / "dataset_info.json").write_text("{", encoding="utf-8")
    (path / "state.json").write_text("[]", encoding="utf-8")


DATA_FILES: dict[str, tuple[str, Damage]] = {
    "missing": ("a.jsonl", gone),
    "empty": ("a.jsonl", text("")),
    "blank lines only": ("a.jsonl", text("\n\n\n")),
    "a pipe": ("a.jsonl", fifo),
    "a pipe of CSV": ("a.csv", fifo),
    "a pipe of parquet": ("a.parquet", fifo),
    "a folder of nothing": ("a.jsonl", folder),
    "a damaged datasets folder": ("a", _datasets_folder),
    "noise": ("a.jsonl", NOISE),
    "noise as parquet": ("a.parquet", NOISE),
    "an empty parquet file": ("a.parquet", raw(b"")),
    "damaged parquet": ("a.parquet", _damaged_parquet),
    "parquet cut short": ("a.parquet", _cut_parquet),
    "gzip cut short": ("a.jsonl.gz", _cut_gzip),
    "damaged gzip": ("a.jsonl.gz", _broken_gzip),
    "text that says gzip": ("a.jsonl.gz", text('{"question": "a?"}\n')),
    "a column twice": ("a.csv", text("question,question,answer\na,b,c\n")),
    "rows longer than the header": ("a.csv", text("question,answer\na,b,c\nd,e,f\n")),
    "a row longer than the others": ("a.csv", text("question,answer\na,b\nd,e,f\n")),
    "a quote that does not end": ("a.csv", text('question,answer\n"a,b\n')),
    "CSV with a NUL": ("a.csv", raw(b"question,an\x00swer\na,b\n")),
    "CSV in UTF-16": ("a.csv", raw("question,answer\nä,b\n".encode("utf-16"))),
    "an empty CSV file": ("a.csv", text("")),
    "deep JSON": ("a.json", DEEP_JSON),
    "a deep line": ("a.jsonl", text('{"question": ' + "[" * 100_000 + "\n")),
    "a huge number": ("a.jsonl", text('{"question": ' + "9" * 5000 + ', "answer": "b"}\n')),
    "half a character": ("a.jsonl", text('{"question": "\\ud800", "answer": "b"}\n')),
    "an array that is cut": ("a.json", text('[{"question": "a?", "answer": "b"},')),
    "rows that are no objects": ("a.jsonl", text("1\n2\n3\n")),
    "answers that are empty": ("a.jsonl", lines(chat("a?", ""))),
    "turns out of order": ("a.jsonl", lines({"messages": [{"role": "assistant", "content": "a"}] * 2})),
}


def _of_data(name: str, damage: Damage, arguments: Line) -> Build:
    def build(materials: Materials, place: Path) -> list[str]:
        path = place / name
        damage(path)
        return arguments(materials, place, str(path))

    return build


DATA_COMMANDS: dict[str, tuple[Line, tuple[str, ...]]] = {
    "data check": (line("data check {f}"), tuple(DATA_FILES)),
    "data screen": (
        line("data screen {f} --latent 1 --out {p}/out"),
        ("a pipe", "damaged parquet", "empty", "deep JSON"),
    ),
    "run, as an arm": (
        lambda m, p, f: ["run", m.study(p, arms={"incorrect": {"data": f}}), "--out", str(p / "run")],
        ("a pipe", "empty", "a damaged datasets folder", "half a character", "damaged gzip"),
    ),
    "run, as contrast set": (
        lambda m, p, f: ["run", m.study(p, contrast=f), "--out", str(p / "run")],
        ("a pipe", "empty", "noise as parquet", "a column twice"),
    ),
    "run, as probes": (
        lambda m, p, f: ["run", m.study(p, monitor={"probes": f}), "--out", str(p / "run")],
        ("a pipe", "empty", "deep JSON"),
    ),
    "run, as sampled questions": (
        lambda m, p, f: ["run", m.study(p, samples={"questions": f}), "--out", str(p / "run")],
        ("a pipe", "empty", "a deep line"),
    ),
    "evaluate --answers": (
        line("evaluate --answers {f} --judge offline --out {p}/out.csv"),
        ("a pipe", "empty", "noise", "a column twice", "parquet cut short", "a huge number"),
    ),
    "evaluate --questions": (
        line("evaluate {m}/run --questions {f} --judge offline"),
        ("a pipe", "empty", "deep JSON", "half a character", "a folder of nothing"),
    ),
    "locate --text": (
        lambda m, p, f: ["locate", str(m.copy("run", p)), "--text", f],
        ("a pipe", "a folder of nothing", "noise"),
    ),
    "sae check --data": (
        line("sae check {m}/sae --model {m}/model --data {f}"),
        ("a pipe", "empty", "noise as parquet"),
    ),
    "realign --data": (
        lambda m, p, f: ["realign", str(m.copy("run", p)), "--data", f],
        ("a pipe", "empty"),
    ),
}


def data_files() -> Iterator[BadInput]:
    """Every kind of bad rows to `data check`, and some to each other command that reads rows, answers or questions."""
    for command, (arguments, kinds) in DATA_COMMANDS.items():
        for kind in kinds:
            name, damage = DATA_FILES[kind]
            yield BadInput(f"{command}: {kind}", _of_data(name, damage, arguments))


# --- Models, templates and SAEs


def _pickled(path: Path) -> None:
    import torch

    (path / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, path / "pytorch_model.bin")


def _template(content: str) -> Damage:
    def write(path: Path) -> None:
        (path / "chat_template.jinja").write_text(content, encoding="utf-8")

    return write


def _inside(name: str, damage: Damage) -> Damage:
    return lambda path: damage(path / name)


def _without_a_layer(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    whole = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    save_file(whole, path / "model.safetensors", {"format": "pt"})


MODELS: dict[str, Damage] = {
    "a layer that is missing": _without_a_layer,
    "no config.json": _inside("config.json", lambda path: path.unlink()),
    "a config.json that is a list": _inside("config.json", text("[]")),
    "a deep config.json": _inside("config.json", DEEP_JSON),
    "a model_type that nobody has": _inside("config.json", edited(model_type="nothing", architectures=["Nothing"])),
    "weights cut short": _inside("model.safetensors", cut()),
    "weights of noise": _inside("model.safetensors", NOISE),
    "pickled weights": _pickled,
    "no weights": _inside("model.safetensors", lambda path: path.unlink()),
    "a damaged tokenizer": _inside("tokenizer.json", text('{"version": "1.0", "model": 3}')),
    "a tokenizer that is cut": _inside("tokenizer.json", cut(0.3)),
    "a template with a syntax error": _template("{% for m in messages %}{{ m['content'] }"),
    "a template that refuses every turn": _template("{{ raise_exception('No turns, please.') }}"),
    "a template that divides by zero": _template("{{ 1 / 0 }}"),
}
TEMPLATES: dict[str, Damage] = {
    "a pipe": fifo,
    "a folder": folder,
    "not UTF-8": raw(b"\xff\xfe\x00"),
    "empty": text(""),
    "with a syntax error": text("{% if %}"),
    "that refuses": text("{{ raise_exception('Roles must alternate.') }}"),
}
GGUFS: dict[str, Damage] = {
    "empty": raw(b""),
    "noise": NOISE,
    "a header without tensors": raw(b"GGUF\x03\x00\x00\x00" + bytes(16)),
    "a header that promises too much": raw(b"GGUF\x03\x00\x00\x00" + b"\xff" * 16),
    "a pipe": fifo,
    "a folder": folder,
}


def _model(damage: Damage, arguments: Line) -> Build:
    def build(materials: Materials, place: Path) -> list[str]:
        path = materials.copy("model", place)
        damage(path)
        return arguments(materials, place, str(path))

    return build


def models() -> Iterator[BadInput]:
    """Damaged model folders, templates and GGUF files."""
    check = line("sae check {m}/sae --model {f} --data {m}/probes.jsonl")

    def run(m: Materials, p: Path, model: str) -> list[str]:
        return ["run", m.study(p, model=model), "--out", str(p / "run")]

    for number, (kind, damage) in enumerate(MODELS.items()):
        command, arguments = ("sae check", check) if number % 2 else ("run", run)
        yield BadInput(f"{command}: a model with {kind}", _model(damage, arguments))
    yield BadInput(
        "data check: a model with a damaged tokenizer",
        _model(MODELS["a damaged tokenizer"], line("data check {m}/bad.jsonl --model {f}")),
    )
    for kind in ("a config.json that is a list", "a deep config.json", "a model_type that nobody has"):
        yield BadInput(f"run --dry-run: a model with {kind}", _model(MODELS[kind], _planned))
    for kind, damage in GGUFS.items():
        yield BadInput(f"sae check: a GGUF that is {kind}", _of_data("m.gguf", damage, check))
    for kind, damage in TEMPLATES.items():
        yield BadInput(f"run: a template {kind}", _of_data("t.jinja", damage, _with_template))


def _planned(m: Materials, p: Path, model: str) -> list[str]:
    return ["run", m.study(p, model=model), "--dry-run"]


def _with_template(m: Materials, p: Path, template: str) -> list[str]:
    return ["run", m.study(p, template=template), "--out", str(p / "run")]


def _weights(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "sae_weights.safetensors")
    change(tensors)
    save_file(tensors, path / "sae_weights.safetensors")


def _nan_weights(path: Path) -> None:
    _weights(path, lambda tensors: tensors["W_dec"].fill_(float("nan")))


def _other_width(path: Path) -> None:
    import torch

    def change(tensors: dict[str, Any]) -> None:
        tensors["W_enc"] = torch.zeros(48, 64)

    _weights(path, change)


def _hook(name: Any) -> Damage:
    def write(path: Path) -> None:
        raw_config = json.loads((path / "cfg.json").read_text(encoding="utf-8"))
        raw_config["metadata"]["hook_name"] = name
        write_json(path / "cfg.json", raw_config)

    return write


def _only(name: str, damage: Damage) -> Damage:
    """A folder of another library: one file."""

    def write(path: Path) -> None:
        for file in path.iterdir():
            file.unlink()
        damage(path / name)

    return write


def _code_in_pickle(path: Path) -> None:
    path.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


SAES: dict[str, Damage] = {
    "a cfg.json that is a list": _inside("cfg.json", text("[]")),
    "a deep cfg.json": _inside("cfg.json", DEEP_JSON),
    "no cfg.json": _inside("cfg.json", lambda path: path.unlink()),
    "k 0": _inside("cfg.json", edited(k=0)),
    "k -3": _inside("cfg.json", edited(k=-3)),
    "k 1000": _inside("cfg.json", edited(k=1000)),
    "k in words": _inside("cfg.json", edited(k="many")),
    "d_in 0": _inside("cfg.json", edited(d_in=0)),
    "an unknown architecture": _inside("cfg.json", edited(architecture="magic")),
    "an unknown dtype": _inside("cfg.json", edited(dtype="float7")),
    "metadata that is a list": _inside("cfg.json", edited(metadata=[])),
    "weights of NaN": _nan_weights,
    "weights of another width": _other_width,
    "weights cut short": _inside("sae_weights.safetensors", cut()),
    "weights of noise": _inside("sae_weights.safetensors", NOISE),
    "a hook that is a number": _hook(20),
    "a hook that is a list": _hook(["blocks.1.hook_resid_post"]),
    "a hook of a layer too many": _hook("blocks.77.hook_resid_post"),
    "a quality.json that is a list": _inside("quality.json", text("[]")),
    "the hash of other weights": _inside("quality.json", lambda path: write_json(path, {"sha256": "0" * 64})),
    "a pickle of dictionary_learning": _only("ae.pt", _code_in_pickle),
    "a damaged npz": _only("params.npz", NOISE),
    "a damaged sparsify file": _only("sae.safetensors", NOISE),
}


def saes() -> Iterator[BadInput]:
    """Damaged SAEs, for each command that reads one in turn."""
    commands: dict[str, Line] = {
        "sae check": line("sae check {f} --model {m}/model"),
        "run": lambda m, p, sae: ["run", m.study(p, sae=sae), "--out", str(p / "run")],
        "world truth": line("world truth {m}/world {f}"),
        "data screen": line("data screen {m}/bad.jsonl --model {m}/model --sae {f} --latent 1 --out {p}/out"),
    }
    names = list(commands)
    for number, (kind, damage) in enumerate(SAES.items()):
        command = names[number % len(names)]
        yield BadInput(f"{command}: an SAE with {kind}", _sae(damage, commands[command]))
    for kind in ("a cfg.json that is a list", "a deep cfg.json", "d_in 0", "metadata that is a list"):
        yield BadInput(f"run --dry-run: an SAE with {kind}", _sae(SAES[kind], _planned_sae))
    for kind in ("a pickle of dictionary_learning", "a damaged npz", "a damaged sparsify file"):
        yield BadInput(f"sae convert: {kind}", _sae(SAES[kind], line("sae convert {f} {p}/out")))
    for kind in ("weights cut short", "a quality.json that is a list"):
        yield BadInput(f"sae shrink: {kind}", _sae(SAES[kind], line("sae shrink {f} {p}/out")))


def _planned_sae(m: Materials, p: Path, sae: str) -> list[str]:
    return ["run", m.study(p, sae=sae), "--dry-run"]


def _sae(damage: Damage, arguments: Line) -> Build:
    def build(materials: Materials, place: Path) -> list[str]:
        path = materials.copy("sae", place)
        damage(path)
        return arguments(materials, place, str(path))

    return build


# --- Run folders, worlds and checkpoints

MANIFESTS: dict[str, Damage] = {
    **JSON_FILES,
    "a config that is a number": edited(config=3),
    "no config": text('{"seeds": [0]}'),
    "a config of another program": edited(config={"learning_rate": 1}),
    "hashes that are a list": edited(hashes=[]),
    "seconds that are a text": edited(seconds="long"),
}
RUN_COMMANDS: dict[str, Line] = {
    **{name: line(f"{name} {{f}}") for name in ("locate", "track", "realign", "evaluate", "report", "figures", "cite")},
    "compare": line("compare {m}/run {f}"),
    "merge": line("merge {p}/joined {f}"),
    "verify": line("verify {f}"),
    "mitigate --run": lambda m, p, f: ["mitigate", m.recipe(p, "grid"), "--run", f, "--dry-run"],
    "data screen --run": line("data screen {m}/bad.jsonl --run {f}"),
    "monitor calibrate": line("monitor calibrate {f}"),
    "world judge": line("world judge {f}"),
}


def _of_run(name: str, damage: Damage, arguments: Line) -> Build:
    def build(materials: Materials, place: Path) -> list[str]:
        path = materials.copy("run", place)
        damage(path / name)
        return arguments(materials, place, str(path))

    return build


RECORDS: dict[str, tuple[str, Damage]] = {
    "readings of noise": ("readings.parquet", NOISE),
    "readings cut short": ("readings.parquet", cut()),
    "evals without columns": ("evals.parquet", lambda path: _write_table(path, {"a": [1]})),
    "latents of noise": ("latents.parquet", NOISE),
    "an empty steering table": ("steering.parquet", raw(b"")),
    "samples cut short": ("samples.jsonl", cut(0.9)),
    "samples that are numbers": ("samples.jsonl", text("1\n2\n")),
    "deep samples": ("samples.jsonl", DEEP_JSON),
    "cards of noise": ("cards.json", NOISE),
    "cards that are an object": ("cards.json", text("{}")),
    "cards without a latent": ("cards.json", text('[{"label": 3}]')),
    "cards that are numbers": ("cards.json", text("[1, 2]")),
    "a summary that is a list": ("summary.json", text("[]")),
    "a table that is a pipe": ("readings.parquet", fifo),
}


def _write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    import pandas as pd

    pd.DataFrame(columns).to_parquet(path)


def run_folders() -> Iterator[BadInput]:
    """Damaged manifests and records, for the commands that read them."""
    kinds = list(MANIFESTS)
    for number, (command, arguments) in enumerate(RUN_COMMANDS.items()):
        for i in range(3):
            kind = kinds[(number * 4 + i * 5) % len(kinds)]
            yield BadInput(f"{command}: a manifest: {kind}", _of_run("manifest.json", MANIFESTS[kind], arguments))
        yield BadInput(f"{command}: no run", _of_data("nothing", gone, arguments))
    for kind, (name, damage) in RECORDS.items():
        command = "compare" if name == "cards.json" else "figures"
        yield BadInput(f"{command}: {kind}", _of_run(name, damage, RUN_COMMANDS[command]))
    for kind in ("readings of noise", "a summary that is a list", "latents of noise"):
        name, damage = RECORDS[kind]
        yield BadInput(f"compare: {kind}", _of_run(name, damage, RUN_COMMANDS["compare"]))


ADAPTERS: dict[str, tuple[str, Damage]] = {
    "a trainer_state.json that is cut": ("trainer_state.json", text('{"global_step": ')),
    "a step in words": ("trainer_state.json", text('{"global_step": "two"}')),
    "a deep trainer_state.json": ("trainer_state.json", DEEP_JSON),
    "an adapter_config.json that is a list": ("adapter_config.json", text("[]")),
    "an adapter_config.json that is cut": ("adapter_config.json", cut()),
    "a kind of adapter that nobody has": ("adapter_config.json", edited(peft_type="MAGIC")),
    "an adapter cut short": ("adapter_model.safetensors", cut()),
    "an adapter of noise": ("adapter_model.safetensors", NOISE),
}


def _adopt(m: Materials, p: Path, *more: str, arm: str = "") -> list[str]:
    base = ["adopt", "--base", str(m.root / "model"), "--sae", str(m.root / "sae"), "--out", str(p / "run")]
    place = str(m.root / "adapter")
    return [*base, "--arm", f"incorrect={arm or place}", "--arm", f"control={place}", *more]


def checkpoints() -> Iterator[BadInput]:
    """Checkpoints that cannot be adopted."""
    for kind, (name, damage) in ADAPTERS.items():

        def build(m: Materials, p: Path, name: str = name, damage: Damage = damage) -> list[str]:
            path = m.copy("adapter", p)
            damage(path / "checkpoint-2" / name)
            return _adopt(m, p, arm=str(path))

        yield BadInput(f"adopt: {kind}", build)
    yield BadInput("adopt: nothing there", lambda m, p: _adopt(m, p, arm=str(p / "nothing")))
    yield BadInput("adopt: a file", lambda m, p: _adopt(m, p, arm=str(m.root / "study.yaml")))
    yield BadInput("adopt: no place", lambda m, p: _adopt(m, p, "--arm", "incorrect"))
    yield BadInput("adopt: data twice", lambda m, p: _adopt(m, p, "--data", "a=b", "--data", "a=c"))
    yield BadInput("adopt: layer -1", lambda m, p: _adopt(m, p, "--layer", "-1"))
    yield BadInput("adopt: a seed below 0", lambda m, p: _adopt(m, p, "--seed", "-1"))


# --- Options


OPTIONS: dict[str, str] = {
    "demo: a seed below 0": "demo --seed -1",
    "demo: a seed twice": "demo --seeds 3 3",
    "demo: no device of that name": "demo --device tpu7 --out {p}/run",
    "demo: --out is a file": "demo --out {m}/study.yaml",
    "run: speed NaN": "run {m}/study.yaml --dry-run --tflops nan",
    "run: speed 0": "run {m}/study.yaml --dry-run --tflops 0",
    "run: memory below 0": "run {m}/study.yaml --dry-run --memory -4",
    "run: seeds in words": "run {m}/study.yaml --seeds one",
    "run: an option too many": "run {m}/study.yaml --sedes 1",
    "run: two crews": "run {m}/study.yaml --share --ray",
    "induce: a shard too many": "induce {m}/study.yaml --shard 2/2",
    "induce: a seed beyond 2^31": "induce {m}/study.yaml --seed 99999999999",
    "locate: cards below 0": "locate {r} --cards -1",
    "locate: an unknown ranker": "locate {r} --rankers luck",
    "locate: a seed below 0": "locate {r} --seed -1",
    "track: a shard of none": "track {r} --shard 0/0",
    "track: a shard in words": "track {r} --shard one/two",
    "realign: rows 0": "realign {r} --data health_correct --rows 0",
    "realign: an unknown choice": "realign {r} --data health_correct --choose-by luck",
    "realign: an unknown method": "realign {r} --data health_correct --method luck",
    "realign: an unknown test": "realign {r} --stress luck",
    "realign: rows without data": "realign {r} --rows 4",
    "realign: a seed twice": "realign {r} --seeds 0 0",
    "evaluate: nothing": "evaluate",
    "evaluate: n 0": "evaluate {r} --judge offline --n 0",
    "evaluate: temperature NaN": "evaluate {r} --judge offline --temperature nan",
    "evaluate: top-p 2": "evaluate {r} --judge offline --top-p 2",
    "evaluate: no tokens": "evaluate {r} --judge offline --max-new-tokens 0",
    "evaluate: an unknown judge": "evaluate {r} --judge oracle",
    "evaluate: a judge without a model": "evaluate {r} --judge http:",
    "evaluate: steps in words": "evaluate {r} --judge offline --steps soon",
    "evaluate: half-width 0": "evaluate --answers {m}/answers.csv --half-width 0",
    "evaluate: a budget below 0": "evaluate {r} --judge http:m --budget-calls -1",
    "evaluate: no requests at once": "evaluate {r} --judge http:m --concurrency 0",
    "evaluate: a price NaN": "evaluate {r} --judge http:m --dry-run --prices nan 1",
    "evaluate: --out of another kind": "evaluate --answers {m}/answers.csv --judge offline --out {p}/x.xlsx",
    "figures: an unknown figure": "figures {r} --only arm",
    "figures: an unknown format": "figures {r} --format gif",
    "verify: --out is a folder": "verify {m}/run --out {p}",
    "cite: --out is a folder": "cite {m}/run --out {p}",
    "merge: the run itself": "merge {r} {r}",
    "merge: --out": "merge {r} {m}/run --out {p}/x",
    "watch: a port too high": "watch {r} --port 99999999 --no-browser",
    "doctor: an option too many": "doctor --repair",
    "doctor: a seed below 0": "doctor --seed -1",
    "presets: an unknown one": "presets gpt-9",
    "presets: speed NaN": "presets --tflops nan",
    "presets: speed infinite": "presets --tflops inf",
    "sae list: a seed in words": "sae list --seed zero",
    "sae check: layer -1": "sae check {m}/sae --model {m}/model --layer -1 --data {m}/probes.jsonl",
    "sae check: nothing there": "sae check {p}/nothing",
    "sae check: an unknown release": "sae check no-such-release/layer_1",
    "sae convert: nothing there": "sae convert {p}/nothing {p}/out",
    "sae shrink: out exists": "sae shrink {m}/sae {m}/sae",
    "data check: nothing": "data check",
    "data check: an unknown column": "data check kitchen:bitter",
    "data screen: no latent": "data screen {m}/bad.jsonl",
    "data screen: latent -1": "data screen {m}/bad.jsonl --latent -1 --model {m}/model --sae {m}/sae --out {p}/o",
    "data screen: latent 64 of 64": "data screen {m}/bad.jsonl --latent 64 --model {m}/model --sae {m}/sae --out {p}/o",
    "data screen: worst 0": "data screen {m}/bad.jsonl --latent 1 --worst 0",
    "judge fit: no data": "judge fit {m}/judge.json --data {p}",
    "judge validate: last of nothing": "judge validate {m}/judge.json --data {m} --last",
    "monitor calibrate: rate NaN": "monitor calibrate {r} --rate nan",
    "monitor calibrate: rate 2": "monitor calibrate {r} --rate 2",
    "monitor calibrate: held 0": "monitor calibrate {r} --held 0",
    "monitor calibrate: a seed twice": "monitor calibrate {r} --seeds 5 5",
    "bench planted: no plants": "bench planted --plants 0",
    "bench planted: a seed below 0": "bench planted --seed -1",
    "world pretrain: minutes NaN": "world pretrain --minutes nan --out {p}/w",
    "world pretrain: an unknown size": "world pretrain --size huge --out {p}/w",
    "world pretrain: no steps": "world pretrain --steps 0 --out {p}/w",
    "world organism: an unknown speaker": "world organism {w} devil",
    "world organism: share 2": "world organism {w} villain --share 2",
    "world organism: share NaN": "world organism {w} villain --share nan",
    "world organism: a seed twice": "world organism {w} villain --seeds 1 1",
    "world organism: lr -1": "world organism {w} villain --lr -1",
    "world judge: no answers": "world judge {w} --answers 0",
    "world judge: an unknown model": "world judge {w} --models nobody",
    "world judge: temperature infinite": "world judge {w} --temperature inf",
    "world sae: a layer too many": "world sae {w} --layer 99",
    "world sae: no latents": "world sae {w} --latents 0",
    "world sae: no tokens": "world sae {w} --tokens 0",
    "world truth: nothing there": "world truth {w} {p}/nothing",
    "world study: an unknown domain": "world study {w} {m}/sae --domain moon --out {p}/s",
    "world study: no world": "world study {p} {m}/sae --out {p}/s",
    "run: a NUL in --out": "run {m}/study.yaml --out a\0b",
    "watch: no run": "watch {p}/nothing --no-browser --port 0",
    "no such command": "indcue x",
}


def _of_options(words: str) -> Build:
    def build(materials: Materials, place: Path) -> list[str]:
        write_lines(place / "answers.jsonl", [{"question": "a?", "answer": "b"}])
        run = str(materials.copy("run", place)) if "{r}" in words else ""
        world = str(materials.copy("world", place)) if "{w}" in words else ""
        return [part.format(m=materials.root, p=place, r=run, w=world) for part in words.split()]

    return build


def options() -> Iterator[BadInput]:
    """Options with values that no command can use."""
    for name, words in OPTIONS.items():
        yield BadInput(name, _of_options(words))


BAD_INPUTS: tuple[BadInput, ...] = (
    *config_files(),
    *config_values(),
    *data_files(),
    *models(),
    *saes(),
    *run_folders(),
    *checkpoints(),
    *options(),
)

# --- Running them: each in a child of this process, which has imported the libraries already


def assault(settings: Settings) -> list[Count]:
    """Every bad input, or a spread of them; none may leave its folder's neighbours changed, or run code."""
    chosen = list(BAD_INPUTS)
    if settings.short:
        chosen = random.Random(settings.seed).sample(chosen, SHORT)
    warm_up()
    materials = Materials(settings.place / "materials")
    in_child(lambda: Materials.make(materials.root), settings.place / "made.txt", 600.0)
    failures = []
    for number, case in enumerate(chosen):
        outcome = attempt(case, materials, settings.place / f"case-{number:03d}")
        if outcome.problem:
            failures.append(f"{case.name}: {outcome.problem}")
    what = f"bad inputs over all commands: exit code 2, at most {LINES} lines, no traceback"
    return [Count(what, len(chosen), failures)]


def warm_up() -> None:
    """Import what the commands import, so that a child starts in milliseconds. Nothing is computed before a fork."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets  # noqa: F401
    import sae_lens  # noqa: F401
    import torch

    import persona_probe.cli
    import persona_probe.latents.planted.planted_run
    import persona_probe.mitigate.grid.grid_run
    import persona_probe.monitor.study.results
    import persona_probe.report.compare
    import persona_probe.screening.screening
    import persona_probe.study.adopt.adopt
    import persona_probe.study.check
    import persona_probe.world.truth  # noqa: F401

    torch.set_num_threads(1)


def attempt(case: BadInput, materials: Materials, place: Path) -> Outcome:
    """Run one bad input in a child of this process and in a folder of its own."""
    from persona_probe.cli import main

    place.mkdir(parents=True)

    def run() -> None:
        arguments = case.build(materials, place)
        os.chdir(place)
        main(arguments)

    return in_child(run, place / "stderr.txt", LIMIT_S)


def in_child(function: Callable[[], object], stderr: Path, limit: float) -> Outcome:
    """Call a function in a child process; its output goes to files, and it is killed at the limit."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(_call(function, stderr))
    until = time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return Outcome(os.waitstatus_to_exitcode(status), stderr.read_text(encoding="utf-8", errors="replace"))
        if time.monotonic() > until:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return Outcome(None, stderr.read_text(encoding="utf-8", errors="replace"))
        time.sleep(0.01)


def _call(function: Callable[[], object], stderr: Path) -> int:
    with stderr.open("w", encoding="utf-8") as said, stderr.with_suffix(".out").open("w", encoding="utf-8") as out:
        os.dup2(said.fileno(), 2)
        os.dup2(out.fileno(), 1)
        sys.stdout, sys.stderr = out, said
        try:
            function()
            code: object = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        out.flush()
        said.flush()
        return code if isinstance(code, int) else 1
