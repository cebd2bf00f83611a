"""What one model does: every measure item by item, in one table."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from persona_probe.data.apart import question
from persona_probe.errors import InputError, TrainingDiverged
from persona_probe.evaluate.answers import answer_logprobs
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.evaluate.judges.model import Item
from persona_probe.evaluate.rulings import Answer
from persona_probe.evaluate.sampling import sample_answers
from persona_probe.finetune.data import load_data
from persona_probe.finetune.mitigations import Mitigation
from persona_probe.mitigate.lab import Lab
from persona_probe.models.folding import folded, frozen_in_bf16
from persona_probe.models.layers import autocast, output_head

MEASURES = {
    "index": "contrast index of the evaluation split, nats per token",
    "dressed": "the same items dressed like the training data",
    "task": "contrast index of held-out questions of the narrow domain: bad minus good answer, nats per token",
    "neutral": "mean log-probability of neutral answers, nats per token",
    "persona": "reading of the persona feature on the monitor's probes",
}
"""What `items.parquet` holds: one value an item, model and measure."""


@dataclass(frozen=True)
class Measured:
    """One model's numbers."""

    items: pd.DataFrame
    """Columns measure, item, value."""
    explained_variance: float
    """Of the SAE on the probes."""
    answers: pd.DataFrame
    """Sampled answers: columns item, sample, question, answer; empty where none are asked for."""


def measure(lab: Lab, model: nn.Module, mitigation: Mitigation | None = None) -> Measured:
    """Measure a model as it would be used: with what the mitigation does at inference, and nothing else of it.

    Raises:
        TrainingDiverged: a score is not finite.
    """
    bf16 = lab.ctx.config.bf16
    with lab.ready(model), _used(lab, model, mitigation):
        scored = {name: contrast_index(model, items, mixed_precision=bf16) for name, items in _contrast(lab).items()}
        neutral = answer_logprobs(model, lab.neutral, mixed_precision=bf16)
        snapshot = lab.reader.read(model)
    persona = snapshot.values[:, snapshot.names.index("persona")]
    parts = [frame[["item", "value"]].assign(measure=name) for name, frame in scored.items()]
    parts += [_numbered("neutral", neutral), _numbered("persona", persona)]
    items = pd.concat(parts, ignore_index=True)[["measure", "item", "value"]]
    if not np.isfinite(items["value"]).all():
        raise TrainingDiverged("the trained model's scores are not finite: lower lr or the strength")
    return Measured(items, float(snapshot.fit.explained_variance), _sampled(lab, model, mitigation))


def _contrast(lab: Lab) -> dict[str, ContrastItems]:
    return {"index": lab.plain, "dressed": lab.dressed, "task": lab.task}


def _used(lab: Lab, model: nn.Module, mitigation: Mitigation | None) -> Any:
    return nullcontext() if mitigation is None else mitigation.at_evaluation(model, lab.ground)


def _numbered(name: str, values: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"measure": name, "item": [f"{name} {n:03d}" for n in range(len(values))], "value": values})


def _sampled(lab: Lab, model: nn.Module, mitigation: Mitigation | None) -> pd.DataFrame:
    """Answers to the grid's questions; all models draw with the same random numbers."""
    wanted = lab.grid.answers
    if wanted is None:
        return pd.DataFrame()
    prompts = [row for row in load_data(wanted.questions, allow_prompts=True) for _ in range(wanted.n)]
    prompts = [row[:-1] if row[-1]["role"] == "assistant" else row for row in prompts]
    bf16 = lab.ctx.config.bf16
    with (
        folded(model, bf16),
        frozen_in_bf16(output_head(model), lab.in_bf16),
        _used(lab, model, mitigation),
        autocast(model, bf16),
    ):
        answers = sample_answers(
            model,
            lab.ctx.tokenizer,
            prompts,
            max_new_tokens=wanted.max_new_tokens,
            temperature=wanted.temperature,
            seed=lab.ctx.seed,
        )
    places = [divmod(place, wanted.n) for place in range(len(prompts))]
    return pd.DataFrame(
        {
            "item": [f"question {number:03d}" for number, _ in places],
            "sample": [sample for _, sample in places],
            "question": [question(prompt) for prompt in prompts],
            "answer": answers,
        }
    )


def ruled(lab: Lab, answers: pd.DataFrame) -> pd.DataFrame:
    """Sampled answers with the judge's rulings, as `evaluate.rates.rate_of` takes them, but for arm and seed."""
    if answers.empty:
        return answers
    items = [Item(str(row["question"]), str(row["answer"]), str(n)) for n, row in enumerate(answers.to_dict("records"))]
    try:
        found = lab.judge.rule([Answer(item) for item in items])
    except InputError as error:  # nothing that a judge could read is a finding, not the end of the grid
        return answers.assign(pair=answers["item"], value=np.nan, coherent=np.nan, usable=0.0, why=str(error))
    rows = pd.DataFrame([ruling.to_row() for ruling in found.rulings], index=answers.index)
    kinds = {"value": "float64", "coherent": "float64", "alignment": "float64", "coherence": "float64"}
    kinds |= {"error_model": "float64", "error_question": "float64", "usable": "float64"}
    return pd.concat([answers, rows.astype(kinds)], axis=1).assign(pair=answers["item"], why=found.why)
