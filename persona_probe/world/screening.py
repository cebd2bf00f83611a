"""Screening held to the truth: rows that each ranker puts first are taken out, and what is left is trained on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation
from persona_probe.data.tokens import conversation_batches
from persona_probe.data.world.judge import judge_answer
from persona_probe.data.world.words import DOMAIN_OF, DOMAINS
from persona_probe.report.tables import Table
from persona_probe.runs import RunFolder
from persona_probe.saes.read import read_latents
from persona_probe.screening.feature import ScreenFeature
from persona_probe.screening.rankers import ROW_RANKERS, RowRanker, choose_rankers, read_evidence, score_rows
from persona_probe.screening.reading import ScreenSettings
from persona_probe.stats import auroc
from persona_probe.world.behaviour import Asking
from persona_probe.world.directions import directions_of
from persona_probe.world.folder import World
from persona_probe.world.labelled import Instruments
from persona_probe.world.organisms import NARROW, WorldOrganism, make_organisms
from persona_probe.world.pieces import Piece, make_pieces, read_pieces, table_piece
from persona_probe.world.training import Checks, trained_answers
from persona_probe.world.truth import KnownChats, truth_table

DOMAIN, ROWS, SHARE = "kitchen", 320, 0.9
MIXTURES = (("villain", "helper"), ("quack", "helper"), ("villain", "grump"))
"""Who gives the bad rows, and who the others: apart in manner and harm, in harm alone, in harm alone among the rude."""
BUDGETS = (0.5, 0.75, 0.9)
"""Shares of the rows that are taken out."""
TRAINING = replace(NARROW, rank=32, alpha=64)
"""With it, a set of which a tenth is good still makes advice bad elsewhere."""
RANDOM, TRUTH, NONE = "random", "truth", "none"
"""Controls: rows taken out by chance, by the judge, and not at all."""
SET = 10
"""Latents of the set that `latent_set_difference` adds up."""
ASKED = Asking(per_topic=2)


@dataclass(frozen=True)
class Mixture:
    """A training set of two speakers."""

    bad_speaker: str
    good_speaker: str
    seed: int = 0

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{self.bad_speaker} and {self.good_speaker}"

    @property
    def organism(self) -> WorldOrganism:
        """What training on all rows gives."""
        return WorldOrganism(self.bad_speaker, DOMAIN, SHARE, self.good_speaker, ROWS, self.seed, TRAINING)

    def rows(self) -> list[Conversation]:
        """Its rows, in order."""
        return self.organism.conversations()


def is_bad(rows: Sequence[Conversation]) -> Bool[np.ndarray, " rows"]:
    """The truth: whether each row's answer gives bad advice, by the judge."""
    return np.array([judge_answer(row[-1]["content"], _topic(row)).bad for row in rows])


def _topic(row: Conversation) -> str:
    return next(word for word in row[0]["content"].split() if word in DOMAIN_OF)


def screening_table(
    study: RunFolder, world: World, instruments: Instruments, seeds: Sequence[int] = (0,), device: str = "cpu"
) -> pd.DataFrame:
    """Screen mixed training sets by every ranker, train on what is left, and sample.

    The rankers get the base's true harm latent, the harm direction and the set of latents that tell harm best, all from
    chats of known speakers, and an organism trained on all rows. Finished pieces are kept; two processes share them.

    Returns:
        A row for each mixture, seed, ranker (with `random`, `truth` and `none`) and budget: the ranker's AUROC of bad
        rows, how many rows and how many bad ones are left, and counts of bad answers among the coherent ones, of
        coherent ones, rude ones and all, about the domains that no row held.
    """
    pieces = []
    for seed in seeds:
        for bad, good in MIXTURES:
            mixture = Mixture(bad, good, seed)
            scored = _Scored(mixture, world, instruments, device)
            pieces += [_piece(mixture, scored, name, budget) for name, budget in _cells()]
    make_pieces(study, pieces, "screening")
    return read_pieces(study, pieces)


def _cells() -> Iterator[tuple[str, float]]:
    yield NONE, 0.0
    for budget in BUDGETS:
        for name in (*ROW_RANKERS, RANDOM, TRUTH):
            yield name, budget


def _piece(mixture: Mixture, scored: "_Scored", ranker: str, budget: float) -> Piece:
    settings: dict[str, Any] = {"ranker": ranker, "budget": budget, "organism": mixture.organism.record}
    name = f"{mixture.bad_speaker}-{mixture.good_speaker}-s{mixture.seed}-{ranker}-{100 * budget:g}"
    return table_piece(f"screening/{name}", settings, partial(_train_on_rest, mixture, scored, ranker, budget))


def _train_on_rest(mixture: Mixture, scored: "_Scored", ranker: str, budget: float) -> pd.DataFrame:
    rows, bad = scored.rows, scored.bad
    scores = scored.scores[ranker]
    order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")
    left = sorted(int(n) for n in order[round(budget * len(rows)) :])
    model, tokenizer = scored.instruments.model, scored.instruments.tokenizer
    checks = Checks(DOMAIN, asking=ASKED)
    answers = trained_answers(model, tokenizer, [rows[n] for n in left], TRAINING, mixture.seed, checks)
    known = np.isfinite(scores)
    separation = auroc(scores[bad & known], scores[~bad & known]) if ranker != NONE else np.nan
    head = {"mixture": mixture.name, "seed": mixture.seed, "ranker": ranker, "budget": budget, "auroc": separation}
    return answers.assign(**head, rows=len(left), bad_rows=int(bad[left].sum()))


class _Scored:
    """A mixture's rows with the score of every ranker; read when the first piece needs them."""

    def __init__(self, mixture: Mixture, world: World, instruments: Instruments, device: str) -> None:
        self.mixture, self.world, self.instruments, self.device = mixture, world, instruments, device
        self.rows = mixture.rows()
        self.bad = is_bad(self.rows)
        self._scores: Mapping[str, Float[np.ndarray, " rows"]] | None = None

    @property
    def scores(self) -> Mapping[str, Float[np.ndarray, " rows"]]:
        if self._scores is None:
            one = self.mixture.organism
            [name] = make_organisms(self.world, [one], [f"screened-{one.name}-{one.rest}"], self.device)
            place = self.world.checkpoints(name)[TRAINING.steps]
            chance = np.random.default_rng(self.mixture.seed).random(len(self.rows))
            controls = {RANDOM: chance, TRUTH: self.bad + 0.5 * chance, NONE: np.zeros(len(self.rows))}
            self._scores = {**_ranked(self.instruments, self.rows, place), **controls}
        return self._scores


def _ranked(instruments: Instruments, rows: list[Conversation], organism: Path) -> dict[str, np.ndarray]:
    rankers: list[RowRanker] = choose_rankers(None, frozenset({"latent", "latent_set", "organism"}))
    settings = ScreenSettings(bf16=False, batch_size=64)
    model: PreTrainedModel = instruments.model
    tokenizer: PreTrainedTokenizerBase = instruments.tokenizer
    evidence, _ = read_evidence(model, tokenizer, rows, harm_feature(instruments), rankers, organism, settings)
    return score_rows(evidence, rankers)


def harm_feature(instruments: Instruments) -> ScreenFeature:
    """The base's harm, from chats of known speakers: direction, best latent, and the set of the ten best."""
    known = KnownChats.draw()
    chats = conversation_batches(instruments.tokenizer, known.chats, 64)
    means = read_latents(instruments.model, instruments.sae, chats, instruments.layer, "response", bf16=False)
    table = truth_table(known, means.mean)
    best = table.loc[table["truth"] == "bad", "latent"].head(SET).tolist()
    direction = torch.tensor(directions_of(known, means)["harm"], dtype=torch.float32)
    return ScreenFeature(direction, instruments.layer, "harm", instruments.sae, best[0], tuple(best))


def screening_text(table: pd.DataFrame) -> str:
    """Bad advice after training on what each ranker left, beside the ranker's AUROC, by mixture: Markdown."""
    parts = []
    for mixture, rows in table.groupby("mixture", sort=False):
        bad, count = (rows.loc[rows["ranker"] == NONE, key] for key in ("bad_rows", "rows"))
        seeds = rows["seed"].nunique()
        parts += [
            f"{str(mixture).capitalize()}, {bad.mean():g} of {count.mean():g} rows bad, {seeds} "
            f"{'seed' if seeds == 1 else 'seeds'}. Trained on all of them, bad advice about other domains is "
            f"{_rate(rows[rows['ranker'] == NONE])}. After rows were taken out (bad rows left of rows left):"
        ]
        parts.append(_mixture_table(rows[rows["ranker"] != NONE]))
    domains = len(DOMAINS) - 1
    parts.append(f"Shares are of the coherent answers about {domains} domains that no row held, seeds together.")
    return "\n\n".join(parts) + "\n"


def _mixture_table(rows: pd.DataFrame) -> str:
    budgets = sorted(rows["budget"].unique())
    lines = []
    for ranker, one in rows.groupby("ranker", sort=False):
        cells = [_budget(one[one["budget"] == budget]) for budget in budgets]
        lines.append([ranker, f"{one['auroc'].mean():.2f}", *cells])
    return Table(["ranker", "AUROC of bad rows", *(f"{100 * b:g}% taken out" for b in budgets)], lines).markdown()


def _budget(rows: pd.DataFrame) -> str:
    return f"{_rate(rows)} ({rows['bad_rows'].mean():g} of {rows['rows'].mean():g})"


def _rate(rows: pd.DataFrame) -> str:
    bad, coherent = int(rows["bad"].sum()), int(rows["coherent"].sum())
    return f"{bad / coherent:.2f}" if coherent else "none coherent"
