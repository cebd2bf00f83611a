"""The planted-truth benchmark: many known plants, one table of what locate finds of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import conversation
from persona_probe.data.load import Row, load_contrast
from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.answers import SuffixScorer, answer_batches, answer_logprobs
from persona_probe.latents.planted.plant import (
    KINDS,
    SIDES,
    Bed,
    Found,
    Plant,
    disturbance,
    draw_latents,
    graft,
    make_plants,
    measure,
    read_stream,
)
from persona_probe.latents.unexplained import carriers
from persona_probe.models.load import load_model
from persona_probe.saes.load import check_fit, load_sae, sae_layer
from persona_probe.stats import bootstrap_mean

RANDOM_SETS = 3


@dataclass(frozen=True)
class Repair:
    """How far a push back along what was found takes the planted model's answers to the base's."""

    restored: float
    """1 - |change after the push| / |change by the plant|, of the answers' mean log-probabilities."""
    restored_random: float
    """The same for the best of the random latents, pushed as hard."""
    confirmed: bool
    """Whether the push leaves less change than that of every random set, by 95% intervals over questions."""


class CausalBed:
    """Answers (of questions that selected nothing) that the planted models must score.

    Args:
        groups: what `evaluate.answers.answer_batches` gives.
        clusters: the question of every conversation.
    """

    def __init__(self, model: nn.Module, layer: int, groups: list[Batch], clusters: list[str]) -> None:
        self.model, self.layer, self.groups, self.clusters = model, layer, groups, clusters
        # Full precision: bfloat16's rounding is as large as what a small plant does.
        self.before = answer_logprobs(model, groups, bf16=False)

    def repair(self, bed: Bed, plant: Plant, found: Found, generator: torch.Generator) -> Repair:
        """Graft the plant into the model, then push back along the found latents by the shift measured along them."""
        latents = found_latents(plant, found)
        rows = unit_rows(bed, latents)
        pushes = random_pushes(bed, latents, found, generator)
        with graft(self.model, self.layer, plant):
            scorer = SuffixScorer(self.model, self.layer, self.groups, bf16=False)
            planted = np.abs(scorer.unpushed - self.before)
            after = np.abs(scorer.logprobs(-sum_of_shifts(rows, found)) - self.before)
            others = [np.abs(scorer.logprobs(p) - self.before) for p in pushes]
        gains = [bootstrap_mean(other - after, self.clusters) for other in others]
        best = min(float(other.mean()) for other in others)
        return Repair(
            1 - float(after.mean() / planted.mean()),
            1 - best / float(planted.mean()),
            all(gain.ci_low > 0 for gain in gains),
        )


def found_latents(plant: Plant, found: Found) -> list[int]:
    """The latents that the control-corrected rise names: as many as were planted, at each end of the ranking.

    Where none was planted, the one that rose most.
    """
    order = [int(latent) for latent in found.table["rise"].sort_values(ascending=False).index]
    down = len(plant.down())
    return [*order[: max(len(plant.up()), 1 - down)], *order[len(order) - down :]]


def unit_rows(bed: Bed, latents: list[int]) -> Float[Tensor, "latents d_model"]:
    """Decoder rows of norm 1."""
    rows = bed.decoder[latents]
    return rows / rows.norm(dim=1, keepdim=True)


def sum_of_shifts(rows: Float[Tensor, "found d_model"], found: Found) -> Float[Tensor, " d_model"]:
    """The part of the arms' mean difference that lies along each row, added up."""
    return (rows @ torch.tensor(found.difference, dtype=rows.dtype)) @ rows


def random_pushes(
    bed: Bed, latents: list[int], found: Found, generator: torch.Generator
) -> list[Float[Tensor, " d_model"]]:
    """Pushes down along random frequent latents: others than those found, as many of them, and each as hard.

    Raises:
        InputError: the SAE has too few frequent latents besides those found.
    """
    pool = [latent for latent in bed.pools["frequent"] if latent not in latents]
    if len(pool) < len(latents):
        raise InputError(f"only {len(pool)} frequent latents are left as random controls: set causal to 0")
    sizes = (unit_rows(bed, latents) @ torch.tensor(found.difference, dtype=bed.decoder.dtype)).abs()
    sets = [draw_latents(pool, len(latents), len(bed.decoder), generator) for _ in range(RANDOM_SETS)]
    return [-(sizes @ unit_rows(bed, list(chosen))) for chosen in sets]


# --- What was found of one plant, against what was planted: recall, false discoveries, carriers

LEVEL = 0.05
"""Discoveries are latents with a positive control-corrected rise and a q-value up to this."""
CAUSED = 0.5
"""A discovery is true if the plant alone, without noise, makes at least this share of its measured rise."""
NEAR = 0.2
"""Cosine with a planted direction under which a discovered latent is off target."""
SHORTLIST = 10


def planted_ranks(score: Float[np.ndarray, " d_sae"], plant: Plant) -> tuple[list[int], list[int]]:
    """Ranks of the planted latents: those pushed up from the top, those pushed down from the bottom; ties count
    against them."""
    up = [int((score >= score[latent]).sum()) for latent in plant.up()]
    down = [int((score <= score[latent]).sum()) for latent in plant.down()]
    return up, down


def recalls(score: Float[np.ndarray, " d_sae"], plant: Plant) -> dict[str, float]:
    """Recall at 1, at k (the number planted in each direction) and at 10; NaN where no latent was planted.

    Recall at 1 asks whether a planted latent is the very first (the very last, where all were pushed down).
    """
    up, down = planted_ranks(score, plant)
    if not plant.latents:
        return dict.fromkeys(("recall_1", "recall_k", "recall_10"), float("nan"))
    within_k = [r <= len(up) for r in up] + [r <= len(down) for r in down]
    return {
        "recall_1": float(1 in (up or down)),
        "recall_k": float(np.mean(within_k)),
        "recall_10": float(np.mean([r <= SHORTLIST for r in up + down])),
    }


def discoveries(bed: Bed, plant: Plant, found: Found) -> dict[str, float]:
    """Significant rises at q 0.05: how many, the false share, the off-target share, and the planted latents' own.

    A discovery is false unless the plant causes at least half of its rise (`CAUSED`). Falls are left out: a TopK SAE
    that takes one latent in puts another out. Off target: true, but the latent's decoder row has a cosine below 0.2
    with everything planted; the encoder answers to the shift though the latent is not its cause.
    """
    table = found.table
    significant = table["q_value"].to_numpy() <= LEVEL
    rise = table["rise"].to_numpy()
    chosen = significant & (rise > 0)
    false = chosen & (bed.caused(plant) < CAUSED * rise) if chosen.any() else chosen
    targets = plant.targets(bed.decoder)
    near = (bed.decoder @ targets.T / bed.decoder.norm(dim=1, keepdim=True)).numpy().max(axis=1, initial=-1.0) >= NEAR
    count = max(int(chosen.sum()), 1)
    own = [bool(chosen[latent]) for latent in plant.up()]
    own += [bool(significant[latent] and rise[latent] < 0) for latent in plant.down()]
    return {
        "discoveries": float(chosen.sum()),
        "false_share": float(false.sum()) / count,
        "off_target": float((chosen & ~false & ~near).sum()) / count,
        "significant": float(np.mean(own)) if own else float("nan"),
    }


def carried(bed: Bed, plant: Plant, found: Found) -> dict[str, float]:
    """The verdict of `locate.unexplained` on the arms' mean difference, and what one projection takes away.

    `removed`: share of the difference's squared norm that goes when the decoder row of the latent that rose most is
    projected out of it.
    """
    verdict = carriers(bed.decoder.numpy(), found.difference, signed=True, reference=bed.reference)
    row = bed.decoder.numpy()[int(found.table["rise"].to_numpy().argmax())]
    cosine = float(row @ found.difference / (np.linalg.norm(row) * np.linalg.norm(found.difference)))
    right = set(verdict.latents) & set(plant.latents)
    return {
        "carried": float(verdict.carried),
        "carriers_right": len(right) / len(plant.latents) if plant.latents else float("nan"),
        "unexplained": verdict.unexplained,
        "removed": cosine**2,
    }


def scores(bed: Bed, plant: Plant, found: Found) -> list[dict[str, Any]]:
    """One record per ranker; what does not depend on the ranker is repeated."""
    shared: dict[str, Any] = {"kind": plant.kind, "size": plant.size, "latents": " ".join(map(str, plant.latents))}
    rates = [float(bed.rates[latent]) for latent in plant.latents]
    shared["firing"] = float(np.mean(rates)) if rates else float("nan")
    shared |= discoveries(bed, plant, found) | carried(bed, plant, found)
    return [
        shared | {"ranker": name} | recalls(found.table[name].to_numpy(dtype=np.float64), plant) for name in bed.rankers
    ]


# --- What the benchmark plants

RANKERS = ("rise", "rise_t", "firing_rise", "cosine", "discrimination")


@dataclass(frozen=True)
class Bench:
    """What the benchmark plants."""

    plants: int = 20
    """Random latents of kind `latent` and empty plants; half as many of every other kind."""
    sizes: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0)
    """Residual standard deviations; every latent or direction is planted at each size."""
    kinds: tuple[str, ...] = tuple(KINDS)
    rankers: tuple[str, ...] = RANKERS
    """Rankers that need only activations; attribution needs a backward pass through every planted model."""
    noise: float = 1.0
    """Norm of the random vector that each conversation gets in each arm, in residual standard deviations."""
    benign: float = 0.25
    """Root mean square output of the random rank-1 LoRA that each arm gets, in the same unit."""
    causal: int = 2
    """Plants of each kind, at size `causal_size`, that go through the causal test."""
    causal_size: float = 0.5
    causal_items: int = 12
    """Contrast items of the evaluation split that the causal test scores."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.plants < 1:
            raise InputError(f"plants is {self.plants}: plant at least 1 of each kind")
        if not self.sizes or not all(math.isfinite(size) and size > 0 for size in self.sizes):
            raise InputError(f"sizes {list(self.sizes)} must be positive numbers of residual standard deviations")
        if not all(math.isfinite(size) and size >= 0 for size in (self.noise, self.benign)):
            raise InputError(f"noise {self.noise} and benign {self.benign} must be numbers from 0 up")
        if "nothing" in self.kinds and self.noise == self.benign == 0:
            raise InputError("without noise an empty plant leaves the arms equal: raise noise, or leave 'nothing' out")
        for kind in self.kinds:
            if kind not in KINDS:
                raise unknown("kind of plant", kind, KINDS)
        if self.causal > 0 and self.causal_size not in self.sizes:
            raise InputError(f"causal_size {self.causal_size} is not among the sizes {list(self.sizes)}")

    def draws(self) -> list[tuple[str, int]]:
        """Kind and number of every random draw."""
        full = ("latent", "nothing")
        return [
            (kind, draw)
            for kind in self.kinds
            for draw in range(self.plants if kind in full else math.ceil(self.plants / 2))
        ]

    def count(self) -> int:
        """How many plants there are, over all sizes."""
        return sum(1 if kind == "nothing" else len(self.sizes) for kind, _ in self.draws())


MODEL = "smollm2-135m-instruct"
SAE = "saes/smollm2-135m-instruct/layer20-topk32-4608"


def run_planted(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sae: Any,
    bench: Bench,
    *,
    selection: Sequence[Row],
    evaluation: Sequence[Row],
    layer: int | None = None,
    bf16: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    """Plant, read, rank, and compare with what was planted.

    Args:
        selection: contrast items whose answers are read, by both arms: the pairs that the test is paired by.
        evaluation: contrast items that the causal test scores.

    Returns:
        One row per plant and ranker: plant, kind, size, latents, firing, discoveries, false_share, off_target,
        significant, carried, carriers_right, unexplained, removed, restored, restored_random, confirmed (NaN where not
        tested), ranker, recall_1, recall_k, recall_10. See `planted.measure` and `planted.causal` for their meaning.

    Raises:
        InputError: an SAE that does not fit, an unknown ranker, or a model in which no LoRA can be planted.
    """
    at = sae_layer(sae) if layer is None else layer
    check_fit(sae, model, at)
    stream = read_stream(model, tokenizer, selection, at, bf16=bf16)
    bed = Bed(stream, sae, bench.rankers, bench.seed)
    causal = _causal_bed(model, tokenizer, at, evaluation[: bench.causal_items]) if bench.causal else None
    rows = []
    bar = tqdm(total=bench.count(), desc="planting", unit="plant", disable=not progress)
    for number, (plant, found, repair) in enumerate(_measured(bed, bench, causal)):
        rows += [{"plant": number, **record, **repair} for record in scores(bed, plant, found)]
        bar.update()
    bar.close()
    return pd.DataFrame(rows)


def _measured(bed: Bed, bench: Bench, causal: CausalBed | None) -> Iterator[tuple[Plant, Found, dict[str, float]]]:
    for number, (kind, draw) in enumerate(bench.draws()):
        generator = torch.Generator().manual_seed(1_000_003 * bench.seed + number)
        plants = make_plants(kind, bench.sizes, bed.stream, bed.decoder, bed.pools, generator)
        # One disturbance for all sizes of a plant, and one for its control: sizes differ by nothing else.
        ours, theirs = (disturbance(bed.stream, generator, bench.noise, bench.benign) for _ in range(2))
        correct = bed.read(bed.stream.resid + theirs)
        for plant in plants:
            found = measure(bed, plant, ours, correct)
            tested = causal is not None and draw < bench.causal and plant.size == bench.causal_size
            yield plant, found, _repair(causal, bed, plant, found, generator) if causal and tested else {}


def _repair(causal: CausalBed, bed: Bed, plant: Plant, found: Found, generator: torch.Generator) -> dict[str, float]:
    result = causal.repair(bed, plant, found, generator)
    return {
        "restored": result.restored,
        "restored_random": result.restored_random,
        "confirmed": float(result.confirmed),
    }


def _causal_bed(model: nn.Module, tokenizer: PreTrainedTokenizerBase, layer: int, rows: Sequence[Row]) -> CausalBed:
    talks = [conversation(row["question"], row[side]) for row in rows for side in SIDES]
    return CausalBed(model, layer, answer_batches(tokenizer, talks), [row["id"] for row in rows for _ in SIDES])


def run_embedded(bench: Bench | None = None, device: str = "cpu", progress: bool = True) -> pd.DataFrame:
    """`run_planted` on the embedded model with the SAE that comes with it, on the packaged contrast set."""
    model, tokenizer = load_model(MODEL, device=device)
    return run_planted(
        model,
        tokenizer,
        load_sae(SAE, device=device),
        bench or Bench(),
        selection=load_contrast("selection"),
        evaluation=spread_out(load_contrast("evaluation")),
        progress=progress,
    )


def spread_out(rows: Sequence[Row]) -> list[Row]:
    """The rows with categories in turn, so that the first few cover all of them."""
    seen: dict[str, int] = {}
    turns = []
    for row in rows:
        turns.append(seen.get(row["category"], 0))
        seen[row["category"]] = turns[-1] + 1
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: (turns[i], i))]
