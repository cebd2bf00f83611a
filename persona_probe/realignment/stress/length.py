"""Stress test 3: how much of a correction is only the length of the replies (a confound, arXiv 2607.09053)?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from persona_probe.context import sample_questions
from persona_probe.data.chat import Conversation
from persona_probe.data.mix import LengthMatch, match_lengths
from persona_probe.data.tokens import encode
from persona_probe.errors import InputError
from persona_probe.realignment.corrected import CorrectedOrganism, continued, train
from persona_probe.realignment.measure import reply_tokens
from persona_probe.realignment.outcome import difference
from persona_probe.realignment.stress.stress_table import TOKENS, Row, moved, row
from persona_probe.stats import Estimate

TEST = "length"
TOLERANCE = 0.05


@dataclass(frozen=True)
class LengthTest:
    """The organism corrected twice, with rows as long as the inducing ones and with the shortest."""

    seed: int
    rows: int
    matched: LengthMatch
    """Inducing and length-matched corrective answers."""
    shortest: LengthMatch
    """Inducing and shortest corrective answers."""
    effect: Estimate
    """Contrast index after the shortest rows minus after the matched ones (nats per token)."""
    over_base: dict[str, Estimate]
    """Contrast index minus the base's, for `matched` and `shortest`."""
    replies: dict[str, float]
    """Mean tokens of greedy replies after each."""

    def to_rows(self) -> list[Row]:
        """The confound, each run's index over the base, tokens of rows and replies."""
        rows = [row(TEST, "shortest minus matched rows", "repaired", self.effect, seed=self.seed, shown=True)]
        for name, match in (("matched", self.matched), ("shortest", self.shortest)):
            lengths = {"reference": match.mean_a, "unit": TOKENS, "seed": self.seed}
            rows.append(row(TEST, f"index minus base, {name} rows", "repaired", self.over_base[name], seed=self.seed))
            rows.append(row(TEST, f"corrective answers, {name} rows", "repaired", match.mean_b, **lengths))
            rows.append(row(TEST, f"replies, {name} rows", "repaired", self.replies[name], unit=TOKENS, seed=self.seed))
        return rows

    def statement(self) -> str:
        """The size of the confound, and whether the lengths could be matched at all."""
        what = moved(
            self.effect, "shorter rows leave a higher index", "shorter rows leave a lower index", "no effect is shown"
        )
        match = "matched" if self.matched.matched else "NOT matched within 5%: the set has no such rows"
        return (
            f"Length of the corrective answers: {what} (shortest minus matched {self.effect} nats/token). Inducing "
            f"answers have {self.matched.mean_a:.1f} tokens; {self.rows} corrective rows of {self.matched.mean_b:.1f} "
            f"({match}) leave the index at {self.over_base['matched']} over the base and replies of "
            f"{self.replies['matched']:.1f} tokens, the shortest, of {self.shortest.mean_b:.1f}, at "
            f"{self.over_base['shortest']} and {self.replies['shortest']:.1f}."
        )


def rows_by_length(
    rows: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, n: int, target: float
) -> tuple[list[Conversation], list[Conversation]]:
    """`n` rows whose mean answer is nearest to `target` tokens, and the `n` shortest.

    The first are neighbours in length: the window of the rows in order of length that comes nearest.

    Raises:
        InputError: no more than `n` rows: the two would be the same.
    """
    if not 1 <= n < len(rows):
        raise InputError(f"a length test with {n} of {len(rows)} corrective rows has no choice: use fewer than all")
    lengths = np.array([encode(tokenizer, talk).n_response for talk in rows])
    order = np.argsort(lengths, kind="stable")
    means = np.convolve(lengths[order], np.full(n, 1 / n), mode="valid")
    start = int(np.abs(means - target).argmin())
    matched, shortest = order[start : start + n], order[:n]
    return [rows[i] for i in sorted(matched)], [rows[i] for i in sorted(shortest)]


def length(corrected: CorrectedOrganism, n: int = 32) -> LengthTest:
    """Correct the organism with length-matched rows and with the shortest, as many steps as the correction took.

    Args:
        n: corrective rows of each run; fewer where the set has not twice as many.
    """
    ctx, inducing = corrected.ctx, corrected.inducing
    n = min(n, len(corrected.corrective) // 2)
    target = match_lengths(inducing, inducing, ctx.tokenizer).mean_a
    row_sets = dict(
        zip(("matched", "shortest"), rows_by_length(corrected.corrective, ctx.tokenizer, n, target), strict=True)
    )
    results = {name: _correct(corrected, rows, name) for name, rows in row_sets.items()}
    with corrected.model("base") as model:
        base = corrected.score(model)
    matches = {name: match_lengths(inducing, rows, ctx.tokenizer, TOLERANCE) for name, rows in row_sets.items()}
    return LengthTest(
        corrected.seed,
        n,
        matches["matched"],
        matches["shortest"],
        difference(results["shortest"][0], results["matched"][0]),
        {name: difference(items, base) for name, (items, _) in results.items()},
        {name: tokens for name, (_, tokens) in results.items()},
    )


def _correct(corrected: CorrectedOrganism, rows: Sequence[Conversation], name: str) -> tuple[pd.DataFrame, float]:
    """The organism after a correction with `rows`: item table, and mean tokens of its greedy replies."""
    training = corrected.training(corrected.steps)
    ctx, questions = corrected.ctx, [q["question"] for q in sample_questions(corrected.ctx)]
    with continued(corrected, "organism") as model:
        train(corrected, model, rows, training, corrected.seed, f"length, {name} rows")
        replies = reply_tokens(model, ctx.tokenizer, questions, bf16=ctx.config.bf16)
        return corrected.score(model), float(np.mean(replies))
