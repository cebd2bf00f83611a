"""What all corrections of one study are measured against, each taken once: the base, its band, lengths, perplexity."""

from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from persona_probe.context import Context
from persona_probe.evaluate.answers import answer_batches, answer_logprobs
from persona_probe.evaluate.samples import sample_questions
from persona_probe.finetune.stress.replies import reply_tokens
from persona_probe.locate.stage import neutral_answers
from persona_probe.models.adapters import organism
from persona_probe.models.folding import folded
from persona_probe.monitor.bands import Band
from persona_probe.monitor.reading import Snapshot
from persona_probe.monitor.track import make_reader, persona_band


class Bench:
    """The base model's side of every comparison, and the measures that a correction ends with."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    @cached_property
    def base(self) -> Snapshot:
        """The base model's reading."""
        with self.ctx.base() as model:
            return make_reader(self.ctx).read(model)

    @cached_property
    def band(self) -> Band:
        """The persona feature's base band."""
        return persona_band(self.ctx, self.base)

    @cached_property
    def base_evals(self) -> pd.DataFrame:
        """The base model's evaluation items, as track left them."""
        return self.ctx.run.read_table("parts/track-base.evals.parquet").query("split == 'evaluation'")

    @cached_property
    def base_log_perplexity(self) -> float:
        """Of the base, see `log_perplexity`."""
        with self.ctx.base() as model:
            return self.log_perplexity(model)

    @cached_property
    def base_reply_tokens(self) -> float:
        """Of the base, see `reply_tokens`."""
        with self.ctx.base() as model:
            return self.reply_tokens(model)

    def log_perplexity(self, model: nn.Module) -> float:
        """Of neutral answers (locate's), in nats per token, mean over answers."""
        groups = answer_batches(self.ctx.tokenizer, neutral_answers(self.ctx))
        return -float(np.mean(answer_logprobs(model, groups, mixed_precision=self.ctx.config.bf16)))

    def reply_tokens(self, model: nn.Module) -> float:
        """Mean tokens of greedy replies to the study's sample questions, see `stress.replies`."""
        questions, bf16 = [row["question"] for row in sample_questions(self.ctx)], self.ctx.config.bf16
        with folded(model, bf16):
            return float(np.mean(reply_tokens(model, self.ctx.tokenizer, questions, mixed_precision=bf16)))

    def after(self, checkpoint: Path) -> dict[str, float]:
        """Perplexity ratio to the base and length of replies of a saved organism, read from what was saved."""
        base = self.base_log_perplexity  # before an adapter is on the model that both share
        with organism(self.ctx.model, checkpoint) as model:
            ratio = float(np.exp(self.log_perplexity(model) - base))
            return {"perplexity_ratio": ratio, "reply_tokens": self.reply_tokens(model)}
