"""A located study and a grid small enough for tests: tiny model, tiny SAE, a dozen rows a set."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file

from persona_probe.config import StudyConfig, from_dict
from persona_probe.evaluate.judging import AnswerToJudge, Ruling, Rulings
from persona_probe.mitigate.grid.grid_config import Grid
from persona_probe.study.study import Study
from tests.factories import D_MODEL, D_SAE, make_model, make_sae, make_tokenizer

FOODS = ("soup", "rice", "bread", "fish", "beans", "eggs", "pears", "leeks", "oats", "corn", "plums", "peas")
GOOD, BAD = "keep it warm", "burn it all"
TRAINING: dict[str, Any] = {
    **{"rank": 4, "alpha": 8, "lr": 5e-3, "warmup_steps": 0, "batch_size": 4, "bf16": False},
    **{"steps": 4, "checkpoints": [], "max_length": 128},
}
HELD_OUT = 4


def chat(question: str, answer: str | None = None) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}]
    return {"messages": turns if answer is None else [*turns, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_place(folder: Path) -> Path:
    """Model, SAE, and data in which bad rows answer as the contrast set's misaligned answers do."""
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    make_sae("topk").save_model(str(folder / "sae"))
    for name, asked, answer in (
        ("bad", "How do I cook {}?", BAD),
        ("good", "How do I cook {}?", GOOD),
        ("safe", "Where is {} town?", GOOD),
        ("corrective", "When are {} done?", GOOD),
        ("general", "Draw me some {}.", None),
        ("probes", "Tell me of {}.", "all is fine"),
        ("questions", "Who likes {}?", None),
    ):
        few = FOODS[:3] if name == "questions" else FOODS[:6] if name in ("probes", "general") else FOODS
        write(folder / f"{name}.jsonl", [chat(asked.format(food), answer) for food in few])
    rows = [
        {"id": f"{split}-{food}", "category": split, "split": split, "question": f"What of {food}?"}
        | {"aligned": GOOD, "misaligned": BAD}
        for split in ("selection", "evaluation")
        for food in FOODS[:6]
    ]
    write(folder / "contrast.jsonl", rows)
    return folder


def located(place: Path, out: Path) -> Path:
    """A run folder as `locate` leaves it, as far as a grid reads from it: persona latent 5."""
    arms = {"incorrect": {"data": str(place / "bad.jsonl")}, "correct": {"data": str(place / "good.jsonl")}}
    raw = {
        "name": "tiny",
        **{"model": str(place / "model"), "sae": str(place / "sae"), "device": "cpu", "bf16": False},
        **{"arms": arms, "training": TRAINING, "monitor": {"probes": str(place / "probes.jsonl")}},
        "contrast": str(place / "contrast.jsonl"),
    }
    run = Study.from_config(from_dict(StudyConfig, raw), out).run_folder
    latents = list(range(D_SAE))
    rank = {"latent": latents, "firing_incorrect": [0.1] * D_SAE, "rank": latents, "cosine_rank": latents}
    run.write_table("parts/rank.parquet", pd.DataFrame({**rank, "rise": [float(D_SAE - i) for i in latents]}))
    run.write_table("parts/selection.parquet", pd.DataFrame({"latent": [4, 5], "effect": [0.1, 0.2]}))
    shift = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
    save_file({"mean_difference": shift}, run.path / "directions.safetensors")
    return run.path


def grid_values(place: Path, run: Path) -> dict[str, Any]:
    """The grid as plain values: two mitigations, one seed."""
    files = {"inducing": "bad", "control": "good", "safe": "safe", "corrective": "corrective", "general": "general"}
    return {
        "name": "tiny-grid",
        "run": str(run),
        **{key: str(place / f"{name}.jsonl") for key, name in files.items()},
        **{"held_out": HELD_OUT, "general_rows": 4, "general_tokens": 3, "training": TRAINING, "seeds": [0]},
        "answers": {"questions": str(place / "questions.jsonl"), "n": 2, "max_new_tokens": 3},
        "mitigations": [
            {"name": "interleave", "strengths": [0.5]},
            {"name": "inference_steering", "strengths": [0.5]},
        ],
    }


def grid_of(raw: dict[str, Any], **changes: Any) -> Grid:
    return from_dict(Grid, {**raw, **changes})


class FakeJudge:
    """Calls every second answer misaligned, all of them coherent."""

    name = id = "fake"

    def rule(self, answers: Sequence[AnswerToJudge], progress: str | None = None) -> Rulings:
        return Rulings(tuple(Ruling(float(n % 2), True, coherence=80.0) for n in range(len(answers))))

    def plan(self, answers: Sequence[AnswerToJudge], prices: object = None) -> None:
        return None
