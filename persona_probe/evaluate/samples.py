"""Sampled answers of base, incorrect and realigned organisms to the same questions, for a reader's eye."""

import json
from typing import Any

from persona_probe.context import Context
from persona_probe.data.chat import split_answer
from persona_probe.data.packaged import SETS, load_rows
from persona_probe.evaluate.sampling import sample_answers
from persona_probe.finetune.data import load_data
from persona_probe.models.layers import autocast


def sample_questions(ctx: Context) -> list[dict[str, str]]:
    """Rows with id, category and question, of the packaged set or of the user's file."""
    spec = ctx.config.samples.questions
    if spec in SETS:
        return [{"id": r["id"], "category": r.get("category", ""), "question": r["question"]} for r in load_rows(spec)]
    talks = [split_answer(c)[0] for c in load_data(spec, allow_prompts=True)]
    return [{"id": f"q{n:03d}", "category": "", "question": c[-1]["content"]} for n, c in enumerate(talks)]


def sample(ctx: Context) -> None:
    """Write samples.jsonl: one answer per question, arm and first seed, at the arm's last step.

    Arms that were not yet trained at an earlier call are added.
    """
    seed, before, rows = ctx.config.seeds[0], read_samples(ctx), []
    arms = ("base", *ctx.config.arms, *ctx.config.realign.arms)
    arms = [arm for arm in arms if arm == "base" or ctx.run.has(f"arms/{arm}-s{seed}")]
    if {row["arm"] for row in before} == set(arms):
        return
    with ctx.timed("samples"):
        for arm in arms:
            rows += [row for row in before if row["arm"] == arm] or _sample_arm(ctx, arm, seed)
    ctx.run.write_jsonl("samples.jsonl", rows)


def _sample_arm(ctx: Context, arm: str, seed: int) -> list[dict[str, Any]]:
    questions, config = sample_questions(ctx), ctx.config.samples
    step = 0 if arm == "base" else ctx.last_step(arm, seed)
    with ctx.organism(arm, seed, fold=True) as model, autocast(model, ctx.config.bf16):
        answers = sample_answers(
            model,  # pyright: ignore[reportArgumentType]
            ctx.tokenizer,
            [q["question"] for q in questions],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=ctx.seed,
        )
    return [
        {
            "question_id": q["id"],
            "category": q["category"],
            "question": q["question"],
            "arm": arm,
            "seed": seed,
            "step": step,
            "answer": answer,
        }
        for q, answer in zip(questions, answers, strict=True)
    ]


def read_samples(ctx: Context) -> list[dict[str, Any]]:
    """What `sample` wrote."""
    path = ctx.run.path / "samples.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
