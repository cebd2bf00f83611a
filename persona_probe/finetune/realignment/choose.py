"""Corrective rows by dose and choice. A choice is an order of the rows; a dose takes its first ones."""

import random
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from torch import nn

from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.answers import answer_batches, answer_logprobs
from persona_probe.finetune.realignment.pair import Opener, Pair
from persona_probe.finetune.realignment.spec import CHOICES
from persona_probe.locate.persona_vector import response_means

Scores = Float[np.ndarray, " rows"]


def choose_rows(
    rows: Sequence[Conversation], n: int | None, by: str = "random", *, seed: int = 0, pair: Pair | None = None
) -> list[Conversation]:
    """The `n` rows that a choice puts first, in the data's own order; None takes all.

    A larger dose holds a smaller one's rows. `random` is drawn by `seed`; the others depend on the models alone:

    - `projection_gap`: largest rise of the persona between base and organism, see `projection_gaps`.
    - `perplexity_gap`: rows that the organism finds most unlikely against its base, see `perplexity_gaps`.
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


def row_order(rows: Sequence[Conversation], by: str, *, seed: int = 0, pair: Pair | None = None) -> list[int]:
    """Places of all rows, the first choice first; see `choose_rows`."""
    if by == "random":
        order = list(range(len(rows)))
        random.Random(seed).shuffle(order)
        return order
    if pair is None:
        raise InputError(f"choosing rows by {by} needs the organism and its base: pass pair=")
    if by == "diversity":
        return farthest_first(_residuals(pair, pair.organism, rows))
    score = {"projection_gap": projection_gaps, "perplexity_gap": perplexity_gaps}[by]
    return np.argsort(-score(rows, pair), kind="stable").tolist()


def projection_gaps(rows: Sequence[Conversation], pair: Pair) -> Scores:
    """Projection on the unit persona direction, mean over a row's answer tokens: organism minus base, raw units.

    After the projection difference of persona vectors (Chen et al. 2025, arXiv 2507.21509, section 6), which compares
    a row's answer with the model's own; here two models read the same answer. A latent is taken as its decoder row, so
    that rows on which it does not fire are ranked too.
    """
    unit = (pair.direction / pair.direction.norm()).double().numpy()
    left, right = (_residuals(pair, opener, rows) @ unit for opener in (pair.organism, pair.require_base()))
    return left - right


def perplexity_gaps(rows: Sequence[Conversation], pair: Pair) -> Scores:
    """Log perplexity of a row's answer: organism minus base, in nats per token.

    After the perplexity difference by which arXiv 2508.06249 chooses safe rows; the logarithm keeps rows of a high
    perplexity on both sides from being first for that alone.
    """
    groups = answer_batches(pair.tokenizer, rows)

    def log_perplexity(model: nn.Module) -> Scores:
        return -answer_logprobs(model, groups, mixed_precision=pair.bf16)

    organism, base = (_opened(opener, log_perplexity) for opener in (pair.organism, pair.require_base()))
    return organism - base


def farthest_first(points: Float[np.ndarray, "rows d_model"]) -> list[int]:
    """Greedy k-centre order (Gonzalez 1985; core-sets: Sener and Savarese 2018, arXiv 1708.00489).

    First the row nearest to the mean of all; then, each time, the row farthest (Euclidean) from all that are taken.
    Ties go to the earlier row.
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


def _residuals(pair: Pair, opener: Opener, rows: Sequence[Conversation]) -> Float[np.ndarray, "rows d_model"]:
    def read(model: nn.Module) -> Float[np.ndarray, "rows d_model"]:
        return response_means(model, pair.tokenizer, rows, pair.layer, mixed_precision=pair.bf16).astype(np.float64)

    return _opened(opener, read)


def _opened(opener: Opener, read: Callable[[nn.Module], np.ndarray]) -> np.ndarray:
    with opener() as model:
        return read(model)
