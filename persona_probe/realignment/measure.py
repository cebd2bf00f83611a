"""What a corrected model is measured by: behaviour, feature, usefulness, the SAE's fit and the length of replies."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.context import Context, sample_questions
from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.tokens import Batch
from persona_probe.errors import unknown
from persona_probe.evaluate.answers import answer_batches, answer_logprobs, capability, capability_groups
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.evaluate.sampling.samples import sample_answers
from persona_probe.latents.stage import neutral_answers
from persona_probe.models.adapters import folded, organism
from persona_probe.models.layers import autocast
from persona_probe.monitor.band import Band
from persona_probe.monitor.reading import FeatureReader, Snapshot
from persona_probe.monitor.track import make_reader, persona_band
from persona_probe.realignment.corrected import CorrectedOrganism

# --- How long a model's replies are: greedy answers to a few questions, in tokens

MAX_NEW_TOKENS = 96


def reply_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str | Conversation],
    max_new_tokens: int = MAX_NEW_TOKENS,
    bf16: bool = True,
) -> Float[np.ndarray, " questions"]:
    """Tokens of the greedy reply to each question, cut at `max_new_tokens`."""
    with autocast(model, bf16):
        answers = sample_answers(model, tokenizer, questions, max_new_tokens=max_new_tokens, temperature=0.0)
    return np.array([len(tokenizer.encode(answer, add_special_tokens=False)) for answer in answers], dtype=np.float64)


DOMAIN_ROWS = 60
"""Answers of the narrow domain that are scored."""


@dataclass(frozen=True, eq=False)
class MeasuredModel:
    """One model by all measurements; None for what was not measured."""

    items: pd.DataFrame | None = None
    """Item table of the evaluation split."""
    snapshot: Snapshot | None = None
    """Features and the SAE's fit on the probes."""
    domain: Float[np.ndarray, " rows"] | None = None
    """Log-probability of the narrow domain's correct answers, nats per token."""
    neutral: Float[np.ndarray, " rows"] | None = None
    """The same of neutral answers."""
    capability: Float[np.ndarray, " items"] | None = None
    """1 where the right choice is the likeliest."""
    replies: Float[np.ndarray, " questions"] | None = None
    """Tokens of greedy replies."""


@dataclass(frozen=True, eq=False)
class Measurements:
    """What to measure with, tokenised once. What is left out is not measured."""

    tokenizer: PreTrainedTokenizerBase
    items: ContrastItems | None = None
    reader: FeatureReader | None = None
    feature: str = "persona"
    """The reader's feature that the verdict is about."""
    domain: Sequence[Batch] = ()
    neutral: Sequence[Batch] = ()
    capability: Sequence[Batch] = ()
    questions: Sequence[str | Conversation] = ()
    """Questions for greedy replies."""
    max_new_tokens: int = MAX_NEW_TOKENS
    bf16: bool = True

    def __post_init__(self) -> None:
        if self.reader is not None and self.feature not in self.reader.features.names:
            raise unknown("feature", self.feature, self.reader.features.names)

    @classmethod
    def of_study(cls, corrected: CorrectedOrganism) -> "Measurements":
        """The study's evaluation split, features and probes, the control arm's answers, the capability set.

        The narrow domain's answers are those that the control arm learned (to the inducing data's questions) and that
        neither the organism nor the correction has trained on.
        """
        ctx, trained_on = corrected.ctx, {_key(row) for row in (*corrected.corrective, *corrected.inducing)}
        domain = [row for row in corrected.control_rows if _key(row) not in trained_on][:DOMAIN_ROWS]
        neutral = [talk for talk in ctx.probes if split_answer(talk)[1]]
        return cls(
            ctx.tokenizer,
            ctx.evaluation,
            make_reader(ctx),
            domain=answer_batches(ctx.tokenizer, domain),
            neutral=answer_batches(ctx.tokenizer, neutral),
            capability=capability_groups(ctx.tokenizer),
            questions=[row["question"] for row in sample_questions(ctx)],
            bf16=ctx.config.bf16,
        )

    def measure(self, model: nn.Module) -> MeasuredModel:
        """Measure a model by everything that is given."""
        logprobs = [
            answer_logprobs(model, groups, bf16=self.bf16) if groups else None for groups in (self.domain, self.neutral)
        ]
        return MeasuredModel(
            None if self.items is None else contrast_index(model, self.items, bf16=self.bf16),
            None if self.reader is None else self.reader.read(model),
            logprobs[0],
            logprobs[1],
            capability(model, self.capability, bf16=self.bf16) if self.capability else None,
            self.replies(model) if self.questions else None,
        )

    def replies(self, model: nn.Module) -> Float[np.ndarray, " questions"]:
        """Tokens of the greedy reply to each question, cut at `max_new_tokens`."""
        return reply_tokens(model, self.tokenizer, self.questions, self.max_new_tokens, self.bf16)


def _key(row: Conversation) -> tuple[str, ...]:
    return tuple(message["content"] for message in row)


class BaseMeasurements:
    """What the corrections of a study are compared with: the base model, read once, on first use."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    @cached_property
    def snapshot(self) -> Snapshot:
        """The base model's reading."""
        with self.ctx.base() as model:
            return make_reader(self.ctx).read(model)

    @cached_property
    def band(self) -> Band:
        """The persona feature's base band."""
        return persona_band(self.ctx, self.snapshot)

    @cached_property
    def evals(self) -> pd.DataFrame:
        """The base model's evaluation items, as track left them."""
        return self.ctx.run.read_table("parts/track-base.evals.parquet").query("split == 'evaluation'")

    @cached_property
    def selection_index(self) -> float:
        """The base model's contrast index on the selection split, which the stop rule reads."""
        with self.ctx.base() as model:
            return float(contrast_index(model, self.ctx.selection, bf16=self.ctx.config.bf16)["value"].mean())

    def control_evals(self, seed: int) -> pd.DataFrame | None:
        """The control arm's evaluation items at its last step, as track left them; None without a control arm."""
        arm = self.ctx.config.control
        if arm == "base":
            return None
        rows = self.ctx.run.read_table(f"parts/track-{arm}-s{seed}.evals.parquet").query("split == 'evaluation'")
        return rows[rows["step"] == rows["step"].max()]

    @cached_property
    def log_perplexity(self) -> float:
        """Of neutral answers (locate's) under the base, in nats per token, mean over answers."""
        with self.ctx.base() as model:
            return self._log_perplexity(model)

    @cached_property
    def reply_tokens(self) -> float:
        """Mean tokens of the base's greedy replies to the study's sample questions."""
        with self.ctx.base() as model:
            return self._reply_tokens(model)

    def compare(self, checkpoint: Path) -> dict[str, float]:
        """Perplexity ratio of a saved organism to the base, and the length of its replies."""
        base = self.log_perplexity  # before an adapter is on the model that both share
        with organism(self.ctx.model, checkpoint) as model:
            ratio = float(np.exp(self._log_perplexity(model) - base))
            return {"perplexity_ratio": ratio, "reply_tokens": self._reply_tokens(model)}

    def _log_perplexity(self, model: nn.Module) -> float:
        groups = answer_batches(self.ctx.tokenizer, neutral_answers(self.ctx))
        return -float(np.mean(answer_logprobs(model, groups, bf16=self.ctx.config.bf16)))

    def _reply_tokens(self, model: nn.Module) -> float:
        questions, bf16 = [row["question"] for row in sample_questions(self.ctx)], self.ctx.config.bf16
        with folded(model, bf16):
            return float(np.mean(reply_tokens(model, self.ctx.tokenizer, questions, bf16=bf16)))
