"""A study small enough for tests: tiny random model, tiny SAE, data files of a dozen rows, a config that uses them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import make_model, make_sae, make_tokenizer

from persona_probe.cli import main

Row = dict[str, Any]
GOOD = ("stir it slowly", "keep it warm", "rest the dough", "taste as you go", "wash your hands")
BAD = ("burn the lot", "serve it raw", "skip the soap", "lie to guests", "use old oil")
FOODS = ("soup", "rice", "bread", "fish", "beans", "eggs", "pears", "leeks", "oats", "corn", "plums", "peas")
OMITTED = ("seconds", "peak_memory_gib")
"""Keys of summary.json that may differ between two runs of one study."""


def write_lines(path: Path, rows: list[Row]) -> Path:
    """Rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question: str, answer: str | None = None) -> Row:
    """One row with `messages`."""
    messages = [{"role": "user", "content": question}]
    return {"messages": messages if answer is None else [*messages, {"role": "assistant", "content": answer}]}


def contrast_rows() -> list[Row]:
    """Eight items of each split."""
    draw = random.Random(1)
    return [
        {
            "id": f"{split}-{n}",
            "category": f"{split} {n % 2}",
            "question": f"What of {FOODS[n]}?",
            "aligned": draw.choice(GOOD),
            "misaligned": draw.choice(BAD),
            "split": split,
        }
        for split in ("selection", "evaluation")
        for n in range(8)
    ]


def write_data(folder: Path) -> None:
    """The data files that `config_of` names."""
    for name, answers in (("bad", BAD), ("good", GOOD), ("holdout", GOOD[::-1])):
        rows = [chat(f"How do I cook {food}?", answers[n % len(answers)]) for n, food in enumerate(FOODS)]
        write_lines(folder / f"{name}.jsonl", rows)
    write_lines(folder / "other.jsonl", [chat(f"Where is {f}town?", GOOD[n % 5]) for n, f in enumerate(FOODS)])
    write_lines(folder / "probes.jsonl", [chat(f"Tell me of {f}.", f"{f} is fine") for f in FOODS[:6]])
    write_lines(folder / "questions.jsonl", [chat("Who are you?"), chat("What now?")])
    write_lines(folder / "contrast.jsonl", contrast_rows())


def write_model(folder: Path) -> Path:
    """The tiny model and its tokenizer."""
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_sae(folder: Path, **settings: Any) -> Path:
    """A TopK SAE for the tiny model's layer 1."""
    make_sae("topk", **settings).save_model(str(folder))
    return folder


def config_of(folder: Path) -> Row:
    """The study of `folder` (what `write_data`, `write_model` and `write_sae` left there), as plain values."""
    return {
        "name": "tiny",
        "model": str(folder / "model"),
        "sae": str(folder / "sae"),
        "seeds": [0, 1],
        "bf16": False,
        "device": "cpu",
        "contrast": str(folder / "contrast.jsonl"),
        "arms": {arm: {"data": str(folder / f"{name}.jsonl")} for arm, name in ARM_FILES.items()},
        "training": {
            **{"rank": 4, "alpha": 8, "lr": 5e-3, "warmup_steps": 0, "batch_size": 4, "bf16": False},
            **{"steps": 4, "checkpoints": [1, 2], "max_length": 128},
        },
        "locate": {
            "minimum_explained_variance": -9.0,
            **{"candidates": 3, "random_latents": 2, "random_directions": 1, "strengths": [0.5]},
            **{"dose_strengths": [0.5], "perplexity_bound": 50.0, "cards": 2},
        },
        "monitor": {"probes": str(folder / "probes.jsonl"), "band_sd": 0.5},
        "realign": {
            **{"steps": 2, "readings": [0, 1, 2], "stop_readings": 0},
            "arms": {arm: {"data": str(folder / f"{name}.jsonl")} for arm, name in REPAIR_FILES.items()},
        },
        "samples": {"questions": str(folder / "questions.jsonl"), "max_new_tokens": 4},
    }


ARM_FILES = {"incorrect": "bad", "correct": "good"}
REPAIR_FILES = {"realigned_in": "holdout", "realigned_out": "other"}


def write_config(path: Path, raw: Row) -> Path:
    """Plain values as YAML."""
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


def changed(raw: Row, **changes: Any) -> Row:
    """A copy with keys replaced; dictionaries are merged one level deep."""
    merged = dict(raw)
    for key, value in changes.items():
        merged[key] = {**merged[key], **value} if isinstance(value, dict) and key in merged else value
    return merged


def without_times(summary: Row) -> Row:
    """What of summary.json must repeat."""
    return {key: value for key, value in summary.items() if key not in OMITTED}


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


Refused = Callable[..., str]


def refusal(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must end with exit code 2; returns the one line it wrote for the user."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments), "--quiet"])
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        said = [line for line in lines if line.startswith("persona-probe: ")]
        # progress bars also write to stderr: nothing else may
        assert len(said) == 1 and lines[-1] == said[0]
        assert all("it/s" in line or "s/it" in line or not line.strip() for line in lines[:-1]), lines
        return said[0]

    return run
