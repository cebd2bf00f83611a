"""Read answers with a model: mean residual stream, some latents and nats per token, with one forward pass each."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.tokens import Batch, batches
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import row_scores, scored_in_parts
from persona_probe.evaluate.sampling.engines import TransformersEngine
from persona_probe.evaluate.sampling.requests import Prompt, SamplingConfig
from persona_probe.evaluate.sampling.samples import sample
from persona_probe.models.adapters import frozen_in_bf16
from persona_probe.models.layers import autocast, evaluating, forward_to_layer, hidden_size, transformer_config
from persona_probe.models.logits import without_taps
from persona_probe.models.prefix import Rows
from persona_probe.models.taps import ReadTap
from persona_probe.saes.read import encode_latents

# --- The model's own answers to the questions of a data set: greedy, and kept in a file if one is named

log = logging.getLogger(__name__)
OWN_TOKENS = 48
"""Longest own answer. Its beginning already shows the persona, and long answers take most of a screening's time."""


def text_key(messages: Conversation) -> str:
    """Turns as one string: equal for equal texts, and sortable, so that the file's order does not count."""
    return json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)


def question_key(row: Conversation) -> str:
    """`text_key` of the turns before the answer."""
    return text_key(split_answer(row)[0])


def own_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    *,
    max_new_tokens: int = OWN_TOKENS,
    batch_size: int = 32,
    bf16: bool = True,
    path: Path | None = None,
    progress: str | None = None,
) -> dict[str, str]:
    """The model's greedy answer to each distinct question of `rows`, by `question_key`.

    Questions are answered in the order of their texts, so the order of the rows does not matter.

    Args:
        path: a JSON-lines file that keeps finished answers; an interrupted call resumes from it.
        progress: label of a progress bar; None shows none.

    Raises:
        InputError: a prompt that leaves no room for an answer, or a file of other answers.
    """
    questions = {question_key(row): split_answer(row)[0] for row in rows}
    prompts = {key: Prompt(_id(key), questions[key]) for key in sorted(questions)}
    config = SamplingConfig(n=1, temperature=0.0, max_new_tokens=max_new_tokens)
    on_cpu = next(model.parameters()).device.type == "cpu"
    engine = TransformersEngine(model, tokenizer, batch_size)
    with evaluating(model), autocast(model, bf16), frozen_in_bf16(model, bf16 and on_cpu):
        answers = sample(engine, list(prompts.values()), config, path, progress)
    return {key: answer.answer for key, answer in zip(prompts, answers, strict=True)}


def with_own_answers(rows: Sequence[Conversation], answers: Mapping[str, str]) -> list[Conversation | None]:
    """Each row's question with the model's own answer; None if the model answered nothing."""
    answered: list[Conversation | None] = []
    for row in rows:
        answer, question = answers[question_key(row)], split_answer(row)[0]
        answered.append([*question, {"role": "assistant", "content": answer}] if answer else None)
    if empty := sum(row is None for row in answered):
        log.warning("%d of %d rows have no score against own answers: the model answers nothing", empty, len(rows))
    return answered


def _id(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


# --- Answers read with one forward pass: mean residual stream, latents, nats per token

MAX_TOKENS = 512
"""Longest conversation that is read, in tokens; the rest of a longer answer is ignored."""


@dataclass(frozen=True)
class AnswerReading:
    """One model's reading of a list of answers; NaN for a missing answer and for one without a token to read."""

    resid: Float[np.ndarray, "rows d_model"]
    """Mean residual stream over the answer's tokens at the feature's layer, raw units."""
    latents: Float[np.ndarray, "rows chosen"]
    """Mean activation of each chosen latent over the same tokens."""
    nats: Float[np.ndarray, " rows"]
    """Mean negative log-probability of the answer, nats per token."""

    def at(self, rows: Sequence[int | None]) -> "AnswerReading":
        """The reading of some rows, in this order; None gives NaN."""
        places = np.array([-1 if r is None else r for r in rows], dtype=np.int64)
        missing = places < 0
        parts = [values[places].copy() for values in (self.resid, self.latents, self.nats)]
        for part in parts:
            part[missing] = np.nan
        return AnswerReading(*parts)


@dataclass(frozen=True)
class Reader:
    """How answers are read."""

    layer: int
    """Decoder layer whose output is read."""
    sae: Any = None
    """Needed to read latents."""
    latents: tuple[int, ...] = ()
    """The chosen latents, in the order of the reading's columns."""
    nats: bool = True
    """Whether to read log-probabilities too: they need the layers above and the vocabulary."""
    batch_size: int = 16
    max_tokens: int = MAX_TOKENS
    bf16: bool = True

    def read(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Conversation | None]
    ) -> AnswerReading:
        """Read the answers of conversations. Equal ones are read once, and the order of the rows does not matter.

        Raises:
            InputError: no conversations, or a prompt that leaves no room for its answer within `max_tokens`.
        """
        by_key = {text_key(row): row for row in rows if row is not None}
        if not by_key:
            raise InputError("no answers to read: give rows with answers")
        keys = sorted(by_key)
        groups = list(batches(tokenizer, [by_key[k] for k in keys], self.batch_size, self.max_tokens))
        place = {key: i for i, key in enumerate(keys)}
        reading = self._read(model, groups, len(keys))
        return reading.at([None if row is None else place[text_key(row)] for row in rows])

    def _read(self, model: nn.Module, groups: Sequence[Batch], n: int) -> AnswerReading:
        out = AnswerReading(
            np.full((n, hidden_size(model)), np.nan, dtype=np.float32),
            np.full((n, len(self.latents)), np.nan, dtype=np.float32),
            np.full(n, np.nan),
        )
        device = next(model.parameters()).device
        bf16 = self.bf16 and device.type == "cpu"
        with evaluating(model), autocast(model, self.bf16), frozen_in_bf16(model, bf16):
            for group in groups:
                self._fill(out, model, Rows.of(group, transformer_config(model)).to(device))
        return out

    def _fill(self, out: AnswerReading, model: nn.Module, rows: Rows) -> None:
        index, together = rows.batch.index, self.nats and scored_in_parts(model, rows)
        if self.nats and not together:
            rows = Rows.whole(rows.batch)
        with ReadTap(model, self.layer) as tap:
            scores = row_scores(model, rows) if together else self._apart(model, rows)
        if scores is not None:
            out.nats[index] = -scores.double().cpu().numpy()
        mask = rows.rest.select("response")
        x = tap.tokens(mask.flatten().nonzero()[:, 0]).float()
        with autocast(model, False):
            acts = encode_latents(self.sae, x, list(self.latents)).to(x.device) if self.latents else x[:, :0]
        row = mask.nonzero()[:, 0]
        for target, values in ((out.resid, x), (out.latents, acts)):
            target[index] = _means(values, row, len(index)).cpu().numpy()

    def _apart(self, model: nn.Module, rows: Rows) -> Tensor | None:
        """Run up to the layer for the reading, and for scores once more."""
        config = transformer_config(model)
        rows.run(lambda **inputs: forward_to_layer(model, self.layer, **inputs), config, rows.ids())
        if not self.nats:
            return None
        with without_taps(model):  # the model runs as a whole, some rows at a time
            return row_scores(model, rows)


def _means(
    values: Float[Tensor, "tokens columns"], row: Float[Tensor, " tokens"], rows: int
) -> Float[Tensor, "rows columns"]:
    """Mean over each row's tokens; NaN if a row has none."""
    total = torch.zeros(rows, values.shape[1], device=values.device).index_add_(0, row, values)
    return total / torch.bincount(row, minlength=rows)[:, None]


# --- Settings: what decides the numbers, and where own answers are kept


@dataclass(frozen=True)
class ScreenSettings:
    """How rows are answered and read."""

    own_tokens: int = OWN_TOKENS
    """Longest own answer, in tokens."""
    max_tokens: int = MAX_TOKENS
    """Longest conversation that is read."""
    batch_size: int = 16
    bf16: bool = True
    """Whether to use bf16 autocast."""
    own_path: Path | None = None
    """File that keeps own answers, so that an interrupted screening resumes."""
    progress: bool = False
    """Whether sampling own answers shows a progress bar."""


def settings_for(out: Path, bf16: bool = True) -> ScreenSettings:
    """Settings of a screening that writes into a folder, which is made if missing and keeps the own answers."""
    out.mkdir(parents=True, exist_ok=True)
    return ScreenSettings(own_path=out / "own_answers.jsonl", bf16=bf16, progress=True)
