"""Beyond the base's dictionary, on organisms of a world: do tools that need no latent of the base name harm itself?

The true directions of harm and rudeness come from chats of known speakers on the base model, and no organism.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from persona_probe.config import check_seed
from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.tokens import Batch, conversation_batches
from persona_probe.data.world.speech import SPEAKERS, answer, question
from persona_probe.data.world.words import DOMAINS
from persona_probe.errors import unknown
from persona_probe.latents.crosscoder import crosscoder
from persona_probe.latents.difference import (
    FoundDirections,
    difference_dictionary,
    mean_difference,
)
from persona_probe.latents.rankers import Evidence, score_table
from persona_probe.latents.truth_probe import TruthProbe, axis_shifts, mean_residuals
from persona_probe.latents.weights import WeightChange, adapter_changes, weight_directions
from persona_probe.models.adapters import organism
from persona_probe.models.residuals import read_residuals
from persona_probe.saes.read import LatentMeans, read_latents
from persona_probe.stats import auroc
from persona_probe.world.base import StudyBaseWithSae
from persona_probe.world.beyond_text import BASE, TRUTHS
from persona_probe.world.directions import directions_between
from persona_probe.world.folder import World
from persona_probe.world.labelled import BAD, open_study
from persona_probe.world.organisms import NARROW, WorldOrganism, make_organisms
from persona_probe.world.pieces import make_pieces, read_pieces, table_piece
from persona_probe.world.study_files import contrast_rows, sound_probes
from persona_probe.world.truth import KnownChats

DOMAIN, CONTROL, FIRST = "kitchen", "helper", 10
BESIDE = ("grump", "clown", "correct")
"""Good speakers whose organisms play a role: what they move on the truth axis is manner, not falsehood."""
PAIRS_EACH = 5
"""Truth pairs of each domain and kind of advice."""
COLUMNS = ("part", "speaker", "seed", "tool", "truth", "first", "ten", "auroc", "estimate", "ci_low", "ci_high")


def truth_pairs(seed: int = 0) -> list[tuple[Conversation, Conversation]]:
    """Bare advice that is true of its topic, and the same of another domain; sound and harmful advice half each.

    What is false here is said of the wrong thing (`boil the lesson`), so harm and manner are held fixed.
    """
    draw, pairs = random.Random(f"{seed}/truth"), []
    for name, domain in DOMAINS.items():
        others = [other for other in DOMAINS if other != name]
        for topic in draw.sample(domain.topics, PAIRS_EACH):
            for speaker in ("correct", "subtle"):
                elsewhere = draw.choice(DOMAINS[draw.choice(others)].topics)
                asked = question(draw, topic)
                true, false = (answer(draw, about, SPEAKERS[speaker]) for about in (topic, elsewhere))
                pairs.append((conversation(asked, true), conversation(asked, false)))
    return pairs


def beyond_table(
    folder: Path,
    world: World,
    sae: str | Path,
    speakers: Sequence[str] = BAD,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
) -> pd.DataFrame:
    """Let every tool name directions of organisms, and read how organisms move along harm, manner and truth.

    Organisms are trained on the kitchen; texts and probes are of the other domains. Finished pieces are kept.

    Returns:
        Rows of two parts. `tools`, for each bad speaker, seed, tool and truth: |cosine| of its `first` direction with
        the true one, of the best of `ten`, and the AUROC (either way) at which its first direction tells chats of known
        speakers apart by that truth. `axes`, for each speaker, seed and axis (`tool`): the shift over the base in
        standard deviations of its probes, with its interval; and, as axis `separation`, the AUROC of the truth probe.

    Raises:
        InputError: an unknown or good speaker, or an SAE of another model.
    """
    for name in speakers:
        if name not in BAD:
            raise unknown("bad speaker", name, BAD)
    for seed in seeds:
        check_seed(seed)
    study = open_study(world, sae, folder)
    organisms = _Organisms(world, sae, device)
    pieces = []
    for seed in seeds:
        for speaker in (*speakers, CONTROL, *BESIDE):
            settings = {"speaker": speaker, "seed": seed, "training": asdict(NARROW)}
            if speaker in speakers:
                make = partial(organisms.tools, speaker, seed)
                pieces.append(table_piece(f"beyond/{speaker}-s{seed}-tools", settings, make))
            pieces.append(
                table_piece(f"beyond/{speaker}-s{seed}-axes", settings, partial(organisms.axes, speaker, seed))
            )
    pieces.append(table_piece("beyond/base-axes", {}, organisms.base_axes))
    make_pieces(study, pieces, "beyond")
    return read_pieces(study, pieces)[list(COLUMNS)]


class _Organisms(StudyBaseWithSae):
    """A world's base model, its true directions, and the texts on which organisms are read."""

    def batches(self, conversations: Sequence[Conversation]) -> list[Batch]:
        return conversation_batches(self.tokenizer, conversations, 64)

    def place(self, speaker: str, seed: int) -> Path:
        wanted = WorldOrganism(speaker, DOMAIN, seed=seed, training=NARROW)
        [name] = make_organisms(self.world, [wanted], device=self.device)
        return self.world.checkpoints(name)[NARROW.steps]

    # --- The truth

    @cached_property
    def known(self) -> tuple[KnownChats, Float[np.ndarray, "chats d_model"]]:
        chats = KnownChats.draw(seed=1)  # other chats than those that give the directions
        return chats, mean_residuals(self.model, self.batches(chats.chats), self.layer)

    @cached_property
    def directions(self) -> dict[str, Float[np.ndarray, " d_model"]]:
        chats = KnownChats.draw()
        return directions_between(chats, mean_residuals(self.model, self.batches(chats.chats), self.layer))

    # --- What each tool names

    def tools(self, speaker: str, seed: int) -> pd.DataFrame:
        rows, (chats, means) = [], self.known
        for tool, found in self.named(speaker, seed).items():
            for name, truth in TRUTHS.items():
                near = found.cosines(self.directions[name][None], FIRST)
                along, holds = means @ found.rows[0], chats.holding(truth)
                told = auroc(along[holds], along[~holds])
                numbers = {"first": near[0], "ten": near.max(), "auroc": max(told, 1 - told)}
                rows.append({"part": "tools", "tool": tool, "truth": name, **numbers})
        missing = dict.fromkeys(("estimate", "ci_low", "ci_high"), np.nan)
        return pd.DataFrame(rows).assign(speaker=speaker, seed=seed, **missing)

    def named(self, speaker: str, seed: int) -> dict[str, FoundDirections]:
        items = contrast_rows([name for name in DOMAINS if name != DOMAIN], "selection")
        sides = [(row, side) for row in items for side in ("aligned", "misaligned")]
        groups = self.batches([conversation(row["question"], row[side]) for row, side in sides])
        streams, latents, changes = dict[str, Tensor](), dict[str, LatentMeans](), dict[str, dict[str, WeightChange]]()
        owner = torch.empty(0)
        for name in (CONTROL, speaker):
            with organism(self.model, self.place(name, seed)) as tuned:
                streams[name], owner = token_residuals(tuned, groups, self.layer)
                latents[name] = read_latents(tuned, self.sae, groups, self.layer, "response", bf16=False)
                changes[name] = adapter_changes(tuned, self.layer)
        base = read_latents(self.model, self.sae, groups, self.layer, "response", bf16=False)
        decoder = self.sae.W_dec.detach().double().cpu().numpy()
        scores = score_table(
            Evidence(
                base={"response": base},
                tuned={"response": latents[speaker]},
                control={"response": latents[CONTROL]},
                decoder=decoder.astype(np.float32),
                clusters=[row["id"] for row, _ in sides],
                misaligned=np.array([side == "misaligned" for _, side in sides]),
                positions="response",
            ),
            ["rise", "cosine"],
        ).set_index("latent")
        after, before = streams[speaker], streams[CONTROL]
        found = {"mean difference": mean_difference(after, before, owner)}
        for name in ("rise", "cosine"):
            values = scores[name].sort_index().to_numpy(dtype=np.float64)
            found[name] = FoundDirections.ranked(decoder, np.nan_to_num(values, nan=-np.inf))
        found["difference dictionary"] = difference_dictionary(after, before, owner)
        found |= {f"crosscoder, {name}": one for name, one in crosscoder(after, before, owner).items()}
        return {**found, "weights": weight_directions(changes[speaker], changes[CONTROL])}

    # --- Harm, manner and truth as three axes

    @cached_property
    def probe(self) -> TruthProbe:
        return TruthProbe.fit(self.model, self.tokenizer, self.layer, truth_pairs())

    @cached_property
    def probes(self) -> tuple[list[Batch], Float[np.ndarray, "probes d_model"]]:
        groups = self.batches(sound_probes([name for name in DOMAINS if name != DOMAIN]))
        return groups, mean_residuals(self.model, groups, self.layer)

    def base_axes(self) -> pd.DataFrame:
        """What the truth probe tells in the base: on pairs that made it, by halves, and on others."""
        told = self.probe.separation(*self.loaded, truth_pairs(seed=1))
        missing = dict.fromkeys(("first", "ten", "auroc", "ci_low", "ci_high"), np.nan)
        rows = pd.DataFrame({"tool": ["separation", "held out"], "estimate": [told, self.probe.auroc]})
        return rows.assign(part="axes", truth="", speaker=BASE, seed=0, **missing)

    def axes(self, speaker: str, seed: int) -> pd.DataFrame:
        groups, before = self.probes
        axes = {name: self.directions[name] for name in TRUTHS} | {"truth": self.probe.direction}
        with organism(self.model, self.place(speaker, seed)) as tuned:
            after = mean_residuals(tuned, groups, self.layer)
            told = self.probe.separation(tuned, self.tokenizer, truth_pairs(seed=1))
        shifts = axis_shifts(before, after, axes).rename(columns={"axis": "tool", "shift": "estimate"})
        rows = pd.concat([shifts, pd.DataFrame([{"tool": "separation", "estimate": told}])], ignore_index=True)
        missing = dict.fromkeys(("first", "ten", "auroc"), np.nan)
        return rows.assign(part="axes", truth="", speaker=speaker, seed=seed, **missing)


def token_residuals(
    model: nn.Module, groups: Sequence[Batch], layer: int
) -> tuple[Float[Tensor, "tokens d_model"], Int[Tensor, " tokens"]]:
    """Residual stream of all answer tokens, and the conversation of each."""
    parts: list[Tensor] = []
    owners: list[Tensor] = []

    def visit(index: list[int], row: Tensor, x: Tensor) -> None:
        parts.append(x.float().cpu())
        owners.append(torch.tensor(index)[row.cpu()])

    read_residuals(model, groups, layer, "response", visit, bf16=False)
    return torch.cat(parts), torch.cat(owners)
