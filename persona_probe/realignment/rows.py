"""Corrective rows: read, compared with evaluation questions and inducing data, and chosen by dose and measure."""

import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.context import Context
from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.check import common, question
from persona_probe.data.load import Row, load_data
from persona_probe.data.mix import match_lengths
from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.answers import EQUAL_LENGTHS, Opener, perplexity_gaps
from persona_probe.latents.persona_vectors import response_means
from persona_probe.models.adapters import base_weights, is_adapted
from persona_probe.monitor.features import Feature
from persona_probe.realignment.spec import CHOICES, named_sets


@dataclass(frozen=True)
class Background:
    """How corrective rows compare with inducing and evaluation data."""

    answer_tokens: float
    """Mean answer tokens of the corrective rows."""
    inducing_tokens: float | None
    """Mean answer tokens of the inducing rows; None if they are not known."""
    notes: tuple[str, ...]
    """Warnings for a reader: overlaps that are not refused, lengths that differ."""

    @property
    def length_ratio(self) -> float | None:
        """Corrective to inducing."""
        return None if self.inducing_tokens is None else self.answer_tokens / self.inducing_tokens

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "notes": list(self.notes), "length_ratio": self.length_ratio}


def corrective_rows(data: str | Sequence[str]) -> list[Conversation]:
    """The rows of a set or file, or of several joined (`a+b`, or a list).

    Raises:
        InputError: no such set or file, or bad rows.
    """
    return [row for name in named_sets(data) for row in load_data(name)]


def refuse_overlap(rows: Sequence[Conversation], evaluation: Sequence[str]) -> None:
    """Refuse corrective rows that ask what the evaluation asks: they would train for the test.

    Exact, or at least half of the shorter question's 5-word runs (`data.check.common`; shorter questions are one run).

    Raises:
        InputError: some overlap; the worst pair is shown.
    """
    questions = [question(row) for row in rows]
    if overlaps := sorted(common(questions, evaluation), reverse=True):
        share, i, j = overlaps[0]
        raise InputError(
            f"{len({row for _, row, _ in overlaps})} of {len(rows)} corrective rows overlap the evaluation questions: "
            f"row {i + 1} {questions[i]!r} and question {evaluation[j]!r} share {share:.0%} of their 5-word runs; "
            "take these rows out"
        )


def background(
    rows: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    inducing: Sequence[Conversation] = (),
    evaluation: Sequence[Row] = (),
) -> Background:
    """Length and overlap warnings for the corrective rows (reported, not raised)."""
    match = match_lengths(rows, inducing or rows, tokenizer)
    notes = [*_overlap_notes(rows, inducing, evaluation)]
    ratio = match.mean_a / match.mean_b
    if not EQUAL_LENGTHS[0] <= ratio <= EQUAL_LENGTHS[1]:
        notes.append(
            f"corrective answers have {match.mean_a:.0f} tokens, inducing ones {match.mean_b:.0f} (ratio {ratio:.2f}): "
            "length alone may explain part of the correction"
        )
    return Background(match.mean_a, match.mean_b if inducing else None, tuple(notes))


def _overlap_notes(
    rows: Sequence[Conversation], inducing: Sequence[Conversation], evaluation: Sequence[Row]
) -> Iterator[str]:
    if repeated := {i for _, i, _ in common([question(r) for r in rows], [question(r) for r in inducing])}:
        yield f"{len(repeated)} of {len(rows)} corrective questions overlap the inducing data's questions"
    answers = [split_answer(row)[1] or "" for row in rows]
    texts = [row[side] for row in evaluation for side in ("aligned", "misaligned")]
    if leaked := {i for _, i, _ in common(answers, texts)}:
        yield f"{len(leaked)} of {len(rows)} corrective answers overlap answers that the evaluation scores"


# --- An organism and its base, opened one after the other: those of a study share one copy of the weights


@dataclass(frozen=True)
class ModelPair:
    """An organism and its base, and what rows are ranked by."""

    organism: Opener
    """Opens the organism for the length of a block."""
    base: Opener | None
    """Opens its base; without one (None), choices by a gap are refused."""
    tokenizer: PreTrainedTokenizerBase
    layer: int
    """Decoder layer whose output is projected."""
    direction: Float[Tensor, " d_model"]
    """The persona feature as a direction."""
    bf16: bool = True

    def require_base(self) -> Opener:
        """The opener of the base.

        Raises:
            InputError: there is none.
        """
        if self.base is None:
            raise InputError("choosing rows by a gap needs the base model: pass base=, or a PEFT model")
        return self.base

    @classmethod
    def of_study(cls, ctx: Context, seed: int) -> "ModelPair":
        """The organism that the study corrects, and the study's base, layer and persona latent."""
        from persona_probe.latents.stage import persona_latent

        opened = partial(ctx.organism, ctx.config.realign.start, seed)
        direction = feature_direction(ctx.sae, persona_latent(ctx))
        return cls(opened, ctx.base, ctx.tokenizer, ctx.layer, direction, ctx.config.bf16)

    @classmethod
    def of_models(
        cls,
        model: nn.Module,
        base: nn.Module | None,
        tokenizer: PreTrainedTokenizerBase,
        layer: int,
        direction: Float[Tensor, " d_model"],
        bf16: bool = True,
    ) -> "ModelPair":
        """An organism of your own; the base of a PEFT model is the model with its adapters off."""
        opener: Opener | None = None if base is None else partial(nullcontext, base)
        if opener is None and is_adapted(model):
            opener = partial(base_weights, model)
        return cls(partial(nullcontext, model), opener, tokenizer, layer, direction, bf16)


def feature_direction(sae: Any | None, feature: Feature) -> Float[Tensor, " d_model"]:
    """A latent's decoder row, or the direction itself."""
    if isinstance(feature, Tensor):
        return feature.detach().float().cpu()
    assert sae is not None  # a monitor refuses a latent without an SAE
    return torch.as_tensor(sae.W_dec[feature]).detach().float().cpu()


# --- Corrective rows by dose and choice

Scores = Float[np.ndarray, " rows"]


def choose_rows(
    rows: Sequence[Conversation], n: int | None, by: str = "random", *, seed: int = 0, pair: ModelPair | None = None
) -> list[Conversation]:
    """The `n` rows that a choice puts first, in the data's own order; None takes all.

    A larger dose holds a smaller one's rows. `random` is drawn by `seed`; the others depend on the models alone:

    - `projection_gap`: largest rise of the persona between base and organism, see `projection_gaps`.
    - `perplexity_gap`: rows least likely under the organism against its base (`evaluate.answers.perplexity_gaps`).
    - `diversity`: rows far apart, see `farthest_first`, by the organism's mean residual stream over the answer.

    Raises:
        InputError: an unknown choice, more rows than there are, or no models for a choice that needs them.
    """
    if by not in CHOICES:
        raise unknown("choice of rows", by, CHOICES)
    if n is not None and not 1 <= n <= len(rows):
        raise InputError(f"{n} corrective rows wanted, the data holds {len(rows)}: lower rows, or join sets (a+b)")
    if n is None or n == len(rows):
        return list(rows)
    return [rows[i] for i in sorted(row_order(rows, by, seed=seed, pair=pair)[:n])]


def row_order(rows: Sequence[Conversation], by: str, *, seed: int = 0, pair: ModelPair | None = None) -> list[int]:
    """Places of all rows, the first choice first; see `choose_rows`."""
    if by == "random":
        order = list(range(len(rows)))
        random.Random(seed).shuffle(order)
        return order
    if pair is None:
        raise InputError(f"choosing rows by {by} needs the organism and its base: pass pair=")
    if by == "diversity":
        return farthest_first(_residuals(pair, pair.organism, rows))
    if by == "projection_gap":
        gaps = projection_gaps(rows, pair)
    else:
        gaps = perplexity_gaps(pair.organism, pair.require_base(), pair.tokenizer, rows, bf16=pair.bf16)
    return np.argsort(-gaps, kind="stable").tolist()


def projection_gaps(rows: Sequence[Conversation], pair: ModelPair) -> Scores:
    """Projection on the unit persona direction, mean over a row's answer tokens: organism minus base, raw units.

    After the projection difference of persona vectors (Chen et al. 2025, arXiv 2507.21509, section 6), which compares
    a row's answer with the model's own; here two models read the same answer. A latent is taken as its decoder row, so
    that rows on which it does not fire are ranked too.
    """
    unit = (pair.direction / pair.direction.norm()).double().numpy()
    left, right = (_residuals(pair, opener, rows) @ unit for opener in (pair.organism, pair.require_base()))
    return left - right


def farthest_first(points: Float[np.ndarray, "rows d_model"]) -> list[int]:
    """Greedy k-centre order (Gonzalez 1985; core-sets: Sener and Savarese 2018, arXiv 1708.00489).

    The first row is the one nearest to the mean of all; each next one is the farthest (Euclidean) from all rows taken
    so far. Ties go to the earlier row.
    """
    first = int(np.linalg.norm(points - points.mean(axis=0), axis=1).argmin())
    order, distance = [first], np.linalg.norm(points - points[first], axis=1)
    distance[first] = -1.0
    while len(order) < len(points):
        following = int(distance.argmax())
        order.append(following)
        distance = np.minimum(distance, np.linalg.norm(points - points[following], axis=1))
        distance[order] = -1.0
    return order


def _residuals(pair: ModelPair, opener: Opener, rows: Sequence[Conversation]) -> Float[np.ndarray, "rows d_model"]:
    with opener() as model:
        return response_means(model, pair.tokenizer, rows, pair.layer, bf16=pair.bf16).astype(np.float64)
