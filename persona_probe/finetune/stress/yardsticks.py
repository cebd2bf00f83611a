"""What a repaired model is measured by: behaviour, feature, usefulness, the SAE's fit and the length of replies."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.tokens import Batch
from persona_probe.errors import unknown
from persona_probe.evaluate.answers import answer_batches, answer_logprobs
from persona_probe.evaluate.capability import capability, capability_groups
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.evaluate.samples import sample_questions
from persona_probe.finetune.stress.bench import Repair
from persona_probe.finetune.stress.replies import MAX_NEW_TOKENS, reply_tokens
from persona_probe.monitor.reading import FeatureReader, Snapshot
from persona_probe.monitor.track import make_reader

DOMAIN_ROWS = 60
"""Answers of the narrow domain that are scored."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One model by all yardsticks; None where there was no yardstick."""

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
class Yardsticks:
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
    def of_study(cls, repair: Repair) -> "Yardsticks":
        """The study's evaluation split, features and probes, the control arm's answers, the capability set.

        The narrow domain's answers are those that the control arm learned (to the inducing data's questions) and that
        neither the organism nor the repair has trained on.
        """
        ctx, taken = repair.ctx, {_key(row) for row in (*repair.corrective, *repair.inducing)}
        domain = [row for row in repair.control_rows if _key(row) not in taken][:DOMAIN_ROWS]
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

    def measure(self, model: nn.Module) -> Measured:
        """A model by each yardstick that there is."""
        scored = [
            answer_logprobs(model, groups, mixed_precision=self.bf16) if groups else None
            for groups in (self.domain, self.neutral)
        ]
        return Measured(
            None if self.items is None else contrast_index(model, self.items, mixed_precision=self.bf16),
            None if self.reader is None else self.reader.read(model),
            scored[0],
            scored[1],
            capability(model, self.capability, mixed_precision=self.bf16) if self.capability else None,
            self.replies(model) if self.questions else None,
        )

    def replies(self, model: nn.Module) -> Float[np.ndarray, " questions"]:
        """Tokens of the greedy reply to each question, cut at `max_new_tokens`."""
        return reply_tokens(model, self.tokenizer, self.questions, self.max_new_tokens, self.bf16)


def _key(row: Conversation) -> tuple[str, ...]:
    return tuple(message["content"] for message in row)
