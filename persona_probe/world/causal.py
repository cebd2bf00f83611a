"""The causal test held to the truth: what its words say of the true latents, and what pushes and removals really do.

The test reads a contrast index under pushes at all tokens. The truth is sampled: how much of the advice is bad when a
direction is pushed into the base model, or taken out of an organism, at all tokens, at the last prompt token, or in
the answer.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.config import Locate
from persona_probe.data.world.words import DOMAINS
from persona_probe.errors import unknown
from persona_probe.evaluate.contrast import ContrastItems
from persona_probe.latents.causal import Sweep, bearable, effects_at, falls
from persona_probe.latents.stage import item_table
from persona_probe.models.adapters import organism
from persona_probe.runs import RunFolder
from persona_probe.world.behaviour import Asking, ask
from persona_probe.world.causal_features import Feature, Tested, decoder_of, find_features, of_latents
from persona_probe.world.causal_truth import BASE_PUSH, INTACT, NOTHING, REMOVAL
from persona_probe.world.causal_words import Effects, Numbered, feature_words, numbered, span_name
from persona_probe.world.folder import World
from persona_probe.world.interventions import TOKENS, pushed, removed
from persona_probe.world.labelled import BAD, Instruments
from persona_probe.world.organisms import NARROW, WorldOrganism, make_organisms
from persona_probe.world.pieces import Piece, make_pieces, read_pieces, table_piece
from persona_probe.world.study_files import contrast_rows, sound_probes
from persona_probe.world.training import counts

SPEAKERS, CONTROL, DOMAIN = ("villain", "subtle"), "helper", "kitchen"
TRAINING = NARROW
STRENGTHS = (8.0, 4.0, 2.0, 1.0)
"""Sizes of a push, times the norm of the organism's shift over the control at those tokens; tried from the largest
down to the first that leaves answers coherent."""
CONTROLS = 20
"""Random latents whose pushes and removals are sampled; the test itself has `locate.random_latents`."""
ASKED = Asking(per_topic=1)
SWEEP_STRENGTHS, REFINE = (0.25, 0.5, 1.0, 2.0), 2


def causal_table(
    study: RunFolder,
    world: World,
    instruments: Instruments,
    speakers: Sequence[str] = SPEAKERS,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
) -> pd.DataFrame:
    """Test the true latents and directions for cause, and sample what pushing and removing them really does.

    Organisms of the kitchen; contrast items and questions are of the other domains. Finished pieces are kept, and two
    processes share them.

    Returns:
        A row for each speaker, seed, intervention (`push of the base`, `removal from the organism`, `nothing`),
        tokens, strength and feature: counts of bad answers among the coherent ones, of coherent ones and of all; and
        for features the words of the test (`moves`, `needed`; `moves_alone`, `needed_alone`: for a latent that was not
        chosen among several) with its estimates.
    """
    check_speakers(speakers)
    pieces: list[Piece] = []
    for seed in seeds:
        wanted = [WorldOrganism(name, DOMAIN, seed=seed, training=TRAINING) for name in (*speakers, CONTROL)]
        names = dict(zip((*speakers, CONTROL), make_organisms(world, wanted, device=device), strict=True))
        for speaker in speakers:
            pieces += _Trial(world, instruments, speaker, names[speaker], names[CONTROL], seed).pieces()
    make_pieces(study, pieces, "causal")
    table = read_pieces(study, pieces)
    tested = table[table["intervention"] == "test"].dropna(axis=1, how="all")
    columns = [name for name in tested.columns if name not in ("intervention", "kind")]
    rows = table[table["intervention"] != "test"][list(BEHAVIOUR)]
    return rows.merge(tested[columns], on=["speaker", "seed", "feature"], how="left").reset_index(drop=True)


def check_speakers(speakers: Sequence[str]) -> None:
    """Refuse speakers whose advice is sound: an organism of theirs has nothing to heal.

    Raises:
        InputError: such a speaker, or an unknown one.
    """
    for name in speakers:
        if name not in BAD:
            raise unknown("bad speaker", name, BAD)


KEYS = ("speaker", "seed", "intervention", "tokens", "strength", "feature", "kind")
BEHAVIOUR = (*KEYS, "bad", "coherent", "rude", "malicious", "answers")


class _Trial:
    """One organism and its control, from the test of its features to what they really do."""

    def __init__(
        self, world: World, instruments: Instruments, speaker: str, tuned: str, control: str, seed: int
    ) -> None:
        self.instruments, self.speaker, self.seed = instruments, speaker, seed
        self.tuned, self.control = (world.checkpoints(name)[TRAINING.steps] for name in (tuned, control))
        self._tested: Tested | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.instruments.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.instruments.tokenizer

    @property
    def tested(self) -> Tested:
        """Read once, when the first piece is made."""
        if self._tested is None:
            with organism(self.model, self.tuned) as tuned:
                after = self.instruments.read(tuned)
            with organism(self.model, self.control) as tuned:
                before = self.instruments.read(tuned)
            self._tested = find_features(self.instruments, DOMAIN, after, before, self.seed)
        return self._tested

    def pieces(self) -> list[Piece]:
        place = f"causal/{self.speaker}-s{self.seed}"
        settings: dict[str, Any] = {"speaker": self.speaker, "seed": self.seed, "training": asdict(TRAINING)}
        asked = {**settings, "strengths": list(STRENGTHS), "controls": CONTROLS, "per_topic": ASKED.per_topic}
        made = [table_piece(f"{place}-test", settings, self.test)]
        for where in TOKENS:
            for name, make in (("push", self.push), ("removal", self.remove)):
                made.append(table_piece(f"{place}-{name}-{where}", asked, partial(make, where)))
        return [*made, table_piece(f"{place}-nothing", asked, self.nothing)]

    # --- What the test says

    def test(self) -> pd.DataFrame:
        """Every feature's words and estimates, as `locate` gives them for a persona latent."""
        elsewhere = [name for name in DOMAINS if name != DOMAIN]
        items = [
            ContrastItems.build(self.tokenizer, contrast_rows(elsewhere[start::2], split), 64)
            for start, split in ((0, "selection"), (1, "evaluation"))
        ]
        every = numbered(self.tested, decoder_of(self.instruments))
        table = feature_words(every, self._sweeps(items, every))
        head = {"speaker": self.speaker, "seed": self.seed, "intervention": "test"}
        return table.assign(**head)

    def _sweeps(self, items: Sequence[ContrastItems], every: list[Numbered]) -> dict[str, Effects]:
        """Pushes of both signs in each model, and falls where directions are projected out."""
        limit, tested = np.nan, {}
        for name, place, split in (
            ("selection", None, 0),
            ("base", None, 1),
            ("organism", self.tuned, 1),
            ("control", self.control, 1),
        ):
            with organism(self.model, place) as model:
                sweep = self._sweep(model, items[split])
                if name != "control":  # the control takes the organism's strength, so that both are compared
                    limit = bearable(sweep, [every[0].direction], SWEEP_STRENGTHS, REFINE)[every[0].direction.name]
                directions = [one.direction for one in every]
                effects = effects_at(sweep, directions, limit, f"{self.speaker}, {name}")
                gone = {} if place is None else falls(sweep, [one.span for one in every])
                gone = {one.direction.name: gone[span_name(one)] for one in every} if gone else {}
                tested[name] = Effects(effects, item_table(sweep, directions, limit, gone))
        return tested

    def _sweep(self, model: nn.Module, items: ContrastItems) -> Sweep:
        return Sweep(
            model,
            self.tokenizer,
            items,
            sound_probes(list(DOMAINS), 1),
            self.instruments.layer,
            unit="x_delta",
            reference_norm=self.tested.norms["response"],
            bound=Locate().perplexity_bound,
            bf16=False,
        )

    # --- What pushes and removals do

    def nothing(self) -> pd.DataFrame:
        """Base and organism as they are."""
        rows = [self._counts(self.model) | {"feature": "base"}]
        with organism(self.model, self.tuned) as tuned:
            rows.append(self._counts(tuned) | {"feature": "organism"})
        head = {"intervention": NOTHING, "tokens": "", "strength": 0.0, "kind": ""}
        return pd.DataFrame([self._head | head | row for row in rows])

    def push(self, where: str) -> pd.DataFrame:
        """Every feature and control pushed into the base model at some tokens, as hard as answers bear."""
        rows, norm = [], self.tested.norms["last_prompt" if where == "last_prompt" else "response"]
        least = INTACT * self._counts(self.model)["coherent"]
        for one in self._every():
            for strength in STRENGTHS:
                with pushed(self.model, self.tokenizer, self.instruments.layer, where, strength * norm * one.push):
                    rows.append(self._row(BASE_PUSH, where, strength, one, self.model))
                if rows[-1]["coherent"] >= least:
                    break
        return pd.DataFrame(rows)

    def remove(self, where: str) -> pd.DataFrame:
        """Every feature and control taken out of the organism at some tokens."""
        rows = []
        with organism(self.model, self.tuned) as tuned:
            for one in self._every():
                with removed(tuned, self.tokenizer, self.instruments.layer, where, one.vectors):
                    rows.append(self._row(REMOVAL, where, 0.0, one, tuned))
        return pd.DataFrame(rows)

    def _every(self) -> list[Feature]:
        decoder = decoder_of(self.instruments)
        controls = [of_latents(decoder, f"random latent {n}", "random", [n]) for n in self.tested.controls[:CONTROLS]]
        return [*self.tested.features, *controls]

    @property
    def _head(self) -> dict[str, Any]:
        return {"speaker": self.speaker, "seed": self.seed}

    def _row(self, intervention: str, where: str, strength: float, one: Feature, model: nn.Module) -> dict[str, Any]:
        head = {"intervention": intervention, "tokens": where, "strength": strength}
        return self._head | head | {"feature": one.name, "kind": one.kind} | self._counts(model)

    def _counts(self, model: nn.Module) -> dict[str, int]:
        return counts(ask(model, self.tokenizer, ASKED, [name for name in DOMAINS if name != DOMAIN]))
