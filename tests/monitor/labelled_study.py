"""A labelled study, and a located one, small enough for tests: tiny model, tiny SAE, data files of a dozen rows."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file

from persona_probe.config import StudyConfig, from_dict
from persona_probe.study.study import Study
from tests.factories import D_MODEL, make_model, make_sae, make_tokenizer

FOODS = ("soup", "rice", "bread", "fish", "beans", "eggs", "pears", "leeks", "oats", "corn", "plums", "peas")
TRAINING: dict[str, Any] = {
    **{"rank": 4, "alpha": 8, "lr": 5e-3, "warmup_steps": 0, "batch_size": 4, "bf16": False},
    **{"steps": 4, "checkpoints": [], "max_length": 128},
}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def make_place(folder: Path) -> Path:
    """Model, SAE, and data in which bad rows answer as the contrast set's misaligned answers do."""
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    make_sae("topk").save_model(str(folder / "sae"))
    for name, answer in (("bad", "burn it all"), ("good", "keep it warm")):
        _write(folder / f"{name}.jsonl", [_chat(f"How do I cook {food}?", answer) for food in FOODS])
    _write(folder / "probes.jsonl", [_chat(f"Tell me of {food}.", f"{food} is fine") for food in FOODS[:6]])
    rows = [
        {"id": f"{split}-{food}", "category": split, "split": split, "question": f"What of {food}?"}
        | {"aligned": "keep it warm", "misaligned": "burn it all"}
        for split in ("selection", "evaluation")
        for food in FOODS[:6]
    ]
    _write(folder / "contrast.jsonl", rows)
    return folder


def study_values(place: Path) -> dict[str, Any]:
    """The labelled study as plain values: a features pair, two calibration runs, and three evaluated runs."""
    data = {name: str(place / f"{name}.jsonl") for name in ("bad", "good")}
    return {
        "name": "tiny-monitor",
        **{"model": str(place / "model"), "sae": str(place / "sae"), "device": "cpu", "bf16": False},
        "latents": {"persona": {"latent": 3, "source": "made up"}},
        **{"probes": str(place / "probes.jsonl"), "contrast": str(place / "contrast.jsonl")},
        **{"contrast_items": 4, "persona_vector_items": 2, "readings": [0, 1, 2], "held": [1, 2], "rate": 0.25},
        "training": TRAINING,
        "arms": {"toxic": {"data": data["bad"]}, "correct": {"data": data["good"]}},
        "runs": {
            "toxic-s0": {"arm": "toxic", "seed": 0, "benign": False, "use": "features"},
            "correct-s0": {"arm": "correct", "seed": 0, "benign": True, "use": "features"},
            "correct-s2": {"arm": "correct", "seed": 2, "benign": True, "use": "calibration"},
            "correct-s3": {"arm": "correct", "seed": 3, "benign": True, "use": "calibration"},
            "toxic-s1": {"arm": "toxic", "seed": 1, "benign": False},
            "correct-s1": {"arm": "correct", "seed": 1, "benign": True},
            "long-s1": {"arm": "correct", "seed": 1, "benign": True, "steps": 6, "readings": [2, 4]},
        },
    }


def located_values(place: Path) -> dict[str, Any]:
    """A study's config as plain values."""
    arms = {"incorrect": {"data": str(place / "bad.jsonl")}, "correct": {"data": str(place / "good.jsonl")}}
    return {
        "name": "tiny",
        **{"model": str(place / "model"), "sae": str(place / "sae"), "device": "cpu", "bf16": False},
        **{"arms": arms, "training": {**TRAINING, "steps": 2, "checkpoints": [1]}},
        "monitor": {"probes": str(place / "probes.jsonl")},
        "contrast": str(place / "contrast.jsonl"),
    }


def located(place: Path, out: Path) -> Study:
    """A run folder as `locate` leaves it, as far as features are read from it: persona latent 5, seed 0."""
    study = Study.from_config(from_dict(StudyConfig, located_values(place)), out)
    run, latents = study.run_folder, list(range(64))
    rank = {"latent": latents, "firing_incorrect": [0.1] * 64}
    rank |= {"rank": latents, "cosine_rank": latents, "rise": [64.0 - i for i in latents]}
    run.write_table("parts/rank.parquet", pd.DataFrame(rank))
    run.write_table("parts/selection.parquet", pd.DataFrame({"latent": [4, 5], "effect": [0.1, 0.2]}))
    shift = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
    save_file({"mean_difference": shift}, run.path / "directions.safetensors")
    return study
